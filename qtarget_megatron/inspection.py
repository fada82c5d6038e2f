"""See the target: which distribution a loss pulls the model to, for any differentiable loss and for every objective.

With p = softmax(z) and a loss L, the induced target is Q = p - dL/dz. It reads as

    Q = gamma onehot(y) + (1 - gamma) residual

gamma is the trust in the observed token y, the residual is where the rest of the mass goes. ``induced_target`` takes
this reading from the gradient of any loss; ``target_distribution`` knows the masses of an objective, so that its trust
is the label mass c_y and nothing is assumed; ``inspect`` compares objectives on one sample, as plain data.

Everything is computed in float64 on copies of whole rows, for one process: a microscope, not a training path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtarget_megatron.loss.cross_entropy import qtarget_cross_entropy
from qtarget_megatron.loss.samples import Samples
from qtarget_megatron.objectives import Objective
from qtarget_megatron.statistics import IGNORE_INDEX

# A token, or a reading of one, as plain data.
_Entry = dict[str, Any]
# Below this trust a token counts as hardly trained on in the comparison of objectives.
LOW_TRUST = 0.1
# A probability that is rounding error.
_NOTHING = 1e-9
# Rows are looked at in pieces of this many logits (float64: 8 MiB for each of about 4 copies per objective).
_LOGITS_AT_ONCE = 2**20


@dataclass(frozen=True)
class InducedTarget:
    """The target distribution that a loss induces, and how it reads. Every tensor is float64.

    q:          [..., V], Q = p - dL/dz. Sums to 1 where the gradient's row sums to 0; entries may be negative.
    p:          [..., V], softmax(z).
    gradient:   [..., V], dL/dz of the summed loss.
    labels:     [...], as given.
    supervised: [...] bool, True where the label is not ignore_index. Elsewhere q, p and gradient are 0, and the
                properties are 0, NaN or False as each of them says.
    tolerance:  what counts as 0 in valid, and as 1 in residual.
    """

    q: Tensor
    p: Tensor
    gradient: Tensor
    labels: Tensor
    supervised: Tensor
    tolerance: float

    @property
    def label_probability(self) -> Tensor:
        """[...], Q_y: the observed token's entry of the target. 0 where not supervised."""
        return _at_label(self.q, self.labels, self.supervised)

    @property
    def trust(self) -> Tensor:
        """[...], gamma = (Q_y - p_y) / (1 - p_y). NaN where p_y = 1 or not supervised.

        Assumes that the residual gives the label the model's own share, p_y. Exact where the residual is the model
        itself, i.e. for every reweighted -c log p(y): gamma = c (sft 1, dft p_y, beyond_log p_y^alpha, ...).
        """
        # Summing the others keeps the precision of 1 - p_y near 1.
        others = _without_label(self.p, self.labels, self.supervised).sum(-1)
        gamma = -_at_label(self.gradient, self.labels, self.supervised) / others
        return torch.where(others > 0, gamma, torch.full_like(gamma, math.nan))

    @property
    def residual(self) -> Tensor:
        """[..., V], (Q - trust onehot(y)) / (1 - trust): where the mass goes that the label is not trusted with.

        Sums to 1 where Q does; entries may be negative. Rests on the assumption of trust. NaN where trust is 1 (within
        tolerance: all mass is the label's), where p_y = 1 and where not supervised.
        """
        trust = self.trust[..., None]
        rest = torch.where((1 - trust).abs() > self.tolerance, 1 - trust, torch.full_like(trust, math.nan))
        return (self.q - trust * _onehot(self.q, self.labels, self.supervised)) / rest

    @property
    def moved_mass(self) -> Tensor:
        """[...], 1/2 sum_k |Q_k - p_k|: the mass that the loss wants moved, half the L1 norm of its gradient.

        0 where not supervised.
        """
        return self.gradient.abs().sum(-1) / 2

    @property
    def gradient_sum(self) -> Tensor:
        """[...], sum_k dL/dz_k. Not 0: the loss reads more of z than softmax(z) does, and Q does not sum to 1."""
        return self.gradient.sum(-1)

    @property
    def valid(self) -> Tensor:
        """[...] bool: Q is a distribution, with no entry below -tolerance and a sum of 1 within it.

        False where not supervised.
        """
        return (self.q.amin(-1) >= -self.tolerance) & ((self.q.sum(-1) - 1).abs() <= self.tolerance)


@dataclass(frozen=True)
class ObjectiveTarget(InducedTarget):
    """The target of one of the objectives, whose masses are known. Per token [...], float64, 0 where not supervised.

    loss:          its value, in nats.
    label_mass:    c_y.
    residual_mass: sum of the c_i.
    log_p, entropy: log p(y), and -sum_k p_k log p_k, in nats.
    """

    loss: Tensor
    label_mass: Tensor
    residual_mass: Tensor
    log_p: Tensor
    entropy: Tensor

    @property
    def trust(self) -> Tensor:
        """[...], gamma = c_y: raw Q = c_y onehot(y) + sum_i c_i r_i + (1 - M) p, so that nothing is assumed.

        NaN where not supervised. Training logs the trust of normalised Q', which is normalised_trust.
        """
        return torch.where(self.supervised, self.label_mass, torch.full_like(self.label_mass, math.nan))

    @property
    def total_mass(self) -> Tensor:
        """[...], M = c_y + sum_i c_i."""
        return self.label_mass + self.residual_mass

    @property
    def normalised_trust(self) -> Tensor:
        """[...], c_y / M. NaN where M = 0, unsupervised tokens among them."""
        return self.label_mass / _or_nan(self.total_mass)

    @property
    def normalised(self) -> Tensor:
        """[..., V], Q' = (c_y onehot(y) + sum_i c_i r_i) / M: where the objective is at rest. NaN where M = 0.

        Computed as p - g / M, which is the same because g = M p - c_y onehot(y) - sum_i c_i r_i.
        """
        return self.p - self.gradient / _or_nan(self.total_mass)[..., None]


def induced_target(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: str = "sum",
    ignore_index: int = IGNORE_INDEX,
    dtype: torch.dtype | None = torch.float64,
    tolerance: float = 1e-6,
) -> InducedTarget:
    """The target that any differentiable loss induces: Q = p - dL/dz.

    Args:
        loss_fn: (logits, labels) -> the loss of each token (shape of labels), or one scalar. It gets a copy of the
            logits, which it may overwrite, and the labels with ignore_index in them. Whatever it detaches stays
            detached.
        logits: ``[..., V]``, floating point, whole rows.
        labels: ``[...]`` int64.
        reduction: what a scalar is, "sum" or "mean" over the supervised tokens; a mean's gradient is multiplied back.
        ignore_index: label without supervision.
        dtype: what loss_fn computes in. None: the dtype of logits, for a function that takes no float64. One that casts
            inside needs nothing: its gradient comes back with the precision it computed in.
        tolerance: of the reading (see InducedTarget). Raise it for a loss computed in bfloat16.

    The caller's tensors are neither changed nor given a gradient; works under no_grad and inference_mode. Where a
    token's loss depends on other tokens' logits, row t of the gradient is that of the summed loss.

    Raises ValueError for wrong shapes or dtypes, labels outside of the vocabulary, no supervised token, a loss that is
    not finite or does not depend on the logits, and a loss that trains tokens without supervision. Gradient rows that
    do not sum to 0 are no error: see gradient_sum and valid.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    with torch.inference_mode(False), torch.enable_grad():
        supervised = _check(logits, labels, ignore_index)
        leaf = _copy(logits, supervised, dtype or logits.dtype).requires_grad_()
        # A clone is no leaf: loss_fn may work in place, as Megatron's own cross-entropy does.
        loss = loss_fn(leaf.clone(), labels.clone())
        total = _total(loss, supervised, reduction)
        (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
    if gradient is None:
        raise ValueError("loss_fn's result does not depend on the logits: it has no gradient to read")
    gradient = gradient.double()
    strays = (gradient != 0).any(-1) & ~supervised
    if strays.any():
        raise ValueError(
            f"loss_fn gives a gradient to {int(strays.sum())} token(s) without supervision (label {ignore_index}): "
            "leave them out of its sum or mean"
        )
    p = _zero_where_not(supervised, leaf.detach().double().softmax(-1))
    return InducedTarget(p - gradient, p, gradient, labels.clone(), supervised, tolerance)


def target_distribution(
    objective: Objective,
    logits: Tensor,
    labels: Tensor,
    *,
    teacher_logits: Tensor | None = None,
    token_inputs: Mapping[str, Tensor] | None = None,
    samples: Samples | None = None,
    ignore_index: int = IGNORE_INDEX,
    tolerance: float = 1e-6,
) -> ObjectiveTarget:
    """The target of an objective: raw Q = p - g, and normalised Q' = (c_y onehot(y) + sum_i c_i r_i) / M.

    Args:
        objective: from qtarget_megatron.objectives.
        logits, teacher_logits: ``[..., V]``, whole rows without padding columns; teacher_logits as the objective needs.
        labels: ``[...]`` int64.
        token_inputs: per-token side inputs of the objective, each ``[...]``.
        samples: of the tokens, for an objective that takes means over them. Default: a row of labels is one.
        ignore_index, tolerance: see induced_target.

    The caller's tensors are neither changed nor given a gradient. A loss may be infinite (p(y) = 0); its target is not.
    Raises ValueError as qtarget_cross_entropy does, and for no supervised token.
    """
    with torch.inference_mode(False), torch.enable_grad():
        supervised = _check(logits, labels, ignore_index)
        leaf = _copy(logits, supervised, torch.float64).requires_grad_()
        if teacher_logits is not None and objective.needs_teacher:
            teacher_logits = teacher_logits.detach().to(torch.float64, copy=True)
        loss, stats = qtarget_cross_entropy(
            leaf,
            labels.clone(),
            objective=objective,
            teacher_logits=teacher_logits if objective.needs_teacher else None,
            token_inputs={name: value.detach().clone() for name, value in (token_inputs or {}).items()},
            samples=_rows_as_samples(labels) if samples is None else samples,
            ignore_index=ignore_index,
            return_statistics=True,
        )
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert stats.label_mass is not None and stats.residual_mass is not None  # the objective has been evaluated
    p = _zero_where_not(supervised, leaf.detach().softmax(-1))
    return ObjectiveTarget(
        p - gradient,
        p,
        gradient,
        labels.clone(),
        supervised,
        tolerance,
        loss=loss.detach(),
        label_mass=stats.label_mass,
        residual_mass=stats.residual_mass,
        log_p=stats.log_p,
        entropy=stats.entropy,
    )


def _rows_as_samples(labels: Tensor) -> Samples:
    """Each run of the last dimension is a sample."""
    rows = labels.numel() // max(labels.shape[-1], 1) if labels.dim() else 1
    ids = torch.arange(rows, device=labels.device).repeat_interleave(labels.numel() // max(rows, 1))
    return Samples(ids.view(labels.shape), max(rows, 1))


def inspect(
    objectives: Sequence[Objective],
    logits: Tensor,
    labels: Tensor,
    *,
    decode: Callable[[int], str],
    teacher_logits: Tensor | None = None,
    token_inputs: Mapping[str, Tensor] | None = None,
    top: int = 5,
    ignore_index: int = IGNORE_INDEX,
) -> dict[str, Any]:
    """Objectives compared on one sample, as plain data (dicts, lists, numbers, text) that json can write.

    Args:
        objectives: at least one.
        logits, teacher_logits: ``[S, V]``, whole rows without padding columns.
        labels: ``[S]`` int64: labels[t] is the token that logits[t] predicts.
        decode: token id -> its text.
        token_inputs: per-token side inputs that the objectives name, each ``[S]``.
        top: how many of the likeliest tokens to list, under p and under Q each.
        ignore_index: label without supervision; such tokens are not listed.

    Returns a dict; lengths in nats, None for a number that is undefined or not finite:
        num_tokens, vocab_size, low_trust (the bound of low_trust_share), mean_p, mean_log_p, mean_entropy
        objectives: one per objective, in order:
            objective (name with parameters), name, parameters, needs_teacher; means over the supervised tokens of what
            is listed for each of them: mean_loss, mean_trust, mean_residual_mass, mean_total_mass, mean_moved_mass,
            mean_label_probability; low_trust_share: of the tokens, those with trust < low_trust; valid_share: those
            whose raw Q is a distribution
        tokens: one per supervised token:
            position (index in labels), id, text, p (of the label), log_p, entropy
            objectives: one per objective, in order:
                loss, trust (c_y), residual_mass, total_mass (M), normalised_trust (c_y / M), moved_mass
                (1/2 sum |Q - p|, half the L1 norm of the gradient), label_probability (Q_y), valid
                alternatives: the label and the top tokens under p and under the raw Q of any of the objectives, by
                    falling max(p, q): id, text, p, q, change (q - p), normalised (Q')
    """
    if not objectives:
        raise ValueError("objectives: expected at least one, got none")
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise ValueError(f"top must be a whole number of tokens, 1 or more, got {top!r}")
    if labels.dim() != 1:
        raise ValueError(f"labels must be [S] of one sample, got {list(labels.shape)}")
    supervised = _check(logits, labels, ignore_index)
    for name, given in {"teacher_logits": teacher_logits, **(token_inputs or {})}.items():
        # Before rows are cut out of it: the loss would then check the pieces only.
        if given is not None and given.shape[:1] != labels.shape:
            raise ValueError(f"{name} must have {len(labels)} rows like labels, got {list(given.shape)}")
    rows = supervised.nonzero()[:, 0]
    tokens: list[_Entry] = []
    at_once = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    if any(objective.needs_samples for objective in objectives):
        at_once = len(rows)  # what is of the sample needs all of it
    for piece in torch.split(rows, at_once):
        targets = [
            target_distribution(
                objective,
                logits[piece],
                labels[piece],
                teacher_logits=None if teacher_logits is None else teacher_logits[piece],
                token_inputs={name: value[piece] for name, value in (token_inputs or {}).items()},
            )
            for objective in objectives
        ]
        entries = _token_entries(targets[0], piece, decode)
        listed = _listed_ids(targets, top)
        for target in targets:
            for entry, reading in zip(entries, _readings(target, listed, decode), strict=True):
                entry["objectives"].append(reading)
        tokens += entries
    return {
        "num_tokens": len(tokens),
        "vocab_size": logits.shape[-1],
        "low_trust": LOW_TRUST,
        **{f"mean_{key}": _mean(tokens, key) for key in ("p", "log_p", "entropy")},
        "objectives": [
            _summary(objective, [token["objectives"][i] for token in tokens]) for i, objective in enumerate(objectives)
        ],
        "tokens": tokens,
    }


# ---- one sample as plain data


def _token_entries(target: ObjectiveTarget, positions: Tensor, decode: Callable[[int], str]) -> list[_Entry]:
    p = _at_label(target.p, target.labels, target.supervised)
    columns = (positions, target.labels, p, target.log_p, target.entropy)
    return [
        {
            "position": position,
            "id": label,
            "text": decode(label),
            "p": _number(p_y),
            "log_p": _number(log_p),
            "entropy": _number(entropy),
            "objectives": [],
        }
        for position, label, p_y, log_p, entropy in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _listed_ids(targets: Sequence[ObjectiveTarget], top: int) -> list[list[int]]:
    """For each token the label and the likeliest under p and under the Q of each objective, without repetition."""
    labels, p = targets[0].labels, targets[0].p
    k = min(top, p.shape[-1])
    columns = [labels[:, None], p.topk(k).indices]
    # A one-hot target has no second token: rounding would choose one, so the label stands in for it.
    for best in (target.q.topk(k) for target in targets):
        columns.append(torch.where(best.values > _NOTHING, best.indices, labels[:, None]))
    return [list(dict.fromkeys(row)) for row in torch.cat(columns, dim=-1).tolist()]


def _readings(target: ObjectiveTarget, listed: list[list[int]], decode: Callable[[int], str]) -> list[_Entry]:
    names = ("loss", "trust", "residual_mass", "total_mass", "normalised_trust", "moved_mass", "label_probability")
    columns = [getattr(target, name).tolist() for name in names]
    valid, normalised = target.valid.tolist(), target.normalised
    readings = []
    for row, values in enumerate(zip(*columns, strict=True)):
        ids = listed[row]
        p, q, q_normalised = (part[row, ids].tolist() for part in (target.p, target.q, normalised))
        alternatives: list[_Entry] = [
            {
                "id": index,
                "text": decode(index),
                "p": _number(p[i]),
                "q": _number(q[i]),
                "change": _number(q[i] - p[i]),
                "normalised": _number(q_normalised[i]),
            }
            for i, index in enumerate(ids)
        ]
        alternatives.sort(key=lambda one: -max(one["p"] or 0.0, one["q"] or 0.0))
        reading = {name: _number(value) for name, value in zip(names, values, strict=True)}
        readings.append({**reading, "valid": valid[row], "alternatives": alternatives})
    return readings


def _summary(objective: Objective, readings: list[_Entry]) -> _Entry:
    averaged = ("loss", "trust", "residual_mass", "total_mass", "moved_mass", "label_probability")
    return {
        "objective": str(objective),
        "name": objective.name,
        "parameters": {
            key: value if isinstance(value, int | float | str | None) else str(value)
            for key, value in objective.parameters
        },
        "needs_teacher": objective.needs_teacher,
        **{f"mean_{key}": _mean(readings, key) for key in averaged},
        "low_trust_share": sum(r["trust"] is not None and r["trust"] < LOW_TRUST for r in readings) / len(readings),
        "valid_share": sum(r["valid"] for r in readings) / len(readings),
    }


def _mean(entries: list[_Entry], key: str) -> float | None:
    values = [entry[key] for entry in entries]
    return None if None in values else math.fsum(values) / len(values)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- rows and labels


def _check(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Which tokens are supervised. ValueError for what neither a loss nor a target can be computed of."""
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 token ids, got {labels.dtype}")
    if logits.dim() == 0 or logits.shape[:-1] != labels.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be [..., V] with labels [...], got logits {list(logits.shape)} and labels "
            f"{list(labels.shape)}"
        )
    supervised = labels != ignore_index
    if not supervised.any():
        raise ValueError(f"all labels are ignore_index={ignore_index}: expected a supervised token")
    wrong = supervised & ((labels < 0) | (labels >= logits.shape[-1]))
    if wrong.any():
        came = int(labels[wrong][0])
        raise ValueError(f"labels must be in 0..{logits.shape[-1] - 1} or ignore_index={ignore_index}, got {came}")
    return supervised


def _copy(logits: Tensor, supervised: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy without history; rows that are not supervised are 0, so that whatever they hold cannot leak."""
    return _zero_where_not(supervised, logits.detach().to(dtype, copy=True))


def _total(loss: Tensor, supervised: Tensor, reduction: str) -> Tensor:
    """The loss summed over the supervised tokens."""
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        came = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a floating-point tensor, got {came}")
    if loss.shape == supervised.shape:
        total = torch.where(supervised, loss, torch.zeros_like(loss)).sum()
    elif loss.dim() == 0:
        total = loss * supervised.sum() if reduction == "mean" else loss
    else:
        raise ValueError(
            f"loss_fn must return one loss per token {list(supervised.shape)} or a scalar, got {list(loss.shape)}"
        )
    if not total.isfinite():
        count = int((supervised & ~loss.isfinite()).sum()) if loss.shape == supervised.shape else 0
        where = f" at {count} supervised token(s)" if count else ""
        raise ValueError(f"loss_fn's loss is not finite{where}: {total.item()}")
    if not total.requires_grad:
        raise ValueError("loss_fn's result does not depend on the logits: it has no gradient to read")
    return total


def _at_label(rows: Tensor, labels: Tensor, supervised: Tensor) -> Tensor:
    index = torch.where(supervised, labels, torch.zeros_like(labels))
    return rows.gather(-1, index[..., None])[..., 0]


def _without_label(rows: Tensor, labels: Tensor, supervised: Tensor) -> Tensor:
    return rows.masked_fill(_onehot(rows, labels, supervised) != 0, 0.0)


def _onehot(rows: Tensor, labels: Tensor, supervised: Tensor) -> Tensor:
    index = torch.where(supervised, labels, torch.zeros_like(labels))
    return torch.zeros_like(rows).scatter_(-1, index[..., None], 1.0)


def _zero_where_not(supervised: Tensor, rows: Tensor) -> Tensor:
    return torch.where(supervised[..., None], rows, torch.zeros_like(rows))


def _or_nan(mass: Tensor) -> Tensor:
    return torch.where(mass == 0, torch.full_like(mass, math.nan), mass)
