"""Further objectives that fit the form, a few lines each, and the names of those that do not fit it."""

from __future__ import annotations

import math

import torch

from qtarget_megatron.objectives.published import deformed_log, kept_or_all, label_and_rest
from qtarget_megatron.objectives.registry import LossAndMasses, Objective, TokenInputs, in_range, refuse, register
from qtarget_megatron.statistics import TokenStatistics


@register("deft")
def deft() -> Objective:
    """DEFT (dynamic entropy fine-tuning): beyond-log whose power is how concentrated the model's distribution is.

    loss = (1 - p(y)^a) / a, a = sg(sum_k p_k^2);  c_y = p(y)^a.  Source: arXiv 2602.11424.
    """

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        assert stats.collision is not None  # requested
        # A token that is not supervised has collision 0, for which the loss has no value.
        return deformed_log(stats, torch.where(stats.supervised, stats.collision, torch.ones_like(stats.p)))

    return Objective(evaluate, collision=True)


@register("focal")
def focal(gamma: float = 2.0) -> Objective:
    """Focal loss: well-learnt tokens count less. Its weight is part of the loss, not detached.

    loss = -(1 - p(y))^gamma log p(y);  c_y = (1 - p)^gamma - gamma p (1 - p)^(gamma-1) log p.  gamma >= 0; 0 is sft.
    Source: arXiv 1708.02002.
    """
    gamma = in_range("gamma", gamma, 0, math.inf)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        rest = -torch.expm1(stats.log_p)
        # log(p) / (1 - p) tends to -1 as p tends to 1, and p log(p) to 0 as p tends to 0.
        slope = torch.where(rest == 0, torch.ones_like(rest), stats.weighted_nll(stats.p) / rest)
        weight = rest**gamma
        return stats.weighted_nll(weight), weight * (1 + gamma * slope), ()

    return Objective(evaluate)


@register("talr")
def talr(tau: float = 1.0) -> Objective:
    """Token-adaptive loss reweighting: the weight exp(-loss / tau) of a token, not normalised over the batch.

    loss = -sg(w) log p(y), w = p(y)^(1/tau);  c_y = w.  tau > 0; 1 is dft, tau -> infinity is sft.
    Source: arXiv 2509.20758.
    """
    tau = in_range("tau", tau, 0, math.inf, open_low=True)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, (stats.log_p / tau).exp(), ()

    return Objective(evaluate)


@register("poly1")
def poly1(epsilon: float = 1.0) -> Objective:
    """Poly-1: cross-entropy with one more term of its expansion in 1 - p(y).

    loss = -log p(y) + epsilon (1 - p(y));  c_y = 1 + epsilon p(y).  epsilon >= -1.  Source: arXiv 2204.12511.
    """
    epsilon = in_range("epsilon", epsilon, -1, math.inf)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        loss = stats.weighted_nll(torch.ones_like(stats.p)) - epsilon * torch.expm1(stats.log_p)
        return loss, 1 + epsilon * stats.p, ()

    return Objective(evaluate)


@register("gift", example={"beta": 1.0})
def gift(beta: float) -> Objective:
    """GIFT: the base model, tilted towards the label by a finite reward.

    loss = CE(Q, p), Q_k proportional to base_k exp(beta [k = y]), which is gamma onehot(y) + (1 - gamma) base with
    gamma = c / (1 + c), c = (exp(beta) - 1) base(y);  c_y = gamma, c_r = 1 - gamma.  beta >= 0, no default: 0 is the
    base model alone, beta -> infinity is sft.  Source: arXiv 2601.09233.
    """
    beta = in_range("beta", beta, 0, math.inf)
    # log(exp(beta) - 1), so written that a large beta does not overflow.
    log_tilt = beta + math.log(-math.expm1(-beta)) if beta else -math.inf

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        base_log_p = stats.residuals[0].log_p
        assert base_log_p is not None  # requested
        return None, *label_and_rest(torch.nn.functional.logsigmoid(base_log_p + log_tilt))

    return Objective(evaluate, residuals=((0.0, 1.0),), residual_label=True)


@register("entropy-mask", example={"threshold": 2.0})
def entropy_mask(threshold: float, keep: str = "high", denominator: str = "all") -> Objective:
    """Trains only on the tokens where the model is undecided (or, keep="low", decided).

    loss = -1[H >= threshold] log p(y);  c_y = the indicator.  H: entropy of p in nats; threshold >= 0 in nats, no
    default. keep: "high" (H >= threshold) or "low" (H < threshold).  denominator: what the batch's mean is taken over,
    "all" supervised tokens or the "kept" ones.
    """
    threshold = in_range("threshold", threshold, 0, math.inf)
    if keep not in ("high", "low"):
        raise ValueError(f"keep must be 'high' or 'low', got {keep!r}")

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        high = stats.entropy >= threshold
        return None, (high if keep == "high" else ~high).to(stats.p.dtype), ()

    return Objective(evaluate, denominator=kept_or_all(denominator))


refuse("gem-logsigmoid", "its residual weighs every token of the vocabulary by itself: use gem (linear)")
