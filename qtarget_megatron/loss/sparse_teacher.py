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
from types import ModuleType

import torch
from torch import Tensor

from qtarget_megatron.kernels import DTYPES, reference
from qtarget_megatron.statistics import Residuals, StatisticsRequest, TokenStatistics, kernel_coefficients, merge

TAIL_RULES = ("uniform", "student", "drop")
_BASE = 4  # m, s, e, z_y
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
        """Of some of the tokens, flattened: [n, K]."""
        count = self.ids.shape[-1]
        return SparseTeacher(
            self.ids.reshape(-1, count)[rows],
            self.log_p.reshape(-1, count)[rows].detach(),
            self.tail.reshape(-1)[rows].detach(),
            self.rule,
        )


def check_residuals(residuals: Residuals, rule: str) -> None:
    """ValueError for residuals that a sparse teacher does not serve."""
    if any(b < 0 for _, b in residuals):
        raise ValueError(f"a sparse teacher serves residuals (a, b) with b >= 0, got {residuals}")
    if rule == "student" and (0.0, 0.0) in residuals:
        raise ValueError("a sparse teacher with the tail rule 'student' serves no uniform residual: use 'uniform'")


Teacher = Tensor | SparseTeacher | None


def partial_statistics(
    backend: ModuleType,
    logits: Tensor,
    teacher: Teacher,
    labels: Tensor,
    *,
    request: StatisticsRequest,
    vocab_start: int,
    valid_columns: int,
    ignore_index: int,
    scratch: bool = False,
) -> Tensor:
    """The kernels' partial_statistics for any second model: logits, none, or a sparse one of these N rows.

    With a sparse one ``[N, 2 * request.width]``: the tail's part, then the kept entries'. scratch: the logits may be
    overwritten.
    """
    shard = dict(vocab_start=vocab_start, valid_columns=valid_columns, ignore_index=ignore_index)
    if not isinstance(teacher, SparseTeacher):
        return backend.partial_statistics(logits, teacher, labels, request=request, **shard)
    kept = _Kept.of(logits, teacher, vocab_start, valid_columns)
    dense_request = dataclasses.replace(request, residuals=_dense_residuals(request.residuals, teacher.rule))
    masked = teacher.rule == "student"
    if not masked:
        dense = backend.partial_statistics(logits, None, labels, request=dense_request, **shard)
    else:
        parts, step = [], max(len(labels), 1) if scratch else _COPIED_ROWS
        for start in range(0, max(len(labels), 1), step):
            rows = slice(start, start + step)
            piece = logits[rows] if scratch else logits[rows].clone()
            kept.write(torch.full_like(kept.logits[rows], -torch.inf), piece, rows)
            parts.append(backend.partial_statistics(piece, None, labels[rows], request=dense_request, **shard))
        dense = torch.cat(parts)
        dense[:, 3] = kept.label_logit(dense[:, 3], labels)

    top = _kept_statistics(kept, labels, request, ignore_index, whole_base=masked)
    coefficients = kernel_coefficients(request.residuals, dense.dtype)
    for index, column in _teacher_columns(request):
        if teacher.rule == "drop":
            dense[:, column] = -torch.inf
            dense[:, column + 1 : column + request.residual_width] = 0
        elif teacher.rule == "uniform":
            _take_out(dense, column, request, coefficients[index][0], kept)
    return torch.cat([dense, top.to(dense.dtype)], dim=-1)


def merge_parts(
    kernel: ModuleType,
    partials: Tensor,
    labels: Tensor,
    supervised: Tensor,
    teacher: Teacher,
    *,
    request: StatisticsRequest,
    vocab_size: int,
) -> tuple[TokenStatistics, Tensor | None]:
    """Merge the gathered partials of all ranks: statistics, and the sparse teacher's constant ``[R, N]``.

    The constant is what the exponent of each residual has besides a' z outside of the kept entries; 0 for a residual
    that reads no teacher.
    """
    if not isinstance(teacher, SparseTeacher):
        return merge(kernel, partials, supervised, request), None
    dense, top = partials.double().split(request.width, dim=-1)
    dense = dense.clone()
    shift = torch.zeros(len(request.residuals), *supervised.shape, dtype=torch.float64, device=partials.device)
    tail = _log_tail(dense, teacher, vocab_size)
    in_tail = ~(teacher.ids == labels[:, None]).any(-1)
    coefficients = kernel_coefficients(request.residuals, partials.dtype)
    of_tail = kernel_coefficients(_dense_residuals(request.residuals, teacher.rule), partials.dtype)
    z_max, of_label = dense[..., 0].amax(0), tail
    if teacher.rule == "drop":
        of_label = torch.full_like(tail, -torch.inf)
    elif teacher.rule == "student":
        of_label = tail + dense[..., 3].sum(0)
    for index, column in _teacher_columns(request):
        a, b = coefficients[index]
        constant = b * tail
        if teacher.rule == "student":
            # Rounded, a and b do not add up to the coefficient that the tail was given.
            constant = constant + (a + b - of_tail[index][0]) * z_max.masked_fill(~z_max.isfinite(), 0)
        shift[index] = constant.masked_fill(~supervised, 0)
        _add_constant(dense, column, request, shift[index], partials.dtype)
        if request.residual_label:
            # Of a label outside of the kept entries, on the first of the shards over which it is added up.
            dense[0, :, column + request.residual_width - 1] = of_label.masked_fill(~in_tail, 0)
    parts = torch.stack([dense, top], dim=1).flatten(0, 1)
    return merge(kernel, parts, supervised, request, coefficients), shift


def logit_gradient(
    backend: ModuleType,
    logits: Tensor,
    teacher: Teacher,
    labels: Tensor,
    *,
    residuals: Residuals,
    shift: Tensor | None,
    vocab_start: int,
    valid_columns: int,
    ignore_index: int,
    maxima: Tensor,
    scales: Tensor,
    out: Tensor,
) -> None:
    """The kernels' logit_gradient for any second model of these rows; shift: the constant from merge_parts."""
    shard = dict(vocab_start=vocab_start, valid_columns=valid_columns, ignore_index=ignore_index)
    if not isinstance(teacher, SparseTeacher):
        backend.logit_gradient(
            logits, teacher, labels, residuals=residuals, **shard, maxima=maxima, scales=scales, out=out
        )
        return
    kept = _Kept.of(logits, teacher, vocab_start, valid_columns)
    dense_maxima, dense_scales = maxima.clone(), scales.clone()
    centre = maxima[1:].double() - shift
    dense_maxima[1:] = centre
    dense_scales[2:] = _moved(scales[2:], dense_maxima[1:].double() - centre)
    if teacher.rule == "drop":
        for index, (_, b) in enumerate(residuals):
            if b != 0:
                dense_scales[2 + index] = 0
    backend.logit_gradient(
        logits,
        None,
        labels,
        residuals=_dense_residuals(residuals, teacher.rule),
        **shard,
        maxima=dense_maxima,
        scales=dense_scales,
        out=out,
    )
    # The kept entries: written over whatever the tail's exponent gave there.
    gradient = (kept.logits - maxima[0, :, None]).exp() * scales[0, :, None]
    coefficients = kernel_coefficients(residuals, kept.logits.dtype)
    for (a, b), maximum, mass in zip(coefficients, maxima[1:], scales[2:], strict=True):
        u = reference.residual_logits(kept.logits, kept.log_p, a, b)
        weight = (u - maximum[:, None]).to(gradient.dtype).exp()
        gradient -= (weight * mass[:, None]).masked_fill(mass[:, None] == 0, 0)
    gradient -= scales[1, :, None].masked_fill(kept.ids != labels[:, None], 0)
    active = (labels != ignore_index) & (scales != 0).any(0)
    kept.write(gradient.masked_fill(~active[:, None], 0), out)


@dataclass(frozen=True)
class _Kept:
    """The kept entries that lie on this rank's shard. Nothing here waits for a GPU: no shape depends on the data.

    ids: [n, K]. here: [n, K] bool. first: [n, 1], the first slot that is here, 0 where none is. columns: [n, K] of the
    shard; of a slot that is not here, that of the first. logits, log_p: [n, K] of the student and the teacher, -inf
    where not here.
    """

    ids: Tensor
    here: Tensor
    first: Tensor
    columns: Tensor
    logits: Tensor
    log_p: Tensor

    @classmethod
    def of(cls, logits: Tensor, teacher: SparseTeacher, vocab_start: int, valid_columns: int) -> _Kept:
        local = teacher.ids - vocab_start
        here = (teacher.ids >= 0) & (local >= 0) & (local < valid_columns)
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if here.shape[1] == 0:
            first = here.new_zeros(len(here), 0, dtype=torch.int64)
            return cls(teacher.ids, here, first, local, local.to(work), teacher.log_p.to(work))
        local = local.masked_fill(~here, 0)
        first = here.int().argmax(-1, keepdim=True)
        columns = torch.where(here, local, local.gather(1, first))
        z = logits.gather(1, columns).to(work).masked_fill(~here, -torch.inf)
        return cls(teacher.ids, here, first, columns, z, teacher.log_p.to(work).masked_fill(~here, -torch.inf))

    def write(self, values: Tensor, out: Tensor, rows: slice = slice(None)) -> None:
        """Put values [n, K] of the entries here into their columns of out, of a run of rows.

        The slots of a row that are not here write what its first one writes; in a row without any, what stands there.
        """
        if values.shape[1] == 0:
            return
        here, first, columns = self.here[rows], self.first[rows], self.columns[rows]
        values = values.to(out.dtype)
        otherwise = torch.where(here.gather(1, first), values.gather(1, first), out.gather(1, columns[:, :1]))
        # Not scatter_, which copies a whole 16-bit matrix on the CPU.
        row = torch.arange(len(out), device=out.device)[:, None].expand_as(columns)
        out.index_put_((row, columns), torch.where(here, values, otherwise))

    def label_logit(self, otherwise: Tensor, labels: Tensor) -> Tensor:
        """The label's logit where it is kept and here."""
        is_label = self.here & (self.ids == labels[:, None])
        found = self.logits.masked_fill(~is_label, 0).sum(-1)
        return torch.where(is_label.any(-1), found.to(otherwise.dtype), otherwise)


def _dense_residuals(residuals: Residuals, rule: str) -> Residuals:
    """The exponents outside of the kept entries, up to a constant."""
    dense = {"uniform": lambda a, b: (a, 0.0), "student": lambda a, b: (a + b, 0.0), "drop": lambda a, b: (0.0, 0.0)}
    return tuple((a, b) if b == 0 else dense[rule](a, b) for a, b in residuals)


def _residual_columns(request: StatisticsRequest):
    first = request.width - request.residual_width * len(request.residuals)
    return [(index, first + request.residual_width * index) for index in range(len(request.residuals))]


def _teacher_columns(request: StatisticsRequest):
    """Index and first column of each residual that reads the teacher."""
    return [(index, column) for index, column in _residual_columns(request) if request.residuals[index][1] != 0]


def _moved(sums: Tensor, change: Tensor) -> Tensor:
    """Sums of exponentials whose exponents all change by that; a change that is not finite leaves them."""
    return (sums * change.masked_fill(~change.isfinite(), 0).exp()).to(sums.dtype)


def _add_constant(dense: Tensor, column: int, request: StatisticsRequest, constant: Tensor, dtype: torch.dtype) -> None:
    """Raise a residual's u by a constant; its maximum stays a number of the kernels' dtype: the gradient reads it."""
    exact = dense[..., column] + constant
    dense[..., column] = exact.to(dtype).double()
    change = exact - dense[..., column]
    if request.residual_entropy:
        dense[..., column + 3] += dense[..., column + 1] * change.masked_fill(~change.isfinite(), 0)
    for sums in range(column + 1, column + 3 + request.residual_entropy):
        dense[..., sums] = _moved(dense[..., sums], change)


def _kept_statistics(
    kept: _Kept, labels: Tensor, request: StatisticsRequest, ignore_index: int, *, whole_base: bool
) -> Tensor:
    """The kept entries as a shard of their own.

    whole_base: the other part does not hold them; otherwise only the residuals that read the teacher count here.
    """
    is_label = kept.here & (kept.ids == labels[:, None])
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
        vocab_start=0,
        valid_columns=slots,
        ignore_index=-1,
    )
    top[:, 3] = 0  # the other part has the label's logit
    if not whole_base:
        # m stays: the residuals' sums are centred on it.
        first = _BASE + request.collision
        top[:, 1:first] = 0
        top[:, first : first + request.top_k] = -torch.inf
        for index, column in _residual_columns(request):
            if request.residuals[index][1] == 0:
                top[:, column] = -torch.inf
                top[:, column + 1 : column + request.residual_width] = 0
        top = top.masked_fill((labels == ignore_index)[:, None], 0)
    return top


def _take_out(dense: Tensor, column: int, request: StatisticsRequest, a: float, kept: _Kept) -> None:
    """Subtract the kept entries from the sums over a z.

    Well-conditioned: the tail's constant is not above a kept log_p, so what is subtracted is, in the merged residual,
    not above what the kept entries put in its place.
    """
    centre, maximum = dense[:, :1], dense[:, column, None]
    shifted = (reference.residual_logits(kept.logits, None, a, 0.0) - maximum).to(kept.logits.dtype)
    weight = shifted.exp().masked_fill(~kept.here, 0)

    def total(values: Tensor) -> Tensor:
        return (weight * values).masked_fill(weight == 0, 0).sum(-1).to(dense.dtype)

    dense[:, column + 1] = (dense[:, column + 1] - total(torch.ones_like(weight))).clamp_min(0)
    dense[:, column + 2] -= total(kept.logits - centre)
    if request.residual_entropy:
        dense[:, column + 3] -= total(shifted)


def _log_tail(dense: Tensor, teacher: SparseTeacher, vocab_size: int) -> Tensor:
    """The tail's log-probability of one token, up to what depends on the token: [N] float64."""
    log_mass = teacher.tail.double().log()
    if teacher.rule == "drop":
        return torch.zeros_like(log_mass)
    if teacher.rule == "uniform":
        others = vocab_size - (teacher.ids >= 0).sum(-1)
        return (log_mass - others.clamp_min(1).double().log()).masked_fill(others <= 0, -torch.inf)
    m, s = dense[..., 0], dense[..., 1]
    log_others = torch.logsumexp((m + s.log()).masked_fill(~(s > 0), -torch.inf), dim=0)
    return (log_mass - log_others).masked_fill(log_others == -torch.inf, -torch.inf)
