"""The second model of an objective, in the form in which it is known: not needed, its logits, or its largest
probabilities. Each form says how the statistics of a shard, their merge and the gradient of the logits come about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qtarget_megatron import kernels
from qtarget_megatron.kernels.backend import Backend
from qtarget_megatron.loss.per_token import merge
from qtarget_megatron.loss.sparse_teacher import KeptEntries, SparseTeacher, check_residuals
from qtarget_megatron.objectives import Objective
from qtarget_megatron.statistics import StatisticsRequest, TokenStatistics, VocabularyShard


class SecondModel(Protocol):
    """The second model of N rows of logits, sharded over the vocabulary as they are."""

    def partial_statistics(
        self,
        kernel: Backend,
        logits: Tensor,
        labels: Tensor,
        *,
        request: StatisticsRequest,
        shard: VocabularyShard,
        scratch: bool = False,
    ) -> Tensor:
        """What travels, [N, width(request)].

        scratch: the logits may be overwritten, see overwrites_logits.
        """

    def width(self, request: StatisticsRequest) -> int:
        """Numbers per token and rank that travel."""

    def merge(
        self,
        kernel: Backend,
        partials: Tensor,
        labels: Tensor,
        supervised: Tensor,
        *,
        request: StatisticsRequest,
        vocab_size: int,
    ) -> tuple[TokenStatistics, Tensor | None]:
        """Statistics over the whole vocabulary from the partials of all ranks [T, N, width], and the shift [R, N] of
        the residuals' exponents that logit_gradient asks for."""

    def divergence_sums(
        self,
        kernel: Backend,
        logits: Tensor,
        labels: Tensor,
        *,
        request: StatisticsRequest,
        shift: Tensor | None,
        shard: VocabularyShard,
        maxima: Tensor,
        scales: Tensor,
    ) -> Tensor:
        """As Backend.divergence_sums. shift: from merge."""

    def logit_gradient(
        self,
        kernel: Backend,
        logits: Tensor,
        labels: Tensor,
        *,
        request: StatisticsRequest,
        shift: Tensor | None,
        shard: VocabularyShard,
        maxima: Tensor,
        scales: Tensor,
        out: Tensor,
    ) -> None:
        """As Backend.logit_gradient. shift: from merge."""

    @property
    def overwrites_logits(self) -> bool:
        """Whether partial_statistics changes logits that are scratch."""


@dataclass(frozen=True)
class TeacherLogits:
    """logits: [N, V_local], sharded as the student's; None where the objective reads no second model."""

    logits: Tensor | None = None

    overwrites_logits = False

    def partial_statistics(
        self,
        kernel: Backend,
        logits: Tensor,
        labels: Tensor,
        *,
        request: StatisticsRequest,
        shard: VocabularyShard,
        scratch: bool = False,
    ) -> Tensor:
        return kernel.partial_statistics(logits, self.logits, labels, request=request, shard=shard)

    def width(self, request: StatisticsRequest) -> int:
        return request.width

    def merge(
        self,
        kernel: Backend,
        partials: Tensor,
        labels: Tensor,
        supervised: Tensor,
        *,
        request: StatisticsRequest,
        vocab_size: int,
    ) -> tuple[TokenStatistics, None]:
        return merge(kernel, partials, supervised, request), None

    def divergence_sums(
        self,
        kernel: Backend,
        logits: Tensor,
        labels: Tensor,
        *,
        request: StatisticsRequest,
        shift: Tensor | None,
        shard: VocabularyShard,
        maxima: Tensor,
        scales: Tensor,
    ) -> Tensor:
        assert request.divergence is not None  # or there is no second pass
        return kernel.divergence_sums(
            logits,
            self.logits,
            labels,
            residuals=request.residuals[:1],
            divergence=request.divergence,
            shard=shard,
            maxima=maxima,
            scales=scales,
        )

    def logit_gradient(
        self,
        kernel: Backend,
        logits: Tensor,
        labels: Tensor,
        *,
        request: StatisticsRequest,
        shift: Tensor | None,
        shard: VocabularyShard,
        maxima: Tensor,
        scales: Tensor,
        out: Tensor,
    ) -> None:
        kernel.logit_gradient(
            logits,
            self.logits,
            labels,
            residuals=request.residuals,
            divergence=request.divergence,
            shard=shard,
            maxima=maxima,
            scales=scales,
            out=out,
        )


def check(objective: Objective, labels: Tensor, dense: Mapping[str, Tensor | None], kept: SparseTeacher | None) -> None:
    """ValueError unless an objective that needs a second model has it in exactly one form, of a dtype that is served.

    dense: arguments by name.
    """
    if kept is not None and any(value is not None for value in dense.values()):
        raise ValueError(f"the second model is either {' and '.join(dense)} or sparse_teacher, got both: drop one")
    if not objective.needs_teacher:
        return
    if kept is None and any(value is None for value in dense.values()):
        raise ValueError(f"objective {objective} needs a second model: pass {' and '.join(dense)}, or sparse_teacher")
    if kept is not None:
        kept.check_fits(labels)
        check_residuals(objective.request, kept.rule)
        return
    for name, value in dense.items():
        if value is not None:
            kernels.check_dtype(name, value.dtype)


def check_vocabulary(objective: Objective, known: int, vocab_size: int) -> None:
    """ValueError for an objective that is infinite where the second model, of `known` tokens, has no mass."""
    if known < vocab_size and objective.request.reverse_cross and objective.residuals[0][1] != 0:
        raise ValueError(
            f"objective {objective} holds a reverse KL, which is infinite for the tokens from {known} to "
            f"{vocab_size - 1} that the second model does not have: use skew-reverse-kl or jsd"
        )


def check_logits(teacher_logits: Tensor | None, logits: Tensor) -> None:
    """ValueError for logits of a second model that do not lie as the student's."""
    if teacher_logits is None:
        return
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"teacher_logits must be sharded like logits {list(logits.shape)}, got {list(teacher_logits.shape)}"
        )
    if teacher_logits.device != logits.device:
        raise ValueError(f"teacher_logits must be on {logits.device} like the logits, got {teacher_logits.device}")


def unit_stride(matrix: Tensor) -> Tensor:
    """With adjacent columns, as the kernels read a matrix."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


def of_rows(objective: Objective, teacher_logits: Tensor | None, kept: SparseTeacher | None) -> SecondModel:
    """What an objective reads of what is given, flattened to rows; see check()."""
    if not objective.needs_teacher:
        return NO_SECOND_MODEL
    if kept is not None:
        return KeptEntries(kept.rows(slice(None)))
    assert teacher_logits is not None  # see check()
    return TeacherLogits(unit_stride(teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])))


NO_SECOND_MODEL = TeacherLogits()
