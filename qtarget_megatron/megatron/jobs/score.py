"""Scoring a data set: log p of every supervised token under a frozen model, and importance weights, at any layout."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qtarget_megatron import objectives
from qtarget_megatron.data import IGNORE_INDEX, EncodedSample, Records, open_records, writes_date
from qtarget_megatron.data.side_inputs import check_weight_options, importance_weight
from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.loss.linear_cross_entropy import qtarget_linear_cross_entropy
from qtarget_megatron.megatron.jobs.dataset_run import DatasetRun, RunOptions, precision_flags
from qtarget_megatron.megatron.runtime import cpu_platform, launch, logs
from qtarget_megatron.megatron.runtime.logs import is_first_rank
from qtarget_megatron.megatron.runtime.prepare import load_model_tokenizer
from qtarget_megatron.megatron.runtime.ranks import on_first_rank
from qtarget_megatron.resumable import ResumableLines, check_space, directory_digest

if TYPE_CHECKING:
    from qtarget_megatron.megatron.model.output_head import OutputHead

_log = logs.of("score")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(RunOptions):
    """What is scored, and into what.

    out: the records of data with the fields old_log_prob and, with a reference, weight.
    reference: Hugging Face directory of the model that weights compare with.
    temperature, max_weight: of side_inputs.importance_weight.
    overwrite: replace out, and fields of these names in the records.
    """

    reference: Path | None = None
    temperature: float = 1.0
    max_weight: float = 16.0
    overwrite: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that are added to a record."""
        return ("old_log_prob", "weight") if self.reference is not None else ("old_log_prob",)

    @property
    def compares_with_itself(self) -> bool:
        """Whether the reference's weights are hf_model's very files."""
        if self.reference is None or self.load is not None:
            return False
        files = [{path.name: path for path in model.glob("*.safetensors")} for model in (self.hf_model, self.reference)]
        one, other = files
        return bool(one) and one.keys() == other.keys() and all(one[name].samefile(other[name]) for name in one)

    def check(self, arch: Architecture) -> None:
        """ValueError for options that cannot be."""
        check_weight_options(self.temperature, self.max_weight)
        super().check(arch)
        if self.reference is not None:
            Architecture.from_hf(self.reference)


def score(options: ScoreOptions, words: list[str], *, cpu: bool = False) -> int:
    """Score a data set; call it on every rank. Returns the number of records.

    words: Megatron flags, layout and --micro-batch-size above all. The models compute in float32, unless words hold
    --bf16 or --fp16. A run that was ended goes on where it stopped, at any layout. ValueError for bad input, before
    anything is written, and for a log p that is not finite. Collectives: those of DatasetRun, and the loss's
    all-gather.
    """
    launch.check_version()
    launch.check_launcher()
    cpu_platform.activate(requested=cpu)
    arch = Architecture.from_hf(options.hf_model)
    tokenizer = load_model_tokenizer(options.hf_model, arch)
    file = open_records(options.data, options.data_format)
    options.check(arch)
    if writes_date(tokenizer):
        options = replace(options, data_date=options.data_date or _date_begun(options))
    lines = ResumableLines(options.out, _made_from(options, file, words))
    lines.check(overwrite=options.overwrite, inputs=[options.data])
    if options.data.is_dir() and options.data.samefile(options.out.absolute().parent):
        raise ValueError(f"--out {options.out} would be a file of --data {options.data}: choose another folder")
    if is_first_rank():
        lines.reserve()

    if options.compares_with_itself:
        _log.info(
            "--reference-hf %s is the model of --hf-model: every weight will be exactly 1, with which weighted-sft "
            "trains as sft does",
            options.reference,
        )
    run = DatasetRun("score", options, words, tokenizer=tokenizer, file=file, reference=options.reference, cpu=cpu)
    num_tokens = run.inspect(partial(_check_record, options, file))
    if warning := on_first_rank(lambda: check_room(options, file, num_tokens, lines.num_bytes())):
        _log.warning(warning)
    run.complete(_Scoring(options, arch.vocab_size, file, lines))
    return len(file)


def _date_begun(options: ScoreOptions) -> str:
    """That of the lines that were begun, or today."""
    begun = ResumableLines(options.out, {}).begun().get("--data-date")
    return begun if isinstance(begun, str) else datetime.date.today().isoformat()


def _made_from(options: ScoreOptions, file: Records, words: list[str]) -> dict[str, Any]:
    """What the result depends on, by the flag that says it; not the layout."""
    made_from: dict[str, Any] = {
        "--data": file.digest,
        "--data-format": file.form,
        "--seq-length": options.seq_length,
        "precision (--bf16, --fp16)": precision_flags(words),
        **options.model_digests(),
    }
    if options.data_date is not None:
        made_from["--data-date"] = options.data_date
    if options.reference is not None:
        made_from |= {
            "--reference-hf": directory_digest(options.reference),
            "--temp": options.temperature,
            "--max-weight": options.max_weight,
        }
    return made_from


# Characters of a number with the comma before it, and of the fields' names, brackets and the weight.
_NUMBER, _FIELDS = (5, 18), (20, 64)


def check_room(options: ScoreOptions, file: Records, num_tokens: int, written: int) -> str | None:
    """A warning where the disk may not hold the scored records. ValueError where it surely does not.

    num_tokens: supervised ones of all records. written: bytes that are there already.
    """
    least, most = (
        num_tokens * number + len(file) * fields - written for number, fields in zip(_NUMBER, _FIELDS, strict=True)
    )
    # A record whose fields are replaced is written anew: it may lose long ones, or have its text escaped.
    least += 0 if options.overwrite else file.num_bytes
    most += file.num_bytes * (3 if options.overwrite else 1)
    return check_space(options.out.absolute().parent, least, most=most)


def _check_record(options: ScoreOptions, file: Records, index: int) -> None:
    if options.overwrite:
        return
    record = file.raw(index)
    if present := [f'"{name}"' for name in options.fields if name in record]:
        raise ValueError(
            f"{file.where(index)}: the record has {' and '.join(present)} already: give --overwrite to replace it"
        )


@dataclass(frozen=True)
class _Scoring:
    """The Task of a run: log p of the labels, float64 [models, supervised tokens] of each sample, into the records."""

    options: ScoreOptions
    vocab_size: int
    file: Records
    lines: ResumableLines

    def compute(self, heads: list[OutputHead], labels: Tensor) -> Tensor:
        """[models, b, s], 0 without a label."""
        return torch.stack([self._log_p(head, labels) for head in heads])

    def _log_p(self, head: OutputHead, labels: Tensor) -> Tensor:
        _, statistics = qtarget_linear_cross_entropy(
            head.hidden,
            head.matrix(),
            labels.t().contiguous(),
            objective=objectives.sft(),
            group=head.layer.tp_group,
            vocab_size=self.vocab_size,
            ignore_index=IGNORE_INDEX,
            sequence_parallel=head.layer.sequence_parallel,
            return_statistics=True,
        )
        return statistics.log_p.t()

    def split(self, samples: list[EncodedSample], result: Tensor) -> list[np.ndarray]:
        log_p = result.cpu().numpy()
        # A label lies one place before its token.
        return [log_p[:, row, np.flatnonzero(sample.supervised) - 1] for row, sample in enumerate(samples)]

    def open(self) -> int:
        if done := self.lines.open():
            _log.info("going on behind the %d samples that are scored already", done)
        return done

    def append(self, first: int, results: list[np.ndarray | None]) -> None:
        self.lines.append(self._line(index, log_p) for index, log_p in enumerate(results, start=first))

    def finish(self) -> None:
        self.lines.finish()

    def _line(self, index: int, log_p: np.ndarray | None) -> str:
        """The record's line with its new fields."""
        fields: dict[str, Any] = {"old_log_prob": []}
        if log_p is not None:
            self._check_finite(index, log_p)
            fields["old_log_prob"] = [_rounded(value) for value in log_p[0].tolist()]
        if log_p is not None and self.options.reference is not None:
            weight = importance_weight(
                *log_p.tolist(), temperature=self.options.temperature, maximum=self.options.max_weight
            )
            fields["weight"] = _rounded(weight)
        return with_fields(self.file.text(index), self.file.raw(index), self.options.fields, fields)

    def _check_finite(self, index: int, log_p: np.ndarray) -> None:
        models = [f"--hf-model {self.options.hf_model}", f"--reference-hf {self.options.reference}"]
        for name, values in zip(models, log_p, strict=False):
            if (bad := np.flatnonzero(~np.isfinite(values))).size:
                raise ValueError(
                    f"{self.file.where(index)}: log p of supervised token {bad[0]} is {values[bad[0]]} under {name}: "
                    "expected a finite number; check the model's weights (qtarget check), or the precision"
                )


def with_fields(text: str, record: dict[str, Any], names: tuple[str, ...], fields: dict[str, Any]) -> str:
    """A record's line with other fields; text, its line, stays as it is unless record has a field of these names."""
    if any(name in record for name in names):
        text = json.dumps({key: value for key, value in record.items() if key not in names})
    return f"{text.strip()[:-1].rstrip()}, {json.dumps(fields)[1:-1]}}}"


def _rounded(value: float) -> float:
    """Nine significant digits restore every float32."""
    return float(f"{value:.9g}")
