"""Megatron's data set provider for the sources of qtarget_megatron.data, and the lengths that follow from them."""

from __future__ import annotations

import argparse
import datetime
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.utils import Split

from qtarget_megatron.data import (
    IGNORE_INDEX,
    EncodedSample,
    EvaluationRows,
    HeldOutSet,
    KeptSamples,
    Packing,
    Records,
    RowDataset,
    RowPlan,
    SampleOrder,
    SampleSizes,
    Source,
    SupervisedSamples,
    aligned_lengths,
    alignment,
    balance,
    held_out_sets,
    open_records,
    training_sources,
)
from qtarget_megatron.megatron.training.inspection import (
    cache_identity,
    inspect,
    log_notes,
    ranges_warning,
    verify_cache,
)
from qtarget_megatron.megatron.training.resume_flags import samples_to_train
from qtarget_megatron.objectives import Objective
from qtarget_megatron.teacher_cache import TeacherCache

_log = logging.getLogger("qtarget_megatron")
# Rows that are not full are padded to a multiple of this.
_ROW_STEP = 64


@dataclass(frozen=True)
class Inspected:
    """A source of which everything is known that planning needs.

    kept:    [m] indices of the records that are trained on.
    lengths: int32 [m], tokens of a row that each of them takes, unaligned.
    first:   number of its first record among those of all sources of a training.
    """

    path: Path
    records: Records
    kept: np.ndarray
    lengths: np.ndarray
    first: int
    date: datetime.date | None
    cache: TeacherCache | None


class TaughtSamples:
    """Samples whose items also hold what a cached teacher keeps of each token, aligned with labels.

    teacher_ids int64 [S, k] (-1: not used), teacher_log_p float32 [S, k], teacher_tail float32 [S]; teacher_ms
    float32 [], what reading them took.
    """

    def __init__(self, samples: SupervisedSamples, cache: TeacherCache):
        self._samples, self._cache = samples, cache

    def item(self, index: int, length: int) -> dict[str, torch.Tensor]:
        """The tensors of a record, padded to a length that holds it."""
        return self._taught(self._samples.item(index, length), index)

    def empty(self, length: int) -> dict[str, torch.Tensor]:
        """Padding alone."""
        return self._taught(self._samples.empty(length), None)

    def _taught(self, item: dict[str, torch.Tensor], index: int | None) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        labels = item["labels"].numpy()
        rows = labels != IGNORE_INDEX
        teacher_ids = np.full((len(labels), self._cache.header.k), -1)
        teacher_log_p = np.full(teacher_ids.shape, -np.inf, dtype=np.float32)
        teacher_tail = np.zeros(len(labels), dtype=np.float32)
        if index is not None:
            # The sample as the teacher read it; what follows the last supervised token does not matter.
            input_ids = np.append(item["tokens"].numpy(), labels[-1])
            ids, log_p, tail = self._cache.sample(index, input_ids, np.append(False, rows))
            teacher_ids[rows], teacher_log_p[rows], teacher_tail[rows] = ids, log_p, tail
        return item | {
            "teacher_ids": torch.from_numpy(teacher_ids),
            "teacher_log_p": torch.from_numpy(teacher_log_p),
            "teacher_tail": torch.from_numpy(teacher_tail),
            "teacher_ms": torch.tensor(1000 * (time.perf_counter() - start)),
        }


class DatasetProvider:
    """train_valid_test_dataset_provider of pretrain(): every rank opens the sources and reads by sample index."""

    # Megatron then calls it on every rank, not only on tensor-parallel rank 0.
    is_distributed = True

    def __init__(
        self,
        args: argparse.Namespace,
        tokenizer,
        objective: Objective,
        teacher_caches: Mapping[Path, TeacherCache] | None = None,
    ):
        """objective: its side inputs are fields of each record. teacher_caches: by source."""
        self.args, self.tokenizer, self.objective = args, tokenizer, objective
        self._caches = dict(teacher_caches or {})
        self._training: list[Source] = []
        self._train: list[Inspected] = []
        self._held_out: list[tuple[HeldOutSet, Inspected]] = []
        self._plan: RowPlan | None = None
        self._opened: dict[Path, Inspected] = {}
        self._num_records = 0

    # ---- before anything is built

    def inspect(self) -> None:
        """Read all sources once and settle the lengths in args that follow from them: train_iters of --epochs,
        eval_iters where the held-out data are evaluated as a whole. Call it once Megatron is initialised.

        ValueError names a record that cannot be read, and a source that leaves nothing to train on. Collective.
        """
        args = self.args
        if args.sft_train and not args.skip_train:
            self._training = training_sources(args.sft_train)
            self._train = [self._inspected(source.path) for source in self._training]
            self._plan = self._planned()
            if args.epochs is not None:
                args.train_iters = steps_of_epochs(self._plan, args.epochs, args.global_batch_size)
                _log.info(
                    "--epochs %g: %d rows in steps of %d: %d steps",
                    *(args.epochs, self._plan.rows_of(args.epochs), args.global_batch_size, args.train_iters),
                )
        if args.sft_valid:
            self._held_out = [(held_out, self._inspected(held_out.path)) for held_out in held_out_sets(args.sft_valid)]
            if args.eval_iters and len(self._held_out) > 1:
                raise ValueError("--eval-iters: several held-out sets are evaluated as a whole: drop it, or give one")
            if not args.eval_iters:
                args.eval_iters = len(self._evaluation_rows()) // args.eval_global_batch_size
        if args.eval_interval is None:
            # Megatron evaluates once more when training is done: by default only then.
            args.eval_interval = args.train_iters + 1 if args.train_iters else 1000

    def record_names(self, numbers: Sequence[int]) -> str:
        """Records by their numbers among those of all sources, for messages."""
        of_source: dict[Path, list[int]] = {}
        for number in numbers:
            source = max((s for s in self._opened.values() if s.first <= number), key=lambda s: s.first)
            of_source.setdefault(source.path, []).append(number - source.first)
        named = " and ".join(f"{found} of {path}" for path, found in of_source.items())
        return f"record(s) {named} (counted from 0)"

    def _planned(self) -> RowPlan:
        args, counts = self.args, [len(source.kept) for source in self._train]
        weights = [source.weight for source in self._training]
        order = SampleOrder(
            counts, None if None in weights else [weight or 0.0 for weight in weights], seed=args.seed, shuffled=True
        )
        lengths = np.concatenate([source.lengths for source in self._train])
        if not args.pack:
            return RowPlan(order, lengths, None)
        aligned = aligned_lengths(lengths, self._alignment())
        plan = RowPlan(order, aligned, args.seq_length)
        first = plan.epoch(0)
        tokens = first.sums(lengths)
        _log.info(
            "%d samples share %d rows of %d tokens, %.1f%% of them filled",
            *(len(order), len(first), args.seq_length, 100 * tokens.sum() / (len(first) * args.seq_length)),
        )
        if args.data_parallel_size > 1:
            batch = args.global_batch_size
            # Attention's work goes with the squares of the samples' lengths.
            costs = [
                balance(first.sums(aligned.astype(np.float64) ** power), args.data_parallel_size, batch)
                for power in (1, 2)
            ]
            _log.info(
                "the fullest of %d data-parallel ranks has %.2f times a step's mean of tokens, %.2f of attention",
                *(args.data_parallel_size, *costs),
            )
        return plan

    def _alignment(self) -> int:
        return alignment(self.args.seq_length, self.args.context_parallel_size)

    def _evaluation_rows(self) -> EvaluationRows:
        """Those of all held-out sets: one evaluation reads them all."""
        args, batch = self.args, self.args.eval_global_batch_size
        lengths = aligned_lengths(np.concatenate([s.lengths for _, s in self._held_out]), self._alignment())
        limit = args.eval_iters * batch or None
        return EvaluationRows(lengths, args.seq_length if args.pack else None, multiple=batch, limit=limit)

    def _inspected(self, path: Path) -> Inspected:
        """Every rank reads its share of the source, once."""
        if path not in self._opened:
            args, cache = self.args, self._caches.get(path)
            records, cut = open_records(path, args.data_format), cut_length(args)

            def check(index: int, sample: EncodedSample) -> None:
                if sample.weighted:
                    raise ValueError(
                        f'{records.where(index)}: an answer has a "weight" that is neither 0 nor 1, which objective '
                        f'{self.objective.name} does not read: train with one that has the side input "weight", as '
                        "weighted-sft, or give weights 0 and 1"
                    )
                if sample.truncated and args.long_samples == "refuse":
                    raise ValueError(
                        f"{records.where(index)}: the record has more than --seq-length {cut} tokens: raise it, or "
                        "give --long-samples cut or skip"
                    )
                if cache is not None:
                    # That the teacher read it as training does is seen before training starts.
                    cache.check_sample(index, sample.input_ids, sample.supervised)

            found = inspect(
                f"qtarget_megatron: reading {path}",
                records,
                self.tokenizer,
                cut,
                token_inputs=self.objective.token_inputs,
                date=self._date(path),
                check=check,
                checked_by=[args.long_samples == "refuse", None if cache is None else cache_identity(cache)],
            )
            if found.known is not None:
                _log.info("%s: known from an earlier start: %s", path, found.known)
            if cache is not None and not args.skip_teacher_cache_check:
                _log.info(verify_cache(cache))
            kept = self._kept(path, found.sizes, cut)
            if warning := ranges_warning(found.ranges, self.objective):
                _log.warning("%s: %s", path, warning)
            log_notes(_log, path, found.notes.lines(self._date(path)))
            lengths = np.minimum(found.sizes.tokens[kept], cut)
            first, self._num_records = self._num_records, self._num_records + len(records)
            self._opened[path] = Inspected(path, records, kept, lengths, first, self._date(path), cache)
        return self._opened[path]

    def _kept(self, path: Path, sizes: SampleSizes, cut: int) -> np.ndarray:
        """Indices of the records that are trained on, of which a line is logged."""
        is_kept = sizes.supervised > 0
        long = f"{sizes.truncated.sum()} truncated to {cut} tokens"
        if self.args.long_samples == "skip":
            is_kept &= ~sizes.truncated
            long = f"{sizes.truncated.sum()} skipped (more than {cut} tokens)"
        without = int((sizes.supervised == 0).sum())
        _log.info("%s: %d samples, %s, %d skipped (no supervised token)", path, len(sizes), long, without)
        kept = np.flatnonzero(is_kept)
        if len(kept) == 0:
            raise ValueError(
                f"all {len(sizes)} samples of {str(path)!r} are skipped, without a target in --seq-length {cut}: raise "
                "it, or add assistant messages or completions"
            )
        if without > len(sizes) // 2:
            _log.warning("%s: %s", path, _mostly_skipped(without, len(sizes), cut))
        return kept

    def _date(self, path: Path) -> datetime.date | None:
        """The date that chat templates write: that of the source's teacher cache, else the training's."""
        cached = self._caches[path].header.date if path in self._caches else None
        date = cached or getattr(self.args, "data_date", None)
        return None if date is None else datetime.date.fromisoformat(date)

    # ---- Megatron's provider

    def __call__(self, num_samples, vp_stage=None):
        args = self.args
        train = valid = None
        if self._plan is not None:
            count = num_samples[0]
            if args.train_iters and args.rampup_batch_size is None:
                # Megatron counts all steps at today's batch size, also those before a resume.
                count = max(count, samples_to_train(args))
            train = self._dataset(self._train, self._plan, count, Split.train)
            self._tell(vp_stage, _epochs(count, self._plan, "rows" if args.pack else "samples"))
        if self._held_out:
            # Every evaluation sees the same samples, so that held-out losses can be compared.
            rows, sources = self._evaluation_rows(), [source for _, source in self._held_out]
            valid = self._dataset(sources, rows, num_samples[1], Split.valid)
            self._tell(vp_stage, f"an evaluation reads {len(rows.rows.samples)} held-out samples in {len(rows)} rows")
        return train, valid, None

    @staticmethod
    def _tell(vp_stage: int | None, line: str) -> None:
        """Log what is the same for every model chunk of a rank."""
        if not vp_stage:
            _log.info(line)

    def _dataset(self, sources: Sequence[Inspected], rows: Any, num_rows: int, split: Split) -> RowDataset:
        args = self.args
        packing = None
        if args.pack:
            lengths = np.concatenate([source.lengths for source in sources])
            packing = Packing(lengths, self._alignment(), row_step(args))
        dataset: Any = RowDataset(
            KeptSamples(
                [
                    (self._samples(source, number if split == Split.valid and len(sources) > 1 else None), source.kept)
                    for number, source in enumerate(sources)
                ]
            ),
            rows,
            args.seq_length,
            num_rows=num_rows,
            pad_id=pad_id(self.tokenizer),
            packing=packing,
        )
        dataset.split = split
        return dataset

    @property
    def held_out_names(self) -> tuple[str, ...]:
        """Names of the held-out sets, where there are several."""
        return tuple(held_out.name for held_out, _ in self._held_out) if len(self._held_out) > 1 else ()

    def _samples(self, source: Inspected, held_out: int | None) -> Any:
        samples = SupervisedSamples(
            source.records,
            self.tokenizer,
            cut_length(self.args),
            pad_id=pad_id(self.tokenizer),
            token_inputs=self.objective.token_inputs,
            date=source.date,
            first=source.first,
            held_out=held_out,
        )
        return samples if source.cache is None else TaughtSamples(samples, source.cache)


def cut_length(args: argparse.Namespace) -> int:
    """Tokens that a sample is cut to."""
    return args.sample_length or args.seq_length


def row_step(args: argparse.Namespace) -> int | None:
    """What packed rows are padded to a multiple of; None where all of them must be as long: stages that send them on,
    micro-batches of several rows and experts' ranks that exchange tokens know one length."""
    if args.pipeline_model_parallel_size > 1 or args.num_experts is not None:
        return None
    if max(args.micro_batch_size, args.eval_micro_batch_size) > 1:
        return None
    return math.lcm(_ROW_STEP, 2 * args.context_parallel_size * args.tensor_model_parallel_size)


def steps_of_epochs(plan: RowPlan, epochs: float, batch: int) -> int:
    """Steps in which as many epochs are read to their end; the last one may take rows of the next."""
    return -(-plan.rows_of(epochs) // batch)


def pad_id(tokenizer) -> int:
    """Any id of the vocabulary will do: padding follows the sample, so causal attention never reads it."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None)


def _epochs(num_items: int, plan: RowPlan, what: str) -> str:
    of_epoch = len(plan.epoch(0))
    usable = "usable" if what == "samples" else "of an epoch"
    return f"training reads {num_items} {what} of the {of_epoch} {usable}: {num_items / max(of_epoch, 1):.2f} epochs"


def _mostly_skipped(skipped: int, total: int, seq_length: int) -> str:
    return (
        f"{skipped / total:.0%} of the samples are not trained on, {skipped} of {total}: they have no supervised token "
        f"among the first {seq_length + 1}; raise --seq-length, or look at what the records hold"
    )
