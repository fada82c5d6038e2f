"""What a backend of the kernels is: the functions that the losses call, of the modules ``reference`` and ``native``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qtarget_megatron.statistics import Divergence, Residuals, StatisticsRequest, VocabularyShard


class Backend(Protocol):
    """Statistics of a vocabulary shard, what is done per token, and the logit gradient.

    N tokens, V_local columns, T ranks, R residuals. All tensors of a call are on one device. float32 stands for the
    work dtype: float64 where the logits are float64, which only the reference serves; its other dtypes and devices are
    limited by kernels.choose. No function waits for a GPU. Nothing but ``out`` and, in weigh, the last of ``rows`` is
    written to. Where teacher_logits are None no residual (a, b) may have b != 0: ValueError.
    """

    def partial_statistics(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        request: StatisticsRequest,
        shard: VocabularyShard,
    ) -> Tensor:
        """This rank's shard reduced to float32 ``[N, request.width]``, in the layout of statistics.py.

        logits, teacher_logits: ``[N, V_local]``, columns adjacent, any row stride, not necessarily of one dtype. The
            teacher is read only where a residual (a, b) has b != 0; padding columns are never read.
        labels: ``[N]`` int64 global ids. Rows that are not supervised are 0, whatever their logits hold.

        A NaN or +inf among the logits (or in u = a z + b t) makes that row's s (or s_u) NaN; its maximum may be finite.
        """

    def logit_gradient(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        residuals: Residuals,
        shard: VocabularyShard,
        maxima: Tensor,
        scales: Tensor,
        out: Tensor,
        divergence: Divergence | None = None,
    ) -> None:
        """Write the gradient of every row into ``out``.

            out_k = exp(z_k - maxima_0) scales_0 - [k = y] scales_1 - sum_r exp(u_rk - maxima_1+r) scales_2+r

        and with a divergence, whose h is a function of the log ratio l (see Divergence), also::

            + exp(z_k - maxima_0) scales_2+R (h(l_k) - maxima_2+R)
            l_k = (z_k - maxima_0) - (u_1k - maxima_1) - maxima_1+R

        logits, teacher_logits, labels: as in partial_statistics.
        maxima: float32 ``[1 + R, N]``, over the whole vocabulary: no z or u lies above them. With a divergence two rows
            more: log sum_exp of z less that of the first u, and the mean of h.
        scales: float32 ``[2 + R, N]``, with a divergence ``[3 + R, N]``.
        out: shape and dtype of logits, columns adjacent, any row stride. It may be ``logits`` itself, and shares memory
            with the inputs in no other way.

        Padding columns, rows that are not supervised and rows whose scales are all 0 become exact zeros, whatever the
        logits hold.
        """

    def divergence_sums(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        residuals: Residuals,
        divergence: Divergence,
        shard: VocabularyShard,
        maxima: Tensor,
        scales: Tensor,
    ) -> Tensor:
        """This rank's part of the mean of h under p, and of the divergence from one residual: float32 ``[N, 2]``.

        Added up over the ranks they are sum_k p_k h(l_k) and sum_k p_k A(l_k) + r_k B(l_k), see Divergence.

        logits, teacher_logits, labels: as in partial_statistics.
        maxima: float32 ``[3, N]``: of z and of u, and log sum_exp of z less that of u.
        scales: float32 ``[2, N]``: 1 / sum_exp of both.

        Rows that are not supervised are 0.
        """

    def supervised(self, labels: Tensor, *, vocab_size: int, ignore_index: int) -> tuple[Tensor, int]:
        """Which labels are not ignore_index, in their shape, and the flat position of the first of these that is not in
        0..vocab_size - 1: -1 where there is none, and on a GPU, which would have to be waited for.

        labels: contiguous int64 of any shape.
        """

    def merge(
        self,
        partials: Tensor,
        supervised: Tensor,
        *,
        request: StatisticsRequest,
        residuals: Sequence[tuple[float, float, float]],
        out: Tensor,
    ) -> None:
        """Write the statistics over the whole vocabulary, see TokenStatistics, into the first rows of ``out``.

        partials: ``[T, N, request.width]`` float32 or float64, added up in float64 and in rank order.
        supervised: ``[N]`` bool.
        residuals: (a, b) as the kernels rounded them, and the factor that turns the maximum of u into that of the exact
            coefficients.
        out: float64 ``[request.merged_rows or more, N]``, contiguous.
        """

    def weigh(
        self,
        rows: Tensor,
        supervised: Tensor,
        *,
        request: StatisticsRequest,
        loss: Tensor | None,
        label_mass: Tensor | float,
        residual_masses: Sequence[Tensor | float],
        guards: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """An objective's loss and masses per token, made ready for the gradient; 0 where not supervised.

        rows: float64 ``[request.evaluated_rows, N]`` of TokenStatistics, whose last three this fills in.
        supervised: ``[N]`` bool.
        loss, masses, guards: float64 ``[N]``, contiguous; a mass may be one number for all tokens. With a divergence
            the last of the residual masses is its own. Without a loss it is -label_mass log p(y) + sum_i mass_i (lse -
            mean_logit_i), and the divergence times its mass, where a mass of 0 adds exactly 0. A NaN among the guards,
            in log p(y), in a residual's mean logit or in the divergence reaches the loss.
        dtype: of the loss and the maxima, float32 or float64.

        Returns the loss ``[N]`` and, of z and each residual's u, the maxima ``[1 + R, N]``; and the scales of
        exp(z - max), of the label, and of each residual's exp(u - max), ``[2 + R, N]`` in float64:
        exp(z - max) * (mass / sum_exp), not exp(z - lse): an order of magnitude less rounding error. With a divergence
        both have the further rows of logit_gradient.
        """

    def chain(self, scales: Tensor, upstream: Tensor) -> Tensor:
        """The scales times the upstream gradient of each token's loss, in the dtype of the latter.

        scales: float64 ``[count, N]``, columns adjacent. upstream: ``[N]`` float32 or float64, any stride. A token
        masked out downstream has upstream exactly 0: its NaN does not leak.
        """
