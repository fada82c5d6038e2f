"""Reading a data source once, before anything is built: every rank its share, kept for the next start."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from qtarget_megatron import data
from qtarget_megatron.cache_folder import cache_folder, keep, load_kept
from qtarget_megatron.data import EncodedSample, Records, SampleNotes, SampleSizes, measure_samples, writes_date
from qtarget_megatron.megatron.runtime.progress import Progress
from qtarget_megatron.megatron.runtime.ranks import on_first_rank
from qtarget_megatron.objectives import Objective, multiple_of_sft
from qtarget_megatron.teacher_cache import TeacherCache

# An inspection that is done by then needs no progress.
_QUIET_SECONDS = 3.0
# Fewer records are read again in about a second.
_KEPT_FROM = 1000
# Records of a rank whose sizes travel at a time.
_GATHERED = 1 << 16


@dataclass(frozen=True)
class Inspected:
    """What all ranks know of a source's records.

    ranges: least and largest value of each side input over the supervised tokens.
    known:  where it was read from, where an earlier start had found it.
    """

    sizes: SampleSizes
    notes: SampleNotes
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    known: Path | None = None


def inspect(
    name: str,
    records: Records,
    tokenizer: Any,
    seq_length: int,
    *,
    token_inputs: Sequence[str] = (),
    date: datetime.date | None = None,
    check: Callable[[int, EncodedSample], None] | None = None,
    checked_by: Any = None,
) -> Inspected:
    """Read every record once, every rank its share, unless an earlier start kept what it found.

    name:       of the command and what it does, in what is printed.
    check:      raises ValueError for a record that is refused.
    checked_by: JSON that tells one check from another; without it nothing is kept of a source that is checked.

    ValueError names a record that cannot be read, on every rank. Collective over all ranks: object gathers.
    """
    path = None
    # Another day is no other text where no template asks for it.
    written = str(date) if writes_date(tokenizer) else None
    if len(records) >= _KEPT_FROM and (check is None or checked_by is not None):
        path = on_first_rank(
            lambda: _kept_at(records, tokenizer, [records.form, seq_length, list(token_inputs), written, checked_by])
        )
    if path is not None and (known := on_first_rank(lambda: _read(path, len(records)))) is not None:
        return known
    found = _measured(name, records, tokenizer, seq_length, token_inputs, date, check)
    if path is not None:
        on_first_rank(lambda: _keep(path, found))
    return found


def _measured(
    name: str,
    records: Records,
    tokenizer: Any,
    seq_length: int,
    token_inputs: Sequence[str],
    date: datetime.date | None,
    check: Callable[[int, EncodedSample], None] | None,
) -> Inspected:
    notes, ranges = SampleNotes(), dict.fromkeys(token_inputs, (np.inf, -np.inf))
    total, done = len(records), 0
    progress = Progress(name, total, after=_QUIET_SECONDS)

    def look(index: int, sample: EncodedSample) -> None:
        nonlocal done
        notes.add(sample)
        for key, values in sample.inputs.items():
            values, (low, high) = values[sample.supervised], ranges[key]
            ranges[key] = min(low, values.min(initial=np.inf)), max(high, values.max(initial=-np.inf))
        if check is not None:
            check(index, sample)
        # All ranks are about as fast.
        done = min(done + dist.get_world_size(), total)
        progress.report(done)

    def measure(share: range) -> SampleSizes:
        return measure_samples(records, tokenizer, seq_length, share, token_inputs, date, look)

    sizes = _of_every_record(len(records), measure)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (notes, ranges))
    all_notes, all_ranges = zip(*everyone, strict=True)
    merged = {
        key: (min(found[key][0] for found in all_ranges), max(found[key][1] for found in all_ranges)) for key in ranges
    }
    return Inspected(sizes, sum(all_notes[1:], start=all_notes[0]), merged)


def _of_every_record(count: int, measure: Callable[[range], SampleSizes]) -> SampleSizes:
    """The sizes of all records: every rank measures its share of the indices, all get the whole.

    measure: its ValueError on any rank is raised on every one. Collective over all ranks: object gathers.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    gathered: list[Any] = [None] * world_size
    own, problem = SampleSizes.empty(0), None
    try:
        own = measure(range(rank, count, world_size))
    except ValueError as error:
        problem = str(error)
    dist.all_gather_object(gathered, problem)
    for problem in gathered:
        if problem is not None:
            raise ValueError(problem)
    whole = SampleSizes.empty(count)
    # In pieces: what an object gather takes is a multiple of what it carries.
    for begin in range(0, -(-count // world_size), _GATHERED):
        piece = slice(begin, begin + _GATHERED)
        dist.all_gather_object(gathered, (own.tokens[piece], own.supervised[piece], own.truncated[piece]))
        for index, (tokens, supervised, truncated) in enumerate(gathered):
            places = slice(index + begin * world_size, index + (begin + len(tokens)) * world_size, world_size)
            whole.tokens[places], whole.supervised[places], whole.truncated[places] = tokens, supervised, truncated
    return whole


# ---- what an earlier start found


def _kept_at(records: Records, tokenizer: Any, settings: list[Any]) -> Path:
    """The file of what is found in these records with these settings."""
    made_from = [
        *(records.digest, len(records), settings, _code()),
        *(tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map),
    ]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder("inspections") / f"{digest[:40]}.npz"


@functools.cache
def _code() -> list[str]:
    """What reads records, by its contents."""
    own = b"".join(path.read_bytes() for path in sorted(Path(data.__file__).parent.glob("*.py")))
    versions = [importlib.metadata.version(name) for name in ("jinja2", "numpy", "tokenizers", "transformers")]
    return [hashlib.sha256(own).hexdigest(), *versions]


def _read(path: Path, count: int) -> Inspected | None:
    """What was kept there of as many records; None where nothing is."""
    kept = load_kept(path, ("tokens", "supervised", "truncated", "notes", "ranges"))
    if kept is None or len(kept["tokens"]) != count:
        return None
    sizes = SampleSizes(kept["tokens"], kept["supervised"], kept["truncated"])
    ranges = {key: (low, high) for key, (low, high) in json.loads(str(kept["ranges"])).items()}
    return Inspected(sizes, SampleNotes(*kept["notes"].tolist()), ranges, known=path)


def _keep(path: Path, found: Inspected) -> None:
    """Keep it for the next start; where that is not possible, a line says so."""
    ranges = np.array(json.dumps(found.ranges))
    if problem := keep(path, **vars(found.sizes), notes=np.array(astuple(found.notes)), ranges=ranges):
        logging.getLogger("qtarget_megatron").warning(
            "%s: %s: the next start will read the data again; QTARGET_CACHE_DIR names another folder",
            *(path.parent, problem),
        )


# ---- what there is to say


def log_notes(log: logging.Logger, path: Path, lines: Sequence[str]) -> None:
    """Log what SampleNotes say of a file; its warnings begin with WARNING."""
    for line in lines:
        note = line.removeprefix("WARNING: ")
        log.log(logging.INFO if note == line else logging.WARNING, "%s: %s", path, note)


def ranges_warning(ranges: dict[str, tuple[float, float]], objective: Objective) -> str | None:
    """A line where the values of the side inputs leave nothing of the objective but sft; None where they do not."""
    if not ranges or any(low != high for low, high in ranges.values()):
        return None
    factor = multiple_of_sft(objective, {name: low for name, (low, _) in ranges.items()})
    if factor is None:
        return None
    given = " and ".join(f'"{name}" is {low:g}' for name, (low, _) in ranges.items())
    what = {0.0: "nothing is trained", 1.0: "this trains as sft does"}.get(factor, f"this is {factor:g} times sft")
    return f"{given} for every supervised token: {what}, objective {objective} notwithstanding"


def cache_identity(cache: TeacherCache) -> dict[str, Any]:
    """JSON that tells teacher caches apart by what they were made from."""
    return dataclasses.asdict(cache.header)


def verify_cache(cache: TeacherCache) -> str:
    """Read a whole cache, checksums and values, every rank its share of the parts; a line about it.

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
    return f"teacher cache {cache.directory}: {megabytes} MB checked in {seconds:.1f} s"
