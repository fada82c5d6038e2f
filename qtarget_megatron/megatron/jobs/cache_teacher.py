"""Writing a teacher cache: the most likely tokens at every supervised token of a data set, at any layout."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from qtarget_megatron.collectives import gather_sequence
from qtarget_megatron.data import IGNORE_INDEX, EncodedSample, Records, compare_tokenizers, open_records, writes_date
from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.loss.linear_top_k import TopTokens, linear_top_k
from qtarget_megatron.megatron.jobs.dataset_run import DatasetRun, RunOptions, precision_flags
from qtarget_megatron.megatron.runtime import cpu_platform, launch, logs
from qtarget_megatron.megatron.runtime.logs import is_first_rank
from qtarget_megatron.megatron.runtime.prepare import load_model_tokenizer
from qtarget_megatron.megatron.runtime.ranks import on_first_rank
from qtarget_megatron.resumable import check_space
from qtarget_megatron.teacher_cache import (
    CacheHeader,
    CacheWriter,
    SampleEntries,
    context_digests,
    template_digest,
    tokenizer_digest,
)
from qtarget_megatron.teacher_cache.index import INDEX_FILE, read_index

if TYPE_CHECKING:
    from qtarget_megatron.megatron.model.output_head import OutputHead

_log = logs.of("cache-teacher")


@dataclass(frozen=True, kw_only=True)
class CacheOptions(RunOptions):
    """What is cached, and how much of it.

    hf_model: Hugging Face directory of the teacher.
    out:      the cache's directory.
    k:        entries of each token, fewer where these reach the mass top_p.
    dtype:    of the log-probabilities, float16 or float32.
    student:  Hugging Face directory of the student, where its chat template or the size of its vocabulary is not the
              teacher's.
    """

    k: int
    top_p: float | None = None
    dtype: str = "float16"
    student: Path | None = None


def cache_teacher(options: CacheOptions, words: list[str], *, cpu: bool = False) -> None:
    """Write a teacher cache; call it on every rank. Nothing is done where this very cache is complete already.

    words: Megatron flags, layout and --micro-batch-size above all. The teacher computes in float32, unless words hold
    --bf16 or --fp16. A run that was ended goes on where it stopped, at any layout. ValueError for bad input, before
    anything is written, and for a log p that is NaN. Collectives: those of DatasetRun and of linear_top_k, and under
    sequence parallelism an all-gather of the hidden states.
    """
    launch.check_version()
    launch.check_launcher()
    cpu_platform.activate(requested=cpu)
    arch = Architecture.from_hf(options.hf_model)
    tokenizer, vocab_size = load_model_tokenizer(options.hf_model, arch), arch.vocab_size
    if options.student is not None:
        student = Architecture.from_hf(options.student)
        teacher_tokenizer, tokenizer = tokenizer, load_model_tokenizer(options.student, student)
        compare_tokenizers(tokenizer, teacher_tokenizer)
        vocab_size = min(vocab_size, student.vocab_size)
    file = open_records(options.data, options.data_format)
    options.check(arch)
    digests = options.model_digests()
    header = CacheHeader(
        data=file.digest,
        num_samples=len(file),
        tokenizer=tokenizer_digest(tokenizer),
        chat_template=template_digest(tokenizer),
        teacher=options.hf_model.resolve().name,
        teacher_files=digests["--hf-model"],
        teacher_checkpoint=digests.get("--load"),
        precision=" ".join(precision_flags(words)) or "float32",
        vocab_size=vocab_size,
        seq_length=options.seq_length,
        k=options.k,
        top_p=options.top_p,
        dtype=options.dtype,
        date=_date(options) if writes_date(tokenizer) else None,
    )
    writer = CacheWriter(options.out, header, tokenizer)
    if writer.check():
        _log.info("%s is complete already, made from the same inputs", options.out)
        return
    if is_first_rank():
        writer.reserve()

    options = replace(options, data_date=header.date)
    run = DatasetRun("cache-teacher", options, words, tokenizer=tokenizer, file=file, cpu=cpu)
    num_tokens = run.inspect()
    most = "at most " if options.top_p is not None else ""
    megabytes = f"{num_tokens * header.bytes_per_token / 1e6:,.1f}"
    _log.info("%d supervised tokens of %s%d bytes: %s%s MB", num_tokens, most, header.bytes_per_token, most, megabytes)

    def check_room() -> str | None:
        written = sum(path.stat().st_size for path in options.out.iterdir())
        least, most = (num_tokens * size - written for size in (header.least_bytes_per_token, header.bytes_per_token))
        return check_space(options.out, least, most=most)

    if warning := on_first_rank(check_room):
        _log.warning(warning)
    run.complete(_Caching(options, header, file, writer))


def _date(options: CacheOptions) -> str:
    """The date that is asked for, that of a cache that was begun, or today."""
    begun = None
    if options.data_date is None and (options.out / INDEX_FILE).exists():
        begun = read_index(options.out).header.date
    return options.data_date or begun or datetime.date.today().isoformat()


@dataclass(frozen=True)
class _Caching:
    """The Task of a run: SampleEntries of each sample, into the cache."""

    options: CacheOptions
    header: CacheHeader
    file: Records
    writer: CacheWriter

    def compute(self, heads: list[OutputHead], labels: Tensor) -> TopTokens:
        """The largest probabilities at the supervised tokens, sample by sample; on the CPU."""
        (head,) = heads
        hidden = head.hidden
        if head.layer.sequence_parallel:
            hidden = gather_sequence(hidden, head.layer.tp_group)
        row, position = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
        found = linear_top_k(
            hidden[position, row],
            head.matrix(),
            self.header.k,
            top_p=self.header.top_p,
            group=head.layer.tp_group,
            vocab_size=self.header.vocab_size,
        )
        # Few bytes leave the device, as many as are written.
        return TopTokens(found.ids.int().cpu(), found.log_p.float().cpu(), found.counts.cpu(), found.tail.float().cpu())

    def split(self, samples: list[EncodedSample], result: TopTokens) -> list[SampleEntries]:
        ids, log_p, counts, tail = (values.numpy() for values in (result.ids, result.log_p, result.counts, result.tail))
        entries, begin = [], 0
        for sample in samples:
            context = context_digests(sample.input_ids, sample.supervised)
            rows = slice(begin, begin + len(context))
            entries.append(SampleEntries(ids[rows], log_p[rows], counts[rows], tail[rows], context))
            begin = rows.stop
        return entries

    def open(self) -> int:
        if done := self.writer.open():
            _log.info("going on behind the %d samples that are cached already", done)
        return done

    def append(self, first: int, results: list[SampleEntries | None]) -> None:
        for index, sample in enumerate(results, start=first):
            if sample is not None and not (np.isfinite(sample.tail).all() and np.isfinite(sample.log_p[:, 0]).all()):
                bad = int(np.flatnonzero(~(np.isfinite(sample.tail) & np.isfinite(sample.log_p[:, 0])))[0])
                raise ValueError(
                    f"{self.file.where(index)}: the logits of supervised token {bad} are not finite under "
                    f"--teacher-hf {self.options.hf_model}: check its weights (qtarget check), or the precision"
                )
        self.writer.append(results)

    def finish(self) -> None:
        self.writer.finish()
