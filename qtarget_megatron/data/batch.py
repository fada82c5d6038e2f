"""A micro-batch by its parts, whatever the loader calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qtarget_megatron.data.side_inputs import input_name


@dataclass(frozen=True)
class CachedEntries:
    """What a teacher cache keeps of the tokens of a micro-batch, aligned with its labels.

    ids:        int64 [b, s, k], -1 for an entry that is not used.
    log_p:      float32 [b, s, k], in nats.
    tail:       float32 [b, s], the mass of all other tokens.
    reading_ms: float32 [b], milliseconds that reading them took.
    """

    ids: Tensor
    log_p: Tensor
    tail: Tensor
    reading_ms: Tensor


@dataclass(frozen=True)
class Batch:
    """What a model and its loss read of b samples of s tokens; see training_item.

    tokens, labels, position_ids: int64 [b, s].
    padding:        bool [b, s], True where there is no token.
    sample:         int64 [b], records in the data, counted from 0; of packed rows [b, s], the record of each token,
                    -1 where there is none. None where nobody asks.
    packed:         whether several samples stand in a row, each of which begins with position 0.
    inputs:         side inputs of the objective by their own names, float64 [b, s].
    teacher:        a cached second model.
    segments:       int64 [b, s], the place of each token's sample in the micro-batch, counted from 0; what is left of a
                    packed row counts too. None where nobody asks.
    num_segments:   how many there may be.
    held_out:       int64 [b, s], of which held-out set a token is, where there are several.
    num_supervised: number of supervised tokens, where the host knows it without waiting for a GPU; then of those that
                    are a token further on, and so on, for as many heads as a model has.
    filled:         tokens of samples and tokens in all, on the host, of whole rows under context parallelism.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    padding: Tensor
    sample: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: CachedEntries | None = None
    segments: Tensor | None = None
    num_segments: int = 0
    held_out: Tensor | None = None
    num_supervised: tuple[int, ...] | None = None
    packed: bool = False
    filled: tuple[int, int] | None = None

    @property
    def records(self) -> Tensor | None:
        """int64 [n], the records that are in the batch."""
        if self.sample is None:
            return None
        found: Tensor = torch.unique(self.sample[self.sample >= 0])
        return found

    @classmethod
    def of(cls, collated: Mapping[str, Tensor]) -> Batch:
        """The parts of a loader's flat dict: of training_item, and of TaughtDataset where a teacher is cached."""
        inputs = {name: value for key, value in collated.items() if (name := input_name(key)) is not None}
        teacher = None
        if "teacher_ids" in collated:
            teacher = CachedEntries(
                ids=collated["teacher_ids"],
                log_p=collated["teacher_log_p"],
                tail=collated["teacher_tail"],
                reading_ms=collated["teacher_ms"],
            )
        return cls(
            tokens=collated["tokens"],
            labels=collated["labels"],
            position_ids=collated["position_ids"],
            padding=collated["padding"],
            sample=collated.get("sample"),
            inputs=inputs,
            teacher=teacher,
            held_out=collated.get("held_out"),
            packed=collated["sample"].dim() > 1 if "sample" in collated else False,
            filled=(int((~collated["padding"]).sum()), collated["padding"].numel()),
        )

    def with_segments(self) -> Batch:
        """The same with segments, of whole rows."""
        rows, length = self.tokens.shape
        if self.packed:
            segments = (self.position_ids.flatten() == 0).cumsum(0).view(rows, length) - 1
            return replace(self, segments=segments, num_segments=rows * length)
        return replace(self, segments=torch.arange(rows)[:, None].expand(rows, length), num_segments=rows)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same of every tensor but ``sample``, which stays on the CPU."""
        teacher = self.teacher
        if teacher is not None:
            teacher = CachedEntries(
                ids=function(teacher.ids),
                log_p=function(teacher.log_p),
                tail=function(teacher.tail),
                reading_ms=function(teacher.reading_ms),
            )
        return replace(
            self,
            tokens=function(self.tokens),
            labels=function(self.labels),
            position_ids=function(self.position_ids),
            padding=function(self.padding),
            inputs={name: function(value) for name, value in self.inputs.items()},
            teacher=teacher,
            segments=None if self.segments is None else function(self.segments),
            held_out=None if self.held_out is None else function(self.held_out),
        )
