"""Objectives whose weights are of whole samples: importance ratios and probabilities of all of an answer's tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qtarget_megatron.objectives.registry import LossAndMasses, Objective, TokenInputs, in_range, refuse, register
from qtarget_megatron.statistics import TokenStatistics

_TEACHER = (0.0, 1.0)


@register("iw-sft")
def iw_sft(temperature: float = 1.0, maximum: float = 16.0, start: str = "model") -> Objective:
    """Importance-weighted SFT: a sample counts by how much likelier the model finds it than the one it started from.

    loss = -sg(w) log p(y), w = clamp(exp(temperature mean_t(log p(y) - log p_start(y))), 0, maximum), the mean over the
    supervised tokens of the sample;  c_y = w.  temperature finite, maximum > 0.  start: where log p_start is from:
    "model", the second one, live or cached, which is the model that training starts from; "data", the token input.
    token_inputs: "old_log_prob" where start="data", log p_start(y) in nats, from qtarget score.
    Source: arXiv 2507.12856.

    w is of the model as it is in each step; in the first one every w is 1.
    """
    temperature = in_range("temperature", temperature, -math.inf, math.inf)
    maximum = in_range("maximum", maximum, 0, math.inf, open_low=True)
    if start not in ("model", "data"):
        raise ValueError(f"start must be 'model' or 'data', got {start!r}")

    def log_ratio(stats: TokenStatistics, inputs: TokenInputs) -> Tensor:
        if start == "data":
            return stats.log_p - inputs["old_log_prob"]
        of_start = stats.residuals[0].log_p
        assert of_start is not None  # requested
        return stats.log_p - of_start

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        assert stats.sample_mean is not None  # requested
        weight = (temperature * stats.sample_mean).clamp(max=math.log(maximum)).exp()
        return None, weight, () if start == "data" else (0.0,)

    if start == "data":
        return Objective(evaluate, token_inputs=("old_log_prob",), sample_mean=log_ratio)
    return Objective(evaluate, residuals=(_TEACHER,), residual_label=True, sample_mean=log_ratio)


@register("pear")
def pear(
    level: str = "token",
    gamma: float = 0.999,
    block: int = 4,
    ratio_low: float = -0.08,
    ratio_high: float = 0.3,
    weight_low: float = -10.0,
    weight_high: float = 5.0,
    behavior: str = "model",
) -> Objective:
    """PEAR: a token counts by how likely the model is to go on as the sample does, compared to who wrote it.

    loss = -sg(G) log p(y), log G clamped to weight_low .. weight_high nats;  c_y = G.  With d_j = log p(y_j) -
    log p_behavior(y_j) clamped to ratio_low .. ratio_high, T supervised tokens of the sample and t the token's place:
    level="token": G = gamma^(T-t) exp(sum_{j>t} d_j); "block": the same of the last token of t's block of `block`
    tokens; "sequence": G = exp(sum_j d_j).  gamma in (0, 1], block >= 1.  behavior: where log p_behavior is from:
    "model", the second one, live or cached, which has written the data; "data", the token input.
    token_inputs: "old_log_prob" where behavior="data", log p_behavior(y) in nats, from qtarget score.
    Source: arXiv 2602.01058, with its values as defaults.
    """
    gamma = in_range("gamma", gamma, 0, 1, open_low=True)
    if level not in ("token", "block", "sequence"):
        raise ValueError(f"level must be 'token', 'block' or 'sequence', got {level!r}")
    if behavior not in ("model", "data"):
        raise ValueError(f"behavior must be 'model' or 'data', got {behavior!r}")
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ValueError(f"block must be a whole number of tokens, 1 or more, got {block!r}")
    ratio_high = in_range("ratio_high", ratio_high, -math.inf, math.inf)
    ratio_low = in_range("ratio_low", ratio_low, -math.inf, ratio_high)
    weight_high = in_range("weight_high", weight_high, -math.inf, math.inf)
    weight_low = in_range("weight_low", weight_low, -math.inf, weight_high)

    def log_ratio(stats: TokenStatistics, inputs: TokenInputs) -> Tensor:
        written = inputs["old_log_prob"] if behavior == "data" else stats.residuals[0].log_p
        assert written is not None  # requested
        return (stats.log_p - written).clamp(ratio_low, ratio_high)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        if level == "sequence":
            assert stats.sample_mean is not None and stats.sample_size is not None  # requested
            log_weight = stats.sample_mean * stats.sample_size
        else:
            assert stats.sample_after is not None and stats.tokens_after is not None  # requested
            log_weight = stats.sample_after + stats.tokens_after * math.log(gamma)
        weight = log_weight.clamp(weight_low, weight_high).exp()
        return None, weight, () if behavior == "data" else (0.0,)

    return Objective(
        evaluate,
        residuals=() if behavior == "data" else (_TEACHER,),
        residual_label=behavior == "model",
        token_inputs=("old_log_prob",) if behavior == "data" else (),
        sample_mean=log_ratio if level == "sequence" else None,
        sample_after=None if level == "sequence" else log_ratio,
        sample_block=block if level == "block" else 1,
    )


@register("tsallis", example={"q": 0.9})
def tsallis(q: float) -> Objective:
    """The Tsallis continuum: between the probability of a sample and its logarithm.

    loss = -sg(P^(1-q)) log p(y), P = prod_t p(y_t) over the supervised tokens of the sample;  c_y = P^(1-q).  Its
    gradient, added up over a sample, is that of J_q = (1 - P^(1-q)) / (1 - q).  q in [0, 1], no default: 1 is sft, 0
    counts a sample by its probability, which of long samples is all but 0.  Source: arXiv 2604.25907, for samples
    without a latent rationale.
    """
    q = in_range("q", q, 0, 1)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        assert stats.sample_mean is not None and stats.sample_size is not None  # requested
        weight = ((1 - q) * stats.sample_mean * stats.sample_size).exp() if q < 1 else torch.ones_like(stats.p)
        return None, weight, ()

    return Objective(evaluate, sample_mean=lambda stats, inputs: stats.log_p)


_ROLLOUTS = (
    "it weighs rationales that it samples from the model in every step: sample and weigh them, and use weighted-sft"
)
refuse("paft", _ROLLOUTS)
refuse("garl", _ROLLOUTS)
refuse(
    "cadft",
    "it weighs a sample by the z-score of its mean loss among those of the whole global batch, which is known when the "
    "last micro-batch has been through the model, and public text leaves open how tokens and samples are averaged: see "
    "iw-sft and dft",
)
