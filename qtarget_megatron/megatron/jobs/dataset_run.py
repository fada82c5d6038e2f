"""A frozen model over the records of a data set, at any layout: reading, batching, schedule, progress and resuming.

Megatron's forward-only schedule runs over the samples in the order of the file; the first rank writes. What is made of
the hidden states, and what is written, is a Task's. Imports of Megatron wait until the CPU platform is active.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import default_collate

from qtarget_megatron import kernels
from qtarget_megatron.data import AUTO, Batch, EncodedSample, Records, encode_at, training_item
from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.megatron.jobs.open_model import OpenModel, open_model
from qtarget_megatron.megatron.model.output_context import OutputContext
from qtarget_megatron.megatron.runtime import cpu_platform, logs
from qtarget_megatron.megatron.runtime.progress import Progress
from qtarget_megatron.megatron.runtime.ranks import on_first_rank
from qtarget_megatron.megatron.weights.checkpoint_folder import checkpoint_directory
from qtarget_megatron.resumable import directory_digest

if TYPE_CHECKING:
    from qtarget_megatron.megatron.model.output_head import OutputHead

# Micro-batches between two writes, for each pipeline stage: enough to keep the stages busy.
_MICRO_BATCHES = 16
# Sequences are padded to a multiple of this, not to the full length.
_LENGTH_STEP = 64


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What runs over what, into what.

    data:            a file or folder of records, as for training.
    data_format:     form of its records, one of forms.FORMS, or auto.
    seq_length:      samples are cut to it as in training.
    load, ckpt_step: Megatron checkpoint with the model's weights, and its iteration; default the weights of hf_model.
    data_date:       YYYY-MM-DD, of chat templates that write it; default today on the first rank.
    """

    hf_model: Path
    data: Path
    out: Path
    seq_length: int
    data_format: str = AUTO
    load: Path | None = None
    ckpt_step: int | None = None
    data_date: str | None = None

    def check(self, arch: Architecture) -> None:
        """ValueError for a sequence length that the model does not have, and a date that is none."""
        if self.data_date is not None:
            try:
                datetime.date.fromisoformat(self.data_date)
            except ValueError:
                raise ValueError(f"--data-date: expected YYYY-MM-DD, got {self.data_date!r}") from None
        if not 0 < self.seq_length <= arch.max_sequence_length:
            raise ValueError(
                f"--seq-length: expected 1 to {arch.sequence_limit(f'model of {self.hf_model}')}, got {self.seq_length}"
            )

    def model_digests(self) -> dict[str, str]:
        """Digest of the model's files, and of the checkpoint with its weights if there is one, by flag."""
        digests = {"--hf-model": directory_digest(self.hf_model)}
        if self.load is not None:
            digests["--load"] = directory_digest(Path(checkpoint_directory(self.load, self.ckpt_step)))
        return digests


def precision_flags(words: Sequence[str]) -> list[str]:
    """Those of Megatron's flags that make a model compute in less than float32."""
    return sorted({"--bf16", "--fp16"}.intersection(words))


class Task(Protocol):
    """What a run makes of each micro-batch, and where it goes."""

    def compute(self, heads: list[OutputHead], labels: Tensor) -> Any:
        """On every rank of a last stage: from the output heads of the model, and of the reference if there is one, and
        labels [b, s], -100 where not supervised."""

    def split(self, samples: list[EncodedSample], result: Any) -> list[Any]:
        """On one rank of a last stage: compute()'s result, sample by sample; numpy and plain objects."""

    def open(self) -> int:
        """On the first rank, as the rest: how many samples are written already."""

    def append(self, first: int, results: list[Any]) -> None:
        """Write the results of the samples from first on; None for those without supervised tokens."""

    def finish(self) -> None:
        """All samples are written."""


class DatasetRun:
    """One run over the records of a file; what every rank knows of it.

    words: Megatron flags. A run that was ended goes on where it stopped, at any layout. Collectives: those of
    Megatron's initialisation, loading and schedule, the task's own, and object gathers, over all ranks once and over
    the last stages for each write.
    """

    def __init__(
        self,
        name: str,
        options: RunOptions,
        words: list[str],
        *,
        tokenizer: Any,
        file: Records,
        reference: Path | None = None,
        cpu: bool = False,
    ):
        """Open the model. name: of the command, in what is printed. ValueError for bad input."""
        on_cpu = cpu_platform.activate(requested=cpu)
        # Kernels that are not there are named before the weights are read.
        kernels.choose("auto", "cpu" if on_cpu else "cuda", torch.float32)
        model = open_model(
            options.hf_model,
            words if options.ckpt_step is None else [*words, "--ckpt-step", str(options.ckpt_step)],
            load=options.load,
            dtype=torch.float32,
            seq_length=options.seq_length,
            reference=reference,
            cpu=cpu,
        )
        _check_layout(options, model.args)
        from megatron.core import parallel_state

        from qtarget_megatron.megatron.training.datasets import pad_id

        self._name, self.options, self.model, self._tokenizer, self._file = name, options, model, tokenizer, file
        self._pad_id = pad_id(tokenizer)
        self._dp_rank = parallel_state.get_data_parallel_rank()
        self._dp_size = parallel_state.get_data_parallel_world_size()
        self._has_last_stage = any(chunk.post_process for chunk in model.chunks)
        # Padding takes no room of experts whose capacity is limited, on any stage.
        self._reads = self._has_last_stage or any(chunk.pre_process or chunk.routers for chunk in model.chunks)
        # One rank of each last stage has the results, the first rank of all writes them.
        self._is_source = self._has_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0
        sources = [None] * dist.get_world_size()
        dist.all_gather_object(sources, self._is_source)
        self._members = sorted({0, *(rank for rank, is_source in enumerate(sources) if is_source)})
        # One date on all ranks, whenever each of them started.
        self.data_date = on_first_rank(lambda: options.data_date or datetime.date.today().isoformat())
        # gloo: the results are objects on the CPU.
        self._group = dist.new_group(self._members, backend="gloo")

    def inspect(self, check_record: Callable[[int], None] | None = None) -> int:
        """Read every record once; the number of supervised tokens of all. Call before complete().

        check_record: raises ValueError for an index whose record the command refuses. Collective, like its errors.
        """
        from qtarget_megatron.megatron.training.inspection import inspect, log_notes

        log, path = logs.of(self._name), self.options.data
        found = inspect(
            f"{self._name}: reading {path}",
            self._file,
            self._tokenizer,
            self.options.seq_length,
            date=self._date(),
            check=None if check_record is None else lambda index, sample: check_record(index),
        )
        self._sizes = found.sizes
        log.info(
            "%s: %d samples, %d truncated to %d tokens, %d without a supervised token",
            *(path, len(self._file), found.sizes.truncated.sum(), self.options.seq_length),
            (found.sizes.supervised == 0).sum(),
        )
        log_notes(log, path, found.notes.lines(self._date()))
        return int(found.sizes.supervised.sum(dtype=np.int64))

    def _sample(self, index: int) -> EncodedSample:
        return encode_at(self._file, self._tokenizer, self.options.seq_length, index, date=self._date())

    def _date(self) -> datetime.date:
        return datetime.date.fromisoformat(self.data_date)

    def complete(self, task: Task) -> None:
        """Run over the samples that are not written yet, in order."""
        is_writer = dist.get_rank() == 0
        done = [task.open() if is_writer else None]
        dist.broadcast_object_list(done)
        written = done[0]
        progress = Progress(self._name, len(self._file), written)
        for indices in self._parts(written):
            found = self._gathered(self._results(task, indices))
            stop = int(indices[-1]) + 1
            if is_writer:
                task.append(written, [found.get(index) for index in range(written, stop)])
                progress.report(stop)
            written = stop
        if is_writer:
            task.append(written, [None] * (len(self._file) - written))
            task.finish()
            progress.report(len(self._file))
        dist.barrier()

    def _parts(self, start: int) -> Iterator[np.ndarray]:
        """Indices of the records to run, from start on, as many at a time as lie between two writes."""
        args = self.model.args
        indices = np.flatnonzero(self._sizes.supervised[start:]) + start
        size = _MICRO_BATCHES * args.pipeline_model_parallel_size * args.micro_batch_size * self._dp_size
        for begin in range(0, len(indices), size):
            yield indices[begin : begin + size]

    def _results(self, task: Task, indices: np.ndarray) -> dict[int, Any] | None:
        """Record -> result, of this data-parallel rank's share; on a source."""
        args = self.model.args
        size, stages = args.micro_batch_size, args.pipeline_model_parallel_size
        count = -(-len(indices) // (size * self._dp_size))
        if len(self.model.wrapped) > 1:
            # The interleaved schedule takes micro-batches in multiples of the stages.
            count = -(-count // stages) * stages
        length = self._padded_length(indices)
        shares = [indices[i * size :][:size] for i in range(self._dp_rank, count * self._dp_size, self._dp_size)]
        samples = [[self._sample(index) for index in share.tolist()] if self._reads else [] for share in shares]
        batches = [self._batch(of_share, length) if self._reads else None for of_share in samples]
        outputs = forward(self.model, batches, length, task.compute)
        if not self._is_source:
            return None
        found: dict[int, Any] = {}
        for share, of_share, output in zip(shares, samples, outputs, strict=True):
            found |= zip(share.tolist(), task.split(of_share, output), strict=True)
        return found

    def _padded_length(self, indices: np.ndarray) -> int:
        """Tokens that every sequence of these records is padded to; sequence parallelism needs a multiple of TP."""
        tp = self.model.args.tensor_model_parallel_size
        step = tp * -(-_LENGTH_STEP // tp)
        longest = int(self._sizes.tokens[indices].max()) - 1
        return min(-(-longest // step) * step, self.options.seq_length)

    def _batch(self, samples: list[EncodedSample], length: int) -> Batch:
        """A micro-batch of these samples; where they are too few, of samples without tokens as well."""
        empty = EncodedSample(np.empty(0, np.int64), np.empty(0, bool), truncated=False)
        samples = samples + [empty] * (self.model.args.micro_batch_size - len(samples))
        batch = Batch.of(default_collate([training_item(sample, length, self._pad_id) for sample in samples]))
        return batch.map(lambda tensor: tensor.cuda(non_blocking=True))

    def _gathered(self, found: dict[int, Any] | None) -> dict[int, Any]:
        """The results of all data-parallel ranks, on the first rank; nothing elsewhere."""
        rank = dist.get_rank()
        if rank not in self._members:
            return {}
        everyone: list[Any] | None = [None] * len(self._members) if rank == 0 else None
        dist.gather_object(found, everyone, dst=0, group=self._group)
        return {index: result for part in everyone or () for index, result in (part or {}).items()}


def _check_layout(options: RunOptions, args: argparse.Namespace) -> None:
    if args.context_parallel_size > 1:
        raise ValueError("samples are run without context parallelism: drop --context-parallel-size")
    if args.seq_length != options.seq_length:
        raise ValueError(
            f"--sequence-parallel needs --seq-length divisible by {args.tensor_model_parallel_size}, got "
            f"{options.seq_length}"
        )


@torch.no_grad()
def forward(
    model: OpenModel,
    batches: list[Batch | None],
    length: int,
    compute: Callable[[list[OutputHead], Tensor], Any],
) -> list[Any]:
    """What compute makes of each micro-batch, on ranks of the last stage; nothing on other stages.

    batches: of sequences of this length; None on stages that need none. Runs Megatron's forward-only schedule for the
    layout.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_attr_wrapped_model

    results: list[Any] = []

    def forward_step(data_iterator, chunk):
        batch: Batch | None = next(data_iterator)
        extra: dict[str, Any] = {"padding_mask": batch.padding} if get_attr_wrapped_model(chunk, "routers") else {}
        if get_attr_wrapped_model(chunk, "post_process"):
            context = _Context(compute, results)
            extra |= dict(labels=batch.labels, output_processor=_process, output_processor_context=context)
        # No loss function: the schedule keeps the last stage's output, which says nothing.
        tokens, position_ids = (None, None) if batch is None else (batch.tokens, batch.position_ids)
        return chunk(tokens, position_ids, None, **extra), None

    for chunk in model.wrapped:
        chunk.eval()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in model.wrapped],
        model=model.wrapped,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=model.args.micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return results


@dataclass
class _Context(OutputContext):
    """Travels to the output processor; StackedGPTModel puts the reference's output head in."""

    compute: Callable[[list[OutputHead], Tensor], Any]
    results: list[Any]
    teacher: OutputHead | None = None


def _process(*, hidden_states, output_layer, output_weight, labels, context: _Context, **unused) -> Tensor:
    """Output processor: hidden states to a result, which does not go through Megatron."""
    from qtarget_megatron.megatron.model.output_head import OutputHead

    heads = [OutputHead(hidden_states, output_layer, output_weight), context.teacher]
    context.results.append(context.compute([head for head in heads if head is not None], labels))
    return hidden_states.new_zeros(())
