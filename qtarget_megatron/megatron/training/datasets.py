"""Megatron's data set provider for the JSONL data of qtarget_megatron.data."""

from __future__ import annotations

import argparse
import datetime
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.utils import Split

from qtarget_megatron.data import (
    IGNORE_INDEX,
    EncodedSample,
    PackedDataset,
    Records,
    SampleNotes,
    SampleStatus,
    SupervisedDataset,
    alignment,
    inspect_samples,
    open_records,
)
from qtarget_megatron.megatron.runtime.progress import Progress
from qtarget_megatron.megatron.training.resume_flags import samples_to_train
from qtarget_megatron.objectives import Objective, multiple_of_sft
from qtarget_megatron.teacher_cache import TeacherCache

_log = logging.getLogger("qtarget_megatron")
# An inspection that is done by then needs no progress.
_QUIET_SECONDS = 3.0


class TaughtDataset(torch.utils.data.Dataset):
    """A SupervisedDataset whose items also hold what a cached teacher keeps of each token, aligned with labels.

    teacher_ids int64 [S, k] (-1: not used), teacher_log_p float32 [S, k], teacher_tail float32 [S]; teacher_ms
    float32 [], what reading them took.
    """

    def __init__(self, dataset: SupervisedDataset, cache: TeacherCache):
        self._dataset, self._cache = dataset, cache

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return self._taught(self._dataset[item])

    def of_record(self, index: int, length: int) -> dict[str, torch.Tensor]:
        """The item of a record, padded to a length that holds it."""
        return self._taught(self._dataset.of_record(index, length))

    def _taught(self, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        labels = sample["labels"].numpy()
        rows = labels != IGNORE_INDEX
        # The sample as the teacher read it; what follows the last supervised token does not matter.
        input_ids = np.append(sample["tokens"].numpy(), labels[-1])
        ids, log_p, tail = self._cache.sample(int(sample["sample"]), input_ids, np.append(False, rows))
        teacher_ids = np.full((len(labels), ids.shape[1]), -1)
        teacher_log_p = np.full(teacher_ids.shape, -np.inf, dtype=np.float32)
        teacher_tail = np.zeros(len(labels), dtype=np.float32)
        teacher_ids[rows], teacher_log_p[rows], teacher_tail[rows] = ids, log_p, tail
        return sample | {
            "teacher_ids": torch.from_numpy(teacher_ids),
            "teacher_log_p": torch.from_numpy(teacher_log_p),
            "teacher_tail": torch.from_numpy(teacher_tail),
            "teacher_ms": torch.tensor(1000 * (time.perf_counter() - start)),
        }


class DatasetProvider:
    """train_valid_test_dataset_provider of pretrain(): every rank opens the files and reads by sample index."""

    # Megatron then calls it on every rank, not only on tensor-parallel rank 0.
    is_distributed = True

    def __init__(
        self,
        args: argparse.Namespace,
        tokenizer,
        objective: Objective,
        teacher_caches: Mapping[Path, TeacherCache] | None = None,
    ):
        """objective: its side inputs are fields of each record. teacher_caches: by data file."""
        self.args, self.tokenizer, self.objective = args, tokenizer, objective
        self._caches = dict(teacher_caches or {})
        self._built: dict[Path, tuple[Records, np.ndarray, np.ndarray]] = {}

    def __call__(self, num_samples, vp_stage=None):
        args = self.args
        train = valid = None
        if args.sft_train is not None and not args.skip_train:
            count = num_samples[0]
            if args.train_iters and args.rampup_batch_size is None:
                # Megatron counts all steps at today's batch size, also those before a resume.
                count = max(count, samples_to_train(args))
            train = self._dataset(args.sft_train, count, Split.train, shuffle=True)
        if args.sft_valid is not None:
            held_out = None if args.full_validation else args.eval_iters * args.eval_global_batch_size
            valid = self._dataset(args.sft_valid, num_samples[1], Split.valid, shuffle=False, first=held_out)
        return train, valid, None

    def _dataset(self, path: Path, num_samples: int | None, split: Split, *, shuffle: bool, first: int | None = None):
        file, status, lengths = self._inspected(path)
        if first is not None:
            # Every evaluation sees the same samples, so that held-out losses can be compared.
            kept = np.flatnonzero(status != SampleStatus.SKIPPED)
            status = status.copy()
            status[kept[first:]] = SampleStatus.SKIPPED
            if len(kept) < first:
                _log.info("%s has %d usable samples, an evaluation of %d repeats some", path, len(kept), first)
        if num_samples is None:  # --full-validation
            num_samples = int((status != SampleStatus.SKIPPED).sum())
        dataset: Any = SupervisedDataset(
            file,
            self.tokenizer,
            self.args.seq_length,
            status=status,
            num_samples=num_samples,
            seed=self.args.seed,
            shuffle=shuffle,
            pad_id=pad_id(self.tokenizer),
            token_inputs=self.objective.token_inputs,
            date=self._date(path),
        )
        if path in self._caches:
            dataset = TaughtDataset(dataset, self._caches[path])
        kept = np.flatnonzero(status != SampleStatus.SKIPPED)
        if shuffle and self.args.pack:
            dataset = self._packed(path, dataset, kept, lengths[kept], num_samples)
        elif shuffle:
            _log.info("%s: %s", path, _epochs(num_samples, len(kept), "samples"))
        dataset.split = split
        return dataset

    def _packed(self, path: Path, samples: Any, kept: np.ndarray, lengths: np.ndarray, num_rows: int) -> PackedDataset:
        args = self.args
        packed = PackedDataset(
            samples,
            kept,
            lengths,
            args.seq_length,
            num_rows=num_rows,
            alignment=alignment(args.context_parallel_size),
            seed=args.seed,
            shuffle=True,
            pad_id=pad_id(self.tokenizer),
        )
        rows = len(packed.plan.epoch(0))
        _log.info(
            "%s: %d samples share %d rows of %d tokens, %.1f%% of them filled",
            *(path, len(kept), rows, args.seq_length, 100 * packed.fill),
        )
        _log.info("%s: %s", path, _epochs(num_rows, rows, "rows"))
        return packed

    def _inspected(self, path: Path) -> tuple[Records, np.ndarray, np.ndarray]:
        """The file, and the status and number of tokens of each of its samples: every rank inspects its share, once."""
        if path not in self._built:
            file, seq_length = open_records(path, self.args.data_format), self.args.seq_length

            ranges = InputRanges(self.objective.token_inputs)
            look = Inspection(f"qtarget_megatron: reading {path}", len(file))
            cache = self._caches.get(path)

            def inspect(share: np.ndarray) -> np.ndarray:
                tokens = []

                def check(index: int, sample: EncodedSample) -> None:
                    look.add(sample)
                    ranges.add(sample)
                    tokens.append(min(len(sample.input_ids), seq_length))
                    if cache is not None:
                        # That the teacher read it as training does is seen before training starts.
                        cache.check_sample(index, sample.input_ids, sample.supervised)

                inputs, date = self.objective.token_inputs, self._date(path)
                status = inspect_samples(file, self.tokenizer, seq_length, share, inputs, check, date)
                return np.stack([status, np.array(tokens, dtype=np.int32)], axis=1)

            status, lengths = for_each_record(file, inspect).T
            ranges.merge()
            notes = look.notes_of_all()
            if cache is not None and not self.args.skip_teacher_cache_check:
                verify_cache(cache)
            skipped = int((status == SampleStatus.SKIPPED).sum())
            _log.info(
                "%s: %d samples, %d truncated to %d tokens, %d skipped (no supervised token)",
                path,
                len(file),
                (status == SampleStatus.TRUNCATED).sum(),
                seq_length,
                skipped,
            )
            if warning := ranges.warning(self.objective):
                _log.warning("%s: %s", path, warning)
            if skipped > len(file) // 2:
                _log.warning("%s: %s", path, _mostly_skipped(skipped, len(file), seq_length))
            log_notes(_log, path, notes.lines(self._date(path)))
            self._built[path] = file, status, lengths
        return self._built[path]

    def _date(self, path: Path) -> datetime.date | None:
        """The date that chat templates write: that of the file's teacher cache, else the training's."""
        cached = self._caches[path].header.date if path in self._caches else None
        date = cached or getattr(self.args, "data_date", None)
        return None if date is None else datetime.date.fromisoformat(date)


class Inspection:
    """Counts what is to be said of a file's samples, of which each rank has a share, and shows how far it is.

    name: of what is printed. total: records of the file.
    """

    def __init__(self, name: str, total: int):
        self._notes = SampleNotes()
        self._progress = Progress(name, total, after=_QUIET_SECONDS)
        self._total, self._done = total, 0

    def add(self, sample: EncodedSample) -> None:
        """The next sample of this rank's share."""
        self._notes.add(sample)
        # All ranks are about as fast.
        self._done = min(self._done + dist.get_world_size(), self._total)
        self._progress.report(self._done)

    def notes_of_all(self) -> SampleNotes:
        """The notes of all ranks; one object gather over all of them."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self._notes)
        return sum(everyone[1:], start=everyone[0])


def _epochs(num_items: int, of_epoch: int, what: str) -> str:
    usable = "usable" if what == "samples" else "of an epoch"
    return f"training reads {num_items} {what} of the {of_epoch} {usable}: {num_items / max(of_epoch, 1):.2f} epochs"


def _mostly_skipped(skipped: int, total: int, seq_length: int) -> str:
    return (
        f"{skipped / total:.0%} of the samples are not trained on, {skipped} of {total}: they have no supervised token "
        f"among the first {seq_length + 1}; raise --seq-length, or look at what the records hold"
    )


def log_notes(log: logging.Logger, path: Path, lines: Sequence[str]) -> None:
    """Log what SampleNotes say of a file; its warnings begin with WARNING."""
    for line in lines:
        note = line.removeprefix("WARNING: ")
        log.log(logging.INFO if note == line else logging.WARNING, "%s: %s", path, note)


def verify_cache(cache: TeacherCache) -> None:
    """Read a whole cache, checksums and values, every rank its share of the parts.

    A ValueError on any rank is raised on every one. Collective over all ranks: one object gather.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    start, problem = time.perf_counter(), None
    try:
        cache.verify(range(rank, cache.num_parts, world_size))
    except ValueError as error:
        problem = str(error)
    problems = [None] * world_size
    dist.all_gather_object(problems, problem)
    for problem in problems:
        if problem is not None:
            raise ValueError(problem)
    seconds, megabytes = time.perf_counter() - start, f"{cache.num_bytes / 1e6:,.1f}"
    _log.info("teacher cache %s: %s MB checked in %.1f s", cache.directory, megabytes, seconds)


class InputRanges:
    """The least and the largest value of each side input over the supervised tokens of a file."""

    def __init__(self, names: Sequence[str]):
        self._ranges = {name: (np.inf, -np.inf) for name in names}

    def add(self, sample: EncodedSample) -> None:
        for name, values in sample.inputs.items():
            values, (low, high) = values[sample.supervised], self._ranges[name]
            self._ranges[name] = min(low, values.min(initial=np.inf)), max(high, values.max(initial=-np.inf))

    def merge(self) -> None:
        """Take in the ranges of all ranks' samples. Collective, an object gather, where there are side inputs."""
        if self._ranges:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self._ranges)
            for name in self._ranges:
                lows, highs = zip(*(ranges[name] for ranges in gathered), strict=True)
                self._ranges[name] = min(lows), max(highs)

    def warning(self, objective: Objective) -> str | None:
        """A line where the values leave nothing of the objective but sft; None where they do not."""
        if not self._ranges or any(low != high for low, high in self._ranges.values()):
            return None
        factor = multiple_of_sft(objective, {name: low for name, (low, _) in self._ranges.items()})
        if factor is None:
            return None
        given = " and ".join(f'"{name}" is {low:g}' for name, (low, _) in self._ranges.items())
        what = {0.0: "nothing is trained", 1.0: "this trains as sft does"}.get(factor, f"this is {factor:g} times sft")
        return f"{given} for every supervised token: {what}, objective {objective} notwithstanding"


def for_each_record(file: Records, inspect: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What inspect says of each record of a file: every rank inspects its share of the indices, all get the whole.

    inspect: indices [n] -> array [n, ...]. Its ValueError on any rank is raised on every one. Collective over all
    ranks: one object gather.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: Any = None
    try:
        found = inspect(np.arange(rank, len(file), world_size))
    except ValueError as error:
        found = str(error)
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, found)
    for found in gathered:
        if isinstance(found, str):
            raise ValueError(found)
    result = np.empty((len(file), *gathered[0].shape[1:]), dtype=gathered[0].dtype)
    for index, found in enumerate(gathered):
        result[index::world_size] = found
    return result


def pad_id(tokenizer) -> int:
    """Any id of the vocabulary will do: padding follows the sample, so causal attention never reads it."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)
