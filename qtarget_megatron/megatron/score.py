"""Scoring a data set: log p of every supervised token under a frozen model, and importance weights, at any layout.

Megatron's forward-only schedule runs over the samples in the order of the file; the first rank writes. Imports of
Megatron wait until the CPU platform is active.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import default_collate

from qtarget_megatron import objectives
from qtarget_megatron.checkpoint import Architecture
from qtarget_megatron.data import IGNORE_INDEX, EncodedSample, JsonlFile, encode_at, training_item
from qtarget_megatron.linear_loss import qtarget_linear_cross_entropy
from qtarget_megatron.megatron import cpu_platform, launch
from qtarget_megatron.megatron.commands import print_once
from qtarget_megatron.megatron.convert import OpenModel, checkpoint_directory, load_model_tokenizer, open_model
from qtarget_megatron.resumable import ResumableLines, directory_digest, file_digest
from qtarget_megatron.side_inputs import check_weight_options, importance_weight

if TYPE_CHECKING:
    from qtarget_megatron.megatron.teacher import OutputHead

# Micro-batches between two writes, for each pipeline stage: enough to keep the stages busy.
_MICRO_BATCHES = 16
_PROGRESS_SECONDS = 5.0
# Sequences are padded to a multiple of this, not to the full length.
_LENGTH_STEP = 64


@dataclass(frozen=True)
class ScoreOptions:
    """What is scored, and into what.

    data: JSONL as for training. out: the same records with the fields old_log_prob and, with a reference, weight.
    seq_length: samples are cut to it as in training. load, ckpt_step: Megatron checkpoint with the model's weights,
    and its iteration; default the weights of hf_model. reference: Hugging Face directory of the model that weights
    compare with. temperature, max_weight: of side_inputs.importance_weight. overwrite: replace out, and fields of
    these names in the records.
    """

    hf_model: Path
    data: Path
    out: Path
    seq_length: int
    load: Path | None = None
    ckpt_step: int | None = None
    reference: Path | None = None
    temperature: float = 1.0
    max_weight: float = 16.0
    overwrite: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that are added to a record."""
        return ("old_log_prob", "weight") if self.reference is not None else ("old_log_prob",)


def score(options: ScoreOptions, words: list[str], *, cpu: bool = False) -> int:
    """Score a data set; call it on every rank. Returns the number of records.

    words: Megatron flags, layout and --micro-batch-size above all. The models compute in float32, unless words hold
    --bf16 or --fp16. A run that was ended goes on where it stopped, at any layout. ValueError for bad input, before
    anything is written, and for a log p that is not finite. Collectives: those of Megatron's initialisation, loading
    and schedule, the loss's all-gather, and object gathers, over all ranks once and over the last stages for each
    write.
    """
    launch.check_version()
    cpu_platform.activate(requested=cpu)
    arch = Architecture.from_hf(options.hf_model)
    tokenizer = load_model_tokenizer(options.hf_model, arch)
    file = JsonlFile(options.data)
    _check(options, arch)
    lines = ResumableLines(options.out, _made_from(options, words))
    lines.check(overwrite=options.overwrite, inputs=[options.data])

    model = open_model(
        options.hf_model,
        _with_step(options, words),
        load=options.load,
        dtype=torch.float32,
        seq_length=options.seq_length,
        reference=options.reference,
        cpu=cpu,
    )
    _check_length(options, model.args)
    _Run(options, model, tokenizer, file, lines).complete()
    dist.barrier()
    return len(file)


def _check(options: ScoreOptions, arch: Architecture) -> None:
    check_weight_options(options.temperature, options.max_weight)
    limit = min(arch.max_position_embeddings, arch.sliding_window or arch.max_position_embeddings)
    if not 0 < options.seq_length <= limit:
        raise ValueError(
            f"--seq-length: expected 1 to {limit}, what the model of {options.hf_model} can attend to, got "
            f"{options.seq_length}"
        )
    if options.reference is not None:
        Architecture.from_hf(options.reference)


def _check_length(options: ScoreOptions, args: argparse.Namespace) -> None:
    if args.context_parallel_size > 1:
        raise ValueError("samples are scored without context parallelism: drop --context-parallel-size")
    if args.seq_length != options.seq_length:
        raise ValueError(
            f"--sequence-parallel needs --seq-length divisible by {args.tensor_model_parallel_size}, got "
            f"{options.seq_length}"
        )


def _with_step(options: ScoreOptions, words: list[str]) -> list[str]:
    return words if options.ckpt_step is None else [*words, "--ckpt-step", str(options.ckpt_step)]


def _made_from(options: ScoreOptions, words: list[str]) -> dict[str, Any]:
    """What the result depends on, by the flag that says it; not the layout."""
    made_from: dict[str, Any] = {
        "--data": file_digest(options.data),
        "--hf-model": directory_digest(options.hf_model),
        "--seq-length": options.seq_length,
        "precision (--bf16, --fp16)": sorted({"--bf16", "--fp16"}.intersection(words)),
    }
    if options.load is not None:
        saved = argparse.Namespace(load=str(options.load), ckpt_step=options.ckpt_step)
        made_from["--load"] = directory_digest(Path(checkpoint_directory(saved)))
    if options.reference is not None:
        made_from |= {
            "--reference-hf": directory_digest(options.reference),
            "--temp": options.temperature,
            "--max-weight": options.max_weight,
        }
    return made_from


class _Run:
    """One run over the records; what every rank knows of it."""

    def __init__(self, options: ScoreOptions, model: OpenModel, tokenizer, file: JsonlFile, lines: ResumableLines):
        from megatron.core import parallel_state

        from qtarget_megatron.megatron.datasets import for_each_record, pad_id

        self.options, self.model, self.tokenizer, self.file, self.lines = options, model, tokenizer, file, lines
        self._pad_id = pad_id(tokenizer)
        self._dp_rank = parallel_state.get_data_parallel_rank()
        self._dp_size = parallel_state.get_data_parallel_world_size()
        self._has_last_stage = any(chunk.post_process for chunk in model.chunks)
        self._reads = self._has_last_stage or any(chunk.pre_process for chunk in model.chunks)
        # One rank of each last stage has the results, the first rank of all writes them.
        self._is_source = self._has_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0
        sources = [None] * dist.get_world_size()
        dist.all_gather_object(sources, self._is_source)
        self._members = sorted({0, *(rank for rank, is_source in enumerate(sources) if is_source)})
        # gloo: the results are objects on the CPU.
        self._group = dist.new_group(self._members, backend="gloo")
        self._lengths, self._counts, truncated = for_each_record(file, self._inspect).T
        skipped = int((self._counts == 0).sum())
        print_once(
            f"score: {options.data}: {len(file)} samples, {int(truncated.sum())} truncated to {options.seq_length} "
            f"tokens, {skipped} without a supervised token"
        )

    def _inspect(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n, 3]: tokens of each record within seq_length + 1, how many are supervised, whether it was cut."""
        rows = np.zeros((len(indices), 3), dtype=np.int64)
        for row, index in zip(rows, indices.tolist(), strict=True):
            sample = self._sample(index)
            row[:] = len(sample.input_ids), sample.supervised.sum(), sample.truncated
            present = [f'"{name}"' for name in self.options.fields if name in self.file.record(index)]
            if present and not self.options.overwrite:
                raise ValueError(
                    f"{self.file.where(index)}: the record has {' and '.join(present)} already: give --overwrite to "
                    "replace it"
                )
        return rows

    def _sample(self, index: int) -> EncodedSample:
        return encode_at(self.file, self.tokenizer, self.options.seq_length, index)

    def complete(self) -> None:
        """Score what is not scored yet; the first rank gives the file its name at the end."""
        is_writer = dist.get_rank() == 0
        done = [self.lines.open() if is_writer else None]
        dist.broadcast_object_list(done)
        written = done[0]
        progress = _Progress(len(self.file), written)
        for indices in self._parts(written):
            found = self._gathered(self._log_probabilities(indices))
            stop = int(indices[-1]) + 1
            if is_writer:
                self.lines.append(self._line(index, found.get(index)) for index in range(written, stop))
                progress.report(stop)
            written = stop
        if is_writer:
            self.lines.append(self._line(index, None) for index in range(written, len(self.file)))
            self.lines.finish()
            progress.report(len(self.file))

    def _parts(self, start: int) -> Iterator[np.ndarray]:
        """Indices of the records to run, from start on, as many at a time as lie between two writes."""
        args = self.model.args
        indices = np.flatnonzero(self._counts[start:]) + start
        size = _MICRO_BATCHES * args.pipeline_model_parallel_size * args.micro_batch_size * self._dp_size
        for begin in range(0, len(indices), size):
            yield indices[begin : begin + size]

    def _log_probabilities(self, indices: np.ndarray) -> dict[int, np.ndarray] | None:
        """Record -> log p, float64 [models, supervised tokens], of this data-parallel rank's share; on a source."""
        args = self.model.args
        size, stages = args.micro_batch_size, args.pipeline_model_parallel_size
        count = -(-len(indices) // (size * self._dp_size))
        if len(self.model.wrapped) > 1:
            # The interleaved schedule takes micro-batches in multiples of the stages.
            count = -(-count // stages) * stages
        length = self._padded_length(indices)
        shares = [indices[i * size :][:size] for i in range(self._dp_rank, count * self._dp_size, self._dp_size)]
        batches = [self._batch(share, length) if self._reads else None for share in shares]
        outputs = forward(self.model, batches, length)
        if not self._is_source:
            return None
        found = {}
        for share, batch, output in zip(shares, batches, outputs, strict=True):
            supervised, log_p = (batch["labels"] != IGNORE_INDEX).cpu(), output.cpu()
            for row, index in enumerate(share.tolist()):
                found[index] = log_p[:, row, supervised[row]].numpy()
        return found

    def _padded_length(self, indices: np.ndarray) -> int:
        """Tokens that every sequence of these records is padded to; sequence parallelism needs a multiple of TP."""
        tp = self.model.args.tensor_model_parallel_size
        step = tp * -(-_LENGTH_STEP // tp)
        longest = int(self._lengths[indices].max()) - 1
        return min(-(-longest // step) * step, self.options.seq_length)

    def _batch(self, indices: np.ndarray, length: int) -> dict[str, Tensor]:
        """A micro-batch of these records; where they are too few, of samples without tokens as well."""
        samples = [self._sample(index) for index in indices.tolist()]
        empty = EncodedSample(np.empty(0, np.int64), np.empty(0, bool), truncated=False)
        samples += [empty] * (self.model.args.micro_batch_size - len(samples))
        batch = default_collate([training_item(sample, length, self._pad_id) for sample in samples])
        return {name: tensor.cuda(non_blocking=True) for name, tensor in batch.items()}

    def _gathered(self, found: dict[int, np.ndarray] | None) -> dict[int, np.ndarray]:
        """The results of all data-parallel ranks, on the first rank; nothing elsewhere."""
        rank = dist.get_rank()
        if rank not in self._members:
            return {}
        everyone = [None] * len(self._members) if rank == 0 else None
        dist.gather_object(found, everyone, dst=0, group=self._group)
        return {index: log_p for part in everyone or () for index, log_p in (part or {}).items()}

    def _line(self, index: int, log_p: np.ndarray | None) -> str:
        """The record's line with its new fields; log_p [models, n], or None without supervised tokens."""
        fields: dict[str, Any] = {"old_log_prob": []}
        if log_p is not None:
            self._check_finite(index, log_p)
            fields["old_log_prob"] = [_rounded(value) for value in log_p[0].tolist()]
        if log_p is not None and self.options.reference is not None:
            weight = importance_weight(
                *log_p.tolist(), temperature=self.options.temperature, maximum=self.options.max_weight
            )
            fields["weight"] = _rounded(weight)
        return with_fields(self.file.text(index), self.file.record(index), self.options.fields, fields)

    def _check_finite(self, index: int, log_p: np.ndarray) -> None:
        models = [f"--hf-model {self.options.hf_model}", f"--reference-hf {self.options.reference}"]
        for name, values in zip(models, log_p, strict=False):
            if (bad := np.flatnonzero(~np.isfinite(values))).size:
                raise ValueError(
                    f"{self.file.where(index)}: log p of supervised token {bad[0]} is {values[bad[0]]} under {name}: "
                    "expected a finite number; check the model's weights (convert_hf.py check), or the precision"
                )


class _Progress:
    """Prints how far a run is, every few seconds."""

    def __init__(self, total: int, done: int):
        self._total, self._first, self._printed = total, done, None
        self._start, self._last = time.monotonic(), -_PROGRESS_SECONDS
        if done:
            print_once(f"score: going on behind the {done} samples that are scored already")

    def report(self, done: int) -> None:
        now = time.monotonic()
        if self._printed == self._total or (now - self._last < _PROGRESS_SECONDS and done < self._total):
            return
        self._printed = done
        self._last = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        left = timedelta(seconds=round((self._total - done) / rate)) if rate else "unknown time"
        print_once(f"score: {done}/{self._total} samples, {rate:.3g} samples/s, {left} left")


def with_fields(text: str, record: dict[str, Any], names: tuple[str, ...], fields: dict[str, Any]) -> str:
    """A record's line with other fields; text, its line, stays as it is unless record has a field of these names."""
    if any(name in record for name in names):
        text = json.dumps({key: value for key, value in record.items() if key not in names})
    return f"{text.strip()[:-1].rstrip()}, {json.dumps(fields)[1:-1]}}}"


def _rounded(value: float) -> float:
    """Nine significant digits restore every float32."""
    return float(f"{value:.9g}")


@torch.no_grad()
def forward(model: OpenModel, batches: list[dict[str, Tensor] | None], length: int) -> list[Tensor]:
    """log p of the labels, float64 [models, b, s] for each micro-batch (0 without a label), on the last stage.

    Nothing on other stages. models: the model, then the reference if there is one. batches: tokens, labels and
    position_ids, all [b, length]; None on stages between the first and the last. Runs Megatron's forward-only
    schedule for the layout.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_attr_wrapped_model

    def forward_step(data_iterator, chunk):
        batch = next(data_iterator) or dict.fromkeys(("tokens", "position_ids", "labels"))
        extra = {}
        if get_attr_wrapped_model(chunk, "post_process"):
            context = _Context(model.arch.vocab_size)
            extra = dict(labels=batch["labels"], output_processor=_log_p, output_processor_context=context)
        # Without a loss function the schedule keeps the last stage's output.
        return chunk(batch["tokens"], batch["position_ids"], None, **extra), None

    for chunk in model.wrapped:
        chunk.eval()
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in model.wrapped],
        model=model.wrapped,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=model.args.micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )


@dataclass
class _Context:
    """Travels to the output processor; StackedGPTModel puts the reference's output head in."""

    vocab_size: int
    teacher: OutputHead | None = None


def _log_p(*, hidden_states, output_layer, output_weight, labels, context: _Context, **unused) -> Tensor:
    """Output processor: hidden states to log p of the labels [b, s], float64 [models, b, s]."""
    from qtarget_megatron.megatron.teacher import OutputHead

    def of(head: OutputHead) -> Tensor:
        _, statistics = qtarget_linear_cross_entropy(
            head.hidden,
            head.matrix(),
            labels.t().contiguous(),
            objective=objectives.sft(),
            group=output_layer.tp_group,
            vocab_size=context.vocab_size,
            ignore_index=IGNORE_INDEX,
            sequence_parallel=output_layer.sequence_parallel,
            return_statistics=True,
        )
        return statistics.log_p.t()

    heads = [OutputHead(hidden_states, output_layer, output_weight), context.teacher]
    return torch.stack([of(head) for head in heads if head is not None])
