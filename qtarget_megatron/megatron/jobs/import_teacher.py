"""Writing a teacher cache from what another program says or has written."""

from __future__ import annotations

import collections
import concurrent.futures
import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtarget_megatron.data import EncodedSample, Records, encode_at, open_records, writes_date
from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.megatron.runtime import logs
from qtarget_megatron.megatron.runtime.prepare import load_model_tokenizer
from qtarget_megatron.megatron.runtime.progress import Progress
from qtarget_megatron.resumable import check_space
from qtarget_megatron.teacher_cache import CacheHeader, CacheWriter, SampleEntries, template_digest, tokenizer_digest
from qtarget_megatron.teacher_cache.index import INDEX_FILE, read_index
from qtarget_megatron.teacher_sources import TeacherSource, distance, label_shares

_log = logs.of("import-teacher")
# How far a server's answers may be from its earlier ones, in mean total variation: 16-bit models say something a little
# different in each batch.
_SAME = 0.05
# A teacher that knows most tokens before or behind a place, and so many more than those at it, reads other places.
_MOST, _BETTER = 0.5, 0.1


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What is read, and where to.

    hf_model:   Hugging Face directory of the student: its tokenizer, chat template and vocabulary size.
    seq_length: samples are cut to it.
    data_date:  YYYY-MM-DD that a chat template writes; None: that of a cache that was begun, or today.
    dtype:      of the log-probabilities, float16 or float32.
    checks:     samples that are checked in the end.
    """

    hf_model: Path
    data: Path
    out: Path
    seq_length: int
    data_format: str = "auto"
    data_date: str | None = None
    dtype: str = "float16"
    checks: int = 8


def import_teacher(options: ImportOptions, open_source: Callable[[], TeacherSource]) -> TeacherSource:
    """Write a cache; a run that was ended goes on where it stopped. The source, which is opened first.

    ValueError for bad input, before anything is written, for a sample that the source does not know, and for a source
    that does not hold what it said, see check_samples.
    """
    arch = Architecture.from_hf(options.hf_model)
    tokenizer = load_model_tokenizer(options.hf_model, arch)
    if options.seq_length < 1:
        raise ValueError(f"--seq-length: expected 1 or more, got {options.seq_length}")
    records = open_records(options.data, options.data_format)
    source = open_source()
    date = None
    if writes_date(tokenizer):
        begun = read_index(options.out).header.date if (options.out / INDEX_FILE).exists() else None
        date = options.data_date or begun or datetime.date.today().isoformat()
    header = CacheHeader(
        data=records.digest,
        num_samples=len(records),
        tokenizer=tokenizer_digest(tokenizer),
        chat_template=template_digest(tokenizer),
        teacher=source.name,
        teacher_files=source.made_from,
        precision=source.precision,
        vocab_size=arch.vocab_size,
        seq_length=options.seq_length,
        k=source.k,
        top_p=source.top_p,
        dtype=options.dtype,
        date=date,
    )
    writer = CacheWriter(options.out, header, tokenizer)
    if writer.check():
        _log.info("%s is complete already, made from the same inputs", options.out)
        return source
    done = writer.open()
    if done:
        _log.info("going on behind the %d samples that are there already", done)
    day = None if date is None else datetime.date.fromisoformat(date)

    def sample_at(index: int) -> EncodedSample:
        return encode_at(records, tokenizer, options.seq_length, index, (), day)

    _check_room(options, header, records, done)
    progress = Progress("import-teacher", len(records), done)
    for entries in _entries(source, sample_at, range(done, len(records)), arch.vocab_size):
        writer.append([entries])
        progress.add(1)
    check_samples(source, writer, sample_at, len(records), options.checks)
    writer.finish()
    return source


def _check_room(options: ImportOptions, header: CacheHeader, records: Records, done: int) -> None:
    """ValueError where not even an entry of each sample that is left has room."""
    least = (len(records) - done) * header.least_bytes_per_token
    if (warning := check_space(options.out, least, most=least)) is not None:
        _log.warning(warning)


def _entries(
    source: TeacherSource, sample_at: Callable[[int], EncodedSample], indices: range, vocab_size: int
) -> Iterator[SampleEntries | None]:
    """Those of each sample, in order, several asked for at a time; None of one without supervised tokens."""

    def ask(index: int, sample: EncodedSample) -> SampleEntries | None:
        if not sample.supervised.any():
            return None
        found = source.entries(index, sample)
        if (largest := int(found.ids.max())) >= vocab_size:
            raise ValueError(
                f"sample {index}: the teacher has token id {largest}, --hf-model a vocabulary of {vocab_size}: use a "
                "teacher of the same tokens"
            )
        return found

    if source.parallel == 1:
        yield from (ask(index, sample_at(index)) for index in indices)
        return
    waiting: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(source.parallel) as pool:
        try:
            for index in indices:
                # Chat templates are rendered by one thread at a time.
                waiting.append(pool.submit(ask, index, sample_at(index)))
                if len(waiting) >= 2 * source.parallel:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def check_samples(
    source: TeacherSource,
    writer: CacheWriter,
    sample_at: Callable[[int], EncodedSample],
    num_samples: int,
    checks: int,
) -> None:
    """Look at some samples, from the first to the last one, before the cache is complete.

    Of each it is counted how often the token at a place, and those beside it, are among the kept entries. A source that
    repeats itself is asked again. ValueError where it says something else, or knows the token beside a place better.
    """
    shares = np.zeros(4, dtype=np.int64)
    chosen: list[int] = sorted({round(place) for place in np.linspace(0, num_samples - 1, min(checks, num_samples))})
    for index in chosen:
        sample = sample_at(index)
        if not sample.supervised.any():
            continue
        kept = writer.sample(index)
        shares += label_shares(sample, kept)
        if source.repeats and (off := distance(kept, source.entries(index, sample))) > _SAME:
            raise ValueError(
                f"{source.name} says something else of sample {index} than when it was cached (total variation "
                f"{off:.3f}): its model was changed, or is not deterministic; delete {writer.directory} to start over"
            )
    before, own, behind, count = shares.tolist()
    if max(before, behind) > max(_MOST * count, own + _BETTER * count):
        where = "before" if before > behind else "behind"
        raise ValueError(
            f"{source.name}: the token {where} a place is among its entries in {max(before, behind) / count:.0%} of "
            f"{count} places, the token itself in {own / count:.0%}: the entries belong to other places or samples"
        )
    if count:
        _log.info("checked %d samples: the label is among the kept entries of %.1f%%", len(chosen), 100 * own / count)
