"""An objective as the loss of an output head, in Megatron's layouts: labels [b, s], hidden states and logits [s, b]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from qtarget_megatron import collectives
from qtarget_megatron.data import IGNORE_INDEX
from qtarget_megatron.loss.cross_entropy import qtarget_cross_entropy
from qtarget_megatron.loss.linear_cross_entropy import AUTO, qtarget_linear_cross_entropy
from qtarget_megatron.loss.samples import Samples
from qtarget_megatron.loss.sparse_teacher import SparseTeacher
from qtarget_megatron.megatron.model.output_head import OutputHead
from qtarget_megatron.objectives import Objective
from qtarget_megatron.statistics import TokenStatistics


@dataclass(frozen=True)
class LossInputs:
    """What an objective reads of a micro-batch besides hidden states and labels.

    token_inputs:   its side inputs by name, each [b, s] like the labels.
    sparse_teacher: a cached second model, of [b, s] tokens.
    teacher:        gives the output head of a live second model, once the loss is computed.
    samples:        the sample of each token, [b, s].
    num_supervised: numbers of labels that are not ignored, where the host knows them: of the labels, and of those that
                    are one, two and more tokens further on, for as many heads as there are.
    """

    token_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    sparse_teacher: SparseTeacher | None = None
    teacher: Callable[[], OutputHead | None] = lambda: None
    num_supervised: tuple[int, ...] | None = None
    samples: Samples | None = None


@dataclass(frozen=True)
class HeadLoss:
    """An objective, and how its loss is computed; see attach()."""

    objective: Objective
    vocab_size: int
    backend: str = "auto"
    chunk_size: int | Literal["auto"] | None = AUTO
    teacher_vocab_size: int | None = None

    def of_hidden(
        self, head: OutputHead, labels: Tensor, inputs: LossInputs, scale: float = 1.0
    ) -> tuple[Tensor, TokenStatistics]:
        """Loss of each token, float32 [b, s], and its statistics [s, b]; logits exist a chunk of tokens at a time.

        scale: of the logits. ValueError for an output layer whose product others cannot make, see OutputHead.matrix.
        """
        assert self.chunk_size is not None
        layer, matrix, teacher = head.layer, head.matrix(), self._teacher(inputs)
        loss, statistics = qtarget_linear_cross_entropy(
            head.hidden,
            matrix,
            _like_hidden(labels),
            teacher_hidden=None if teacher is None else teacher.hidden,
            teacher_weight=None if teacher is None else teacher.matrix(),
            teacher_vocab_size=self.teacher_vocab_size,
            logit_scale=scale,
            sequence_parallel=layer.sequence_parallel,
            num_supervised=None if inputs.num_supervised is None else inputs.num_supervised[0],
            chunk_size=self.chunk_size,
            group=layer.tp_group,
            return_statistics=True,
            **self._shared(inputs),
        )
        return loss.t().contiguous(), statistics

    def of_logits(
        self, logits: Tensor, labels: Tensor, inputs: LossInputs, group: collectives.Group, *, inplace: bool
    ) -> tuple[Tensor, TokenStatistics]:
        """The same of logits [s, b, V_local], sharded over group.

        inplace: the gradient overwrites them.
        """
        teacher, teacher_logits = self._teacher(inputs), None
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = self._known(teacher.logits(), group)
        loss, statistics = qtarget_cross_entropy(
            logits,
            _like_hidden(labels),
            teacher_logits=teacher_logits,
            inplace=inplace and logits.requires_grad,
            group=group,
            return_statistics=True,
            **self._shared(inputs),
        )
        return loss.t().contiguous(), statistics

    def _teacher(self, inputs: LossInputs) -> OutputHead | None:
        return inputs.teacher() if self.objective.needs_teacher else None

    def _shared(self, inputs: LossInputs) -> dict[str, Any]:
        kept, samples = inputs.sparse_teacher, inputs.samples
        if samples is not None:
            samples = samples.map(_like_hidden)
        if kept is not None:
            kept = SparseTeacher(_like_hidden(kept.ids), _like_hidden(kept.log_p), _like_hidden(kept.tail), kept.rule)
        return dict(
            objective=self.objective,
            sparse_teacher=kept,
            token_inputs={name: _like_hidden(values) for name, values in inputs.token_inputs.items()},
            samples=samples,
            vocab_size=self.vocab_size,
            ignore_index=IGNORE_INDEX,
            backend=self.backend,
        )

    def _known(self, logits: Tensor, group: collectives.Group) -> Tensor:
        """The teacher's logits, -inf where its vocabulary has no such token."""
        if self.teacher_vocab_size is not None:
            known = max(self.teacher_vocab_size - collectives.rank(group) * logits.shape[-1], 0)
            logits[..., known:] = -torch.inf
        return logits


def _like_hidden(values: Tensor) -> Tensor:
    return values.transpose(0, 1).contiguous()
