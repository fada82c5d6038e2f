"""A second model known by its largest probabilities only: kept token ids, their log-probabilities, and the tail's mass.

Its log-probability of token k is that of the kept entry; elsewhere, by rule, with T the tail's mass, K the kept ids::

    uniform   log(T / (V - |K|))                the tail is spread evenly over the V - |K| other tokens
    student   log T + log p_k - log(1 - p(K))   the tail is shared as the student shares it (detached)
    drop      -inf                              the tail is left out, so that the kept entries are renormalised

A residual r = softmax(a z + b t) then has one exponent outside of K, which needs no teacher: a z + const for uniform,
(a + b) z + const for student, nothing for drop. So the kernels run over the student's logits as for a residual (a', 0),
the kept entries form a small shard of their own, and the two meet in the merge like the shards of two ranks. No [N, V]
teacher is built, and no kernel knows of any of this.

What is lost, against the whole model as a residual (0, 1) of mass c: by any rule the two residuals are at most T apart
in total variation. So the token's loss is off by at most c T (max z - min z), and its gradient to the logits by at most
2 c T in the sum of magnitudes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget_megatron.kernels import DTYPES, reference
from qtarget_megatron.kernels.backend import Backend
from qtarget_megatron.loss.per_token import merge
from qtarget_megatron.statistics import (
    ResidualColumns,
    Residuals,
    StatisticsRequest,
    TokenStatistics,
    VocabularyShard,
    kernel_coefficients,
)

TAIL_RULES = ("uniform", "student", "drop")
# Rows whose logits are copied at a time, where the caller's must stay as they are.
_COPIED_ROWS = 256


@dataclass(frozen=True)
class SparseTeacher:
    """The largest probabilities of a second model for each token.

    ids:   int64 ``[..., K]`` global token ids, all different; -1 for an entry that is not used.
    log_p: float ``[..., K]`` their log-probabilities in nats; whatever for an entry that is not used.
    tail:  float ``[...]`` the mass of all other tokens, 0 or more.
    rule:  what the tail is: "uniform", "student" or "drop".

    The same on every tensor-parallel rank. ValueError for other shapes, dtypes or rules.
    """

    ids: Tensor
    log_p: Tensor
    tail: Tensor
    rule: str = "uniform"

    def __post_init__(self) -> None:
        if self.rule not in TAIL_RULES:
            raise ValueError(f"tail rule must be one of {', '.join(TAIL_RULES)}, got {self.rule!r}")
        if self.ids.dtype != torch.int64 or not {self.log_p.dtype, self.tail.dtype} <= set(DTYPES):
            raise ValueError(
                "a sparse teacher has int64 ids and log_p and tail in float32, float64, bfloat16 or float16, got "
                f"{self.ids.dtype}, {self.log_p.dtype} and {self.tail.dtype}"
            )
        if self.ids.dim() == 0 or self.ids.shape != self.log_p.shape or self.ids.shape[:-1] != self.tail.shape:
            raise ValueError(
                f"a sparse teacher has ids [..., K], log_p [..., K] and tail [...], got {list(self.ids.shape)}, "
                f"{list(self.log_p.shape)} and {list(self.tail.shape)}"
            )

    def check_fits(self, labels: Tensor) -> None:
        """ValueError unless it is of these tokens."""
        if self.tail.shape != labels.shape or self.tail.device != labels.device:
            raise ValueError(
                f"sparse_teacher must be of {list(labels.shape)} tokens on {labels.device} like labels, got "
                f"{list(self.tail.shape)} on {self.tail.device}"
            )

    def rows(self, rows: Tensor | slice) -> SparseTeacher:
        """The entries of some of the tokens, flattened: [n, K]."""
        count = self.ids.shape[-1]
        return SparseTeacher(
            self.ids.reshape(-1, count)[rows],
            self.log_p.reshape(-1, count)[rows].detach(),
            self.tail.reshape(-1)[rows].detach(),
            self.rule,
        )


def check_residuals(request: StatisticsRequest, rule: str) -> None:
    """ValueError for residuals, or a divergence from one, that a sparse teacher does not serve."""
    residuals = request.residuals
    if rule == "drop" and request.reverse_cross and residuals[0][1] != 0:
        raise ValueError(
            "the reverse KL is infinite where the second model has no mass, and the tail rule 'drop' leaves it none: "
            "use 'uniform' or 'student'"
        )
    if any(b < 0 for _, b in residuals):
        raise ValueError(f"a sparse teacher serves residuals (a, b) with b >= 0, got {residuals}")
    if rule == "student" and (0.0, 0.0) in residuals:
        raise ValueError("a sparse teacher with the tail rule 'student' serves no uniform residual: use 'uniform'")


@dataclass(frozen=True)
class KeptEntries:
    """The SecondModel of a sparse teacher.

    teacher: of N rows, ``[N, K]``. What travels are two parts, each as of a shard: the tail's, and the kept entries'.
    """

    teacher: SparseTeacher

    def rows(self, rows: slice) -> KeptEntries:
        """The entries of some of the rows."""
        return KeptEntries(self.teacher.rows(rows))

    @property
    def overwrites_logits(self) -> bool:
        return self.teacher.rule == "student"

    def width(self, request: StatisticsRequest) -> int:
        return 2 * request.width

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
        rule, columns = self.teacher.rule, request.columns
        kept = _Kept.of(logits, self.teacher, shard)
        dense_request = dataclasses.replace(request, residuals=_dense_residuals(request.residuals, rule))
        masked = rule == "student"
        # y is centred by the mass of the columns that it is of: they must be those of the part.
        whole_base = masked or (request.reverse_cross and request.residuals[0][1] != 0)
        if not masked:
            dense = kernel.partial_statistics(logits, None, labels, request=dense_request, shard=shard)
        else:
            parts, step = [], max(len(labels), 1) if scratch else _COPIED_ROWS
            for start in range(0, max(len(labels), 1), step):
                rows = slice(start, start + step)
                piece = logits[rows] if scratch else logits[rows].clone()
                kept.write(torch.full_like(kept.logits[rows], -torch.inf), piece, rows)
                parts.append(kernel.partial_statistics(piece, None, labels[rows], request=dense_request, shard=shard))
            dense = torch.cat(parts)
            dense[:, columns.label_logit] = kept.label_logit(dense[:, columns.label_logit], labels)

        top = _kept_statistics(kept, labels, request, shard.ignore_index, whole_base=whole_base, masked=masked)
        coefficients = kernel_coefficients(request.residuals, dense.dtype)
        for index, residual in _reading_teacher(request):
            if rule == "drop":
                dense[:, residual.max] = -torch.inf
                dense[:, residual.rest] = 0
            elif rule == "uniform":
                _take_out(dense, request, index, coefficients[index][0], kept)
        if whole_base and not masked:
            _take_out_base(dense, request, kept)
        return torch.cat([dense, top.to(dense.dtype)], dim=-1)

    def merge(
        self,
        kernel: Backend,
        partials: Tensor,
        labels: Tensor,
        supervised: Tensor,
        *,
        request: StatisticsRequest,
        vocab_size: int,
    ) -> tuple[TokenStatistics, Tensor]:
        """The shift is what the exponent of each residual has besides a' z outside of the kept entries; 0 for one that
        reads no teacher."""
        teacher, columns = self.teacher, request.columns
        both = partials.double()
        dense, top = both[..., : request.width].clone(), both[..., request.width :]
        shift = torch.zeros(len(request.residuals), *supervised.shape, dtype=torch.float64, device=partials.device)
        tail = _log_tail(dense, teacher, request, vocab_size)
        if request.reverse_cross and request.residuals[0][1] != 0:
            # Nothing but rounding is left where all tokens are kept.
            all_kept = (teacher.ids >= 0).sum(-1) >= vocab_size
            for column in (columns.sum_exp, columns.centred, columns.reverse_cross):
                # One by one: a list of them would be copied to the device.
                dense[..., column].masked_fill_(all_kept, 0)
        in_tail = ~(teacher.ids == labels[:, None]).any(-1)
        coefficients = kernel_coefficients(request.residuals, partials.dtype)
        of_tail = kernel_coefficients(_dense_residuals(request.residuals, teacher.rule), partials.dtype)
        z_max, of_label = dense[..., columns.max].amax(0), tail
        if teacher.rule == "drop":
            of_label = torch.full_like(tail, -torch.inf)
        elif teacher.rule == "student":
            of_label = tail + dense[..., columns.label_logit].sum(0)
        for index, residual in _reading_teacher(request):
            a, b = coefficients[index]
            constant = b * tail
            if teacher.rule == "student":
                # Rounded, a and b do not add up to the coefficient that the tail was given.
                constant = constant + (a + b - of_tail[index][0]) * z_max.masked_fill(~z_max.isfinite(), 0)
            shift[index] = constant.masked_fill(~supervised, 0)
            _add_constant(dense, request, index, shift[index], partials.dtype)
            if residual.label_logit is not None:
                # The first of the shards, which are added up, has the logit of a label outside of the kept entries.
                dense[0, :, residual.label_logit] = of_label.masked_fill(~in_tail, 0)
        parts = torch.stack([dense, top], dim=1).flatten(0, 1)
        return merge(kernel, parts, supervised, request, coefficients), shift

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
        assert shift is not None and request.divergence is not None  # or there is no second pass
        kept = _Kept.of(logits, self.teacher, shard)
        first = request.residuals[:1]
        of_tail = _dense_residuals(first, self.teacher.rule)
        tail_maxima, tail_scales = self._of_tail(first, shift, maxima, scales, offset=2, scale=1)
        sums = kernel.divergence_sums(
            logits,
            None,
            labels,
            residuals=of_tail,
            divergence=request.divergence,
            shard=shard,
            maxima=tail_maxima,
            scales=tail_scales,
        )
        if first[0][1] == 0:
            return sums

        def of_kept(residuals: Residuals, log_p: Tensor | None, maxima: Tensor, scales: Tensor) -> Tensor:
            """What the kept entries add to the sums by these exponents."""
            slope, value = reference.divergence_elements(
                kept.logits, log_p, residuals=residuals, divergence=divergence, maxima=maxima, scales=scales
            )
            return torch.stack([part.masked_fill(~kept.on_shard, 0).sum(-1) for part in (slope, value)], dim=-1)

        divergence = request.divergence
        # The tail's exponent in their columns is taken out: both are bounded, the difference loses nothing.
        difference = of_kept(first, kept.log_p, maxima, scales) - of_kept(of_tail, None, tail_maxima, tail_scales)
        return sums + difference.masked_fill((labels == shard.ignore_index)[:, None], 0).to(sums.dtype)

    def _of_tail(
        self, residuals: Residuals, shift: Tensor, maxima: Tensor, scales: Tensor, *, offset: int, scale: int
    ) -> tuple[Tensor, Tensor]:
        """maxima and scales for the exponents of the tail. offset: the divergence's row of maxima, if there is one;
        scale: the first residual's row of scales."""
        count = len(residuals)
        of_tail, tail_scales = maxima.clone(), scales.clone()
        centre = maxima[1 : 1 + count].double() - shift[:count]
        of_tail[1 : 1 + count] = centre
        change = of_tail[1 : 1 + count].double() - centre
        tail_scales[scale : scale + count] = _moved(scales[scale : scale + count], change)
        if offset < len(maxima):
            of_tail[offset] += change[0].masked_fill(~change[0].isfinite(), 0)
        if self.teacher.rule == "drop":
            for index, (_, b) in enumerate(residuals):
                if b != 0:
                    tail_scales[scale + index] = 0
                    if index == 0 and offset < len(maxima):
                        of_tail[offset] = -torch.inf
        return of_tail, tail_scales

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
        assert shift is not None  # merge returned it
        kept = _Kept.of(logits, self.teacher, shard)
        residuals, divergence, count = request.residuals, request.divergence, len(request.residuals)
        tail_maxima, tail_scales = self._of_tail(residuals, shift, maxima, scales, offset=1 + count, scale=2)
        kernel.logit_gradient(
            logits,
            None,
            labels,
            residuals=_dense_residuals(residuals, self.teacher.rule),
            divergence=divergence,
            shard=shard,
            maxima=tail_maxima,
            scales=tail_scales,
            out=out,
        )
        # The kept entries: written over whatever the tail's exponent gave there.
        gradient = (kept.logits - maxima[0, :, None]).exp() * scales[0, :, None]
        if divergence is not None:
            gradient += reference.divergence_gradient(
                kept.logits, kept.log_p, residuals=residuals, divergence=divergence, maxima=maxima, scales=scales
            )
        coefficients = kernel_coefficients(residuals, kept.logits.dtype)
        for (a, b), maximum, mass in zip(coefficients, maxima[1 : 1 + count], scales[2 : 2 + count], strict=True):
            u = reference.residual_logits(kept.logits, kept.log_p, a, b)
            of_residual = (u - maximum[:, None]).to(gradient.dtype).exp()
            gradient -= (of_residual * mass[:, None]).masked_fill(mass[:, None] == 0, 0)
        gradient -= scales[1, :, None].masked_fill(kept.ids != labels[:, None], 0)
        active = (labels != shard.ignore_index) & (scales != 0).any(0)
        kept.write(gradient.masked_fill(~active[:, None], 0), out)


@dataclass(frozen=True)
class _Kept:
    """The kept entries that lie on this rank's shard. Nothing here waits for a GPU: no shape depends on the data.

    ids:           [n, K].
    on_shard:      bool [n, K], entries whose token id lies on this rank's shard.
    first:         [n, 1], the first slot on the shard, 0 where none is.
    columns:       [n, K], of the shard; of a slot that is not on it, that of the first.
    logits, log_p: [n, K] of the student and the teacher, -inf where not on the shard.
    """

    ids: Tensor
    on_shard: Tensor
    first: Tensor
    columns: Tensor
    logits: Tensor
    log_p: Tensor

    @classmethod
    def of(cls, logits: Tensor, teacher: SparseTeacher, shard: VocabularyShard) -> _Kept:
        local = teacher.ids - shard.start
        on_shard = (teacher.ids >= 0) & (local >= 0) & (local < shard.valid_columns)
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if on_shard.shape[1] == 0:
            first = on_shard.new_zeros(len(on_shard), 0, dtype=torch.int64)
            return cls(teacher.ids, on_shard, first, local, local.to(work), teacher.log_p.to(work))
        local = local.masked_fill(~on_shard, 0)
        first = on_shard.int().argmax(-1, keepdim=True)
        columns = torch.where(on_shard, local, local.gather(1, first))
        z = logits.gather(1, columns).to(work).masked_fill(~on_shard, -torch.inf)
        return cls(teacher.ids, on_shard, first, columns, z, teacher.log_p.to(work).masked_fill(~on_shard, -torch.inf))

    def write(self, values: Tensor, out: Tensor, rows: slice = slice(None)) -> None:
        """Put values [n, K] of the entries on the shard into their columns of out, of a run of rows.

        The slots of a row that are not on the shard write what its first one writes; in a row without any, what stands
        there.
        """
        if values.shape[1] == 0:
            return
        on_shard, first, columns = self.on_shard[rows], self.first[rows], self.columns[rows]
        values = values.to(out.dtype)
        otherwise = torch.where(on_shard.gather(1, first), values.gather(1, first), out.gather(1, columns[:, :1]))
        # Not scatter_, which copies a whole 16-bit matrix on the CPU.
        row = torch.arange(len(out), device=out.device)[:, None].expand_as(columns)
        out.index_put_((row, columns), torch.where(on_shard, values, otherwise))

    def label_logit(self, otherwise: Tensor, labels: Tensor) -> Tensor:
        """The label's logit where it is kept and on the shard."""
        is_label = self.on_shard & (self.ids == labels[:, None])
        found = self.logits.masked_fill(~is_label, 0).sum(-1)
        return torch.where(is_label.any(-1), found.to(otherwise.dtype), otherwise)


def _dense_residuals(residuals: Residuals, rule: str) -> Residuals:
    """The exponents outside of the kept entries, up to a constant."""

    def dense(a: float, b: float) -> tuple[float, float]:
        return {"uniform": (a, 0.0), "student": (a + b, 0.0), "drop": (0.0, 0.0)}[rule]

    return tuple((a, b) if b == 0 else dense(a, b) for a, b in residuals)


def _reading_teacher(request: StatisticsRequest) -> list[tuple[int, ResidualColumns]]:
    """Index and columns of each residual that reads the teacher."""
    return [(index, request.columns.residuals[index]) for index, (_, b) in enumerate(request.residuals) if b != 0]


def _moved(sums: Tensor, change: Tensor) -> Tensor:
    """Sums of exponentials whose exponents all change by that; a change that is not finite leaves them."""
    return (sums * change.masked_fill(~change.isfinite(), 0).exp()).to(sums.dtype)


def _add_constant(dense: Tensor, request: StatisticsRequest, index: int, constant: Tensor, dtype: torch.dtype) -> None:
    """Raise a residual's u by a constant; its maximum stays a number of the kernels' dtype: the gradient reads it."""
    columns = request.columns
    residual = columns.residuals[index]
    exact = dense[..., residual.max] + constant
    dense[..., residual.max] = exact.to(dtype).double()
    change = exact - dense[..., residual.max]
    if index == 0 and columns.reverse_cross is not None:
        dense[..., columns.reverse_cross] += dense[..., columns.sum_exp] * change.masked_fill(~change.isfinite(), 0)
    if residual.centred is not None:
        dense[..., residual.centred] += dense[..., residual.sum_exp] * change.masked_fill(~change.isfinite(), 0)
    dense[..., residual.sums] = _moved(dense[..., residual.sums], change[..., None])


def _kept_statistics(
    kept: _Kept, labels: Tensor, request: StatisticsRequest, ignore_index: int, *, whole_base: bool, masked: bool
) -> Tensor:
    """The kept entries as a shard of their own.

    masked: the other part has not seen them; otherwise only the residuals that read the teacher count, and with
    whole_base what is of the logits alone, which the other part does not hold.
    """
    is_label = kept.on_shard & (kept.ids == labels[:, None])
    slots = kept.ids.shape[1]
    position = torch.full_like(labels, slots)
    if slots:
        position = is_label.int().argmax(-1).masked_fill(~is_label.any(-1), slots)
    position = position.masked_fill(labels == ignore_index, -1)
    top = reference.partial_statistics(
        kept.logits,
        kept.log_p,
        position,
        request=request,
        shard=VocabularyShard(0, slots, ignore_index=-1),
    )
    columns = request.columns
    top[:, columns.label_logit] = 0  # the other part has the label's logit
    if not masked:
        # m stays: the residuals' sums are centred on it.
        if not whole_base:
            top[:, columns.base] = 0
            if columns.reverse_cross is not None:
                top[:, columns.reverse_cross] = 0
        top[:, columns.top] = -torch.inf
        for (_, b), residual in zip(request.residuals, columns.residuals, strict=True):
            if b == 0:
                top[:, residual.max] = -torch.inf
                top[:, residual.rest] = 0
        top = top.masked_fill((labels == ignore_index)[:, None], 0)
    return top


def _take_out(dense: Tensor, request: StatisticsRequest, index: int, a: float, kept: _Kept) -> None:
    """Subtract the kept entries from a residual's sums over a z.

    Well-conditioned: the tail's constant is not above a kept log_p, so what is subtracted is, in the merged residual,
    not above what the kept entries put in its place.
    """
    residual = request.columns.residuals[index]
    centre, maximum = dense[:, request.columns.max, None], dense[:, residual.max, None]
    shifted = (reference.residual_logits(kept.logits, None, a, 0.0) - maximum).to(kept.logits.dtype)
    weight = shifted.exp().masked_fill(~kept.on_shard, 0)

    def total(values: Tensor) -> Tensor:
        return (weight * values).masked_fill(weight == 0, 0).sum(-1).to(dense.dtype)

    dense[:, residual.sum_exp] = (dense[:, residual.sum_exp] - total(torch.ones_like(weight))).clamp_min(0)
    dense[:, residual.cross] -= total(kept.logits - centre)
    if residual.centred is not None:
        dense[:, residual.centred] -= total(shifted)
    if index == 0 and request.columns.reverse_cross is not None:
        of_model = (kept.logits - centre).exp().masked_fill(~kept.on_shard, 0)
        product = (of_model * shifted).masked_fill(of_model == 0, 0)
        dense[:, request.columns.reverse_cross] -= product.sum(-1).to(dense.dtype)


def _take_out_base(dense: Tensor, request: StatisticsRequest, kept: _Kept) -> None:
    """Subtract the kept entries from the sums of the logits alone. The sum of both parts is again what it was, so that
    the difference may lose what it likes."""
    columns = request.columns
    shifted = kept.logits - dense[:, columns.max, None]
    weight = shifted.exp().masked_fill(~kept.on_shard, 0)
    product = (weight * shifted).masked_fill(weight == 0, 0)
    dense[:, columns.sum_exp] = (dense[:, columns.sum_exp] - weight.sum(-1).to(dense.dtype)).clamp_min(0)
    dense[:, columns.centred] -= product.sum(-1).to(dense.dtype)
    if columns.collision is not None:
        dense[:, columns.collision] -= weight.square().sum(-1).to(dense.dtype)


def _log_tail(dense: Tensor, teacher: SparseTeacher, request: StatisticsRequest, vocab_size: int) -> Tensor:
    """The tail's log-probability of one token, up to what depends on the token: [N] float64.

    The reverse KL has its logarithm as the loss of every other token: there a tail that float32 cannot tell from
    rounding of the kept entries' sum, 0 among them, counts as that.
    """
    mass = teacher.tail.double()
    if request.reverse_cross:
        mass = mass.clamp_min(torch.finfo(torch.float32).eps / 2)
    log_mass = mass.log()
    if teacher.rule == "drop":
        return torch.zeros_like(log_mass)
    if teacher.rule == "uniform":
        others = vocab_size - (teacher.ids >= 0).sum(-1)
        return (log_mass - others.clamp_min(1).double().log()).masked_fill(others <= 0, -torch.inf)
    m, s = dense[..., request.columns.max], dense[..., request.columns.sum_exp]
    log_others = torch.logsumexp((m + s.log()).masked_fill(~(s > 0), -torch.inf), dim=0)
    return (log_mass - log_others).masked_fill(log_others == -torch.inf, -torch.inf)
