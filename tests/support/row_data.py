"""A data set of one file as a training reads it without packing, built from the package's parts."""

from __future__ import annotations

import numpy as np

from qtarget_megatron.data import KeptSamples, RowDataset, RowPlan, SampleOrder, SampleSizes, SupervisedSamples
from qtarget_megatron.data.dataset import measure_samples


def sizes_of(file, tokenizer, seq_length, names=(), indices=None) -> SampleSizes:
    """Of the records at these indices; None: of all."""
    indices = range(len(file)) if indices is None else indices
    return measure_samples(file, tokenizer, seq_length, indices, names)


def padded_rows(
    file, tokenizer, seq_length, *, num_rows, seed=0, shuffle=True, pad_id=0, kept=None, names=(), taught=None
) -> RowDataset:
    """A sample a row. kept: indices of records; None: of those with supervised tokens. taught: makes samples with a
    teacher of the samples."""
    if kept is None:
        kept = np.flatnonzero(sizes_of(file, tokenizer, seq_length, names).supervised)
    samples = SupervisedSamples(file, tokenizer, seq_length, pad_id=pad_id, token_inputs=names)
    plan = RowPlan(SampleOrder([len(kept)], seed=seed, shuffled=shuffle), np.ones(len(kept)), None)
    source = samples if taught is None else taught(samples)
    return RowDataset(KeptSamples([(source, np.asarray(kept))]), plan, seq_length, num_rows=num_rows, pad_id=pad_id)
