"""The objectives of the published SFT methods, each from token statistics to (loss, label mass, residual masses).

sg(.) is the stop-gradient: every weight and every target is detached, which the form of the gradient implies. p(y) is
the model's probability of the label, p_k that of token k, KL and CE are over the vocabulary, losses are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qtarget_megatron.objectives.registry import LossAndMasses, Objective, TokenInputs, in_range, register
from qtarget_megatron.statistics import TokenStatistics

_TEACHER = (0.0, 1.0)  # r = softmax(t): teacher, reference or base model
_UNIFORM = (0.0, 0.0)
_SATURATED = 20.0  # psft's largest log-ratio


@register("sft")
def sft() -> Objective:
    """Supervised fine-tuning: one-hot cross-entropy.

    loss = -log p(y);  c_y = 1.  All trust in the observed token.
    """

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, 1.0, ()

    return Objective(evaluate)


@register("dft")
def dft() -> Objective:
    """Dynamic fine-tuning: the likelihood weighs the token.

    loss = -sg(p(y)) log p(y);  c_y = p(y).  The weight is detached: without it the gradient changes sign at
    p(y) = 1/e.  Source: arXiv 2508.05629.
    """

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, stats.p, ()

    return Objective(evaluate)


@register("beyond-log", example={"alpha": 0.5})
def beyond_log(alpha: float) -> Objective:
    """Beyond log likelihood: a power of the likelihood in place of its logarithm.

    loss = (1 - p(y)^alpha) / alpha;  c_y = p(y)^alpha.  alpha is any finite number and has no default: 1 has the
    gradient of dft, alpha -> 0 is sft (0 is accepted as that limit), alpha < 0 trusts unlikely tokens more (mass above
    1).  Source: arXiv 2510.00526.
    """
    alpha = in_range("alpha", alpha, -math.inf, math.inf)
    if alpha == 0:
        return sft()

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return deformed_log(stats, torch.full_like(stats.p, alpha))

    return Objective(evaluate)


@register("profit")
def profit(tau: float = 0.1, denominator: str = "all") -> Objective:
    """ProFit: only tokens that the model finds probable enough are trained on.

    loss = -1[p(y) >= tau] log p(y);  c_y = 1[p(y) >= tau].  tau in [0, 1]; 0 is sft.  denominator: what the batch's
    mean is taken over, "all" supervised tokens (as the released code where it accumulates gradients over the tokens of
    a batch) or the "kept" ones (as it does otherwise).  Source: arXiv 2601.09195.
    """
    tau = in_range("tau", tau, 0, 1)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, (stats.p >= tau).to(stats.p.dtype), ()

    return Objective(evaluate, denominator=kept_or_all(denominator))


@register("eaft")
def eaft(k: int = 20, normalizer: float | None = None, exponent: float = 1.0) -> Objective:
    """Entropy-adaptive fine-tuning: tokens count by how undecided the model is.

    loss = -sg(h) log p(y), h = (H / normalizer)^exponent;  c_y = h.  H: entropy in nats of the softmax over the k
    largest logits (all of them where the vocabulary is smaller), exact over tensor-parallel shards.  k >= 2;
    normalizer > 0, default ln k, so that h is in [0, 1] (the released code divides by 3.0 with k = 20); exponent >= 0.
    Source: arXiv 2601.02151.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 2:
        raise ValueError(f"k must be a whole number of logits, 2 or more, got {k!r}")
    normalizer = math.log(k) if normalizer is None else in_range("normalizer", normalizer, 0, math.inf, open_low=True)
    exponent = in_range("exponent", exponent, 0, math.inf)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, (stats.top_k_entropy() / normalizer) ** exponent, ()

    return Objective(evaluate, top_k=k)


@register("infosft")
def infosft(p_bar: float = 0.93) -> Objective:
    """InfoSFT: tokens count by how much they tell: neither those that the model knows nor those that it rules out.

    loss = -sg(w) log p(y), w = p(y) max(0, 1 - logit p(y) / logit p_bar), logit p = log(p / (1 - p));  c_y = w.
    p_bar in (0.5, 1): a token that is likelier has no weight; the paper's and the released code's value is the default.
    w is 0.18 at p(y) = 0.1 and largest, 0.51, near p(y) = 0.6.  Source: arXiv 2605.14967.
    """
    if not isinstance(p_bar, float) or not 0.5 < p_bar < 1:
        raise ValueError(f"p_bar must be a number in (0.5, 1), got {p_bar!r}")
    largest = math.log(p_bar) - math.log1p(-p_bar)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        logit = stats.log_p - torch.log(-torch.expm1(stats.log_p))
        # p log p tends to 0 as p does.
        weight = torch.where(stats.p == 0, stats.p, stats.p * (1 - logit / largest).clamp(min=0))
        return None, weight, ()

    return Objective(evaluate)


@register("idft")
def idft(beta: float = 1.0, gamma_min: float = 0.1, gamma_max: float = 2.0) -> Objective:
    """IDFT (in-distribution fine-tuning): a power of the likelihood, the higher the less the label is a draw of p.

    loss = -sg(p(y)^gamma) log p(y), gamma = clamp(exp(-(log p(y) + H) / beta), gamma_min, gamma_max);
    c_y = p(y)^gamma.  H: entropy of p in nats, the mean of -log p(y) over labels drawn from p.  beta > 0,
    0 < gamma_min <= gamma_max; the defaults are those of the released training.  Source: arXiv 2602.12222.
    """
    beta = in_range("beta", beta, 0, math.inf, open_low=True)
    gamma_max = in_range("gamma_max", gamma_max, 0, math.inf, open_low=True)
    gamma_min = in_range("gamma_min", gamma_min, 0, gamma_max, open_low=True)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        exponent = -(stats.log_p + stats.entropy) / beta
        gamma = exponent.clamp(math.log(gamma_min), math.log(gamma_max)).exp()
        return None, (gamma * stats.log_p).exp(), ()

    return Objective(evaluate)


@register("weighted-sft")
def weighted_sft() -> Objective:
    """SFT with a weight for each token, or one for the whole sample, that the data says.

    loss = -w log p(y);  c_y = w.  token_inputs: "weight": a reward, a quality score, a multiplier of one's own, or what
    qtarget score --reference-hf computes, iw-sft's weight for two frozen models.
    """

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, inputs["weight"], ()

    return Objective(evaluate, token_inputs=("weight",))


@register("wit", example={"prompt": 0.3, "response": 0.8})
def wit(prompt: float, response: float) -> Objective:
    """Weighted instruction tuning: prompts are trained on as well, each kind of token by a weight of its own.

    loss = -w log p(y), w = prompt for a token of the prompt, response for one of the answer;  c_y = w.  prompt and
    response >= 0, no defaults (the paper finds 0 to 0.5 and 0.5 to 1 best; 0 and 1 is sft); not both 0. The mean is
    over the tokens whose weight is not 0.
    token_inputs: "is_prompt", which no record needs: with it all tokens of a record up to the end of its last answer
    are targets, and those that are of no answer are prompt.  Source: arXiv 2507.07817.
    """
    prompt, response = in_range("prompt", prompt, 0, math.inf), in_range("response", response, 0, math.inf)
    if prompt == response == 0:
        raise ValueError("prompt and response must not both be 0: nothing would be trained")

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, response + (prompt - response) * inputs["is_prompt"], ()

    return Objective(evaluate, token_inputs=("is_prompt",), denominator="label_mass")


@register("cft")
def cft(denominator: str = "all") -> Objective:
    """Critical-token fine-tuning: only the tokens marked critical are trained on.

    loss = -c log p(y), c in {0, 1};  c_y = c.  token_inputs: "critical".  denominator: what the batch's mean is taken
    over, "all" supervised tokens or the "critical" ones.  Source: arXiv 2510.10974.
    """
    if denominator not in ("all", "critical"):
        raise ValueError(f"denominator must be 'all' or 'critical', got {denominator!r}")

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, inputs["critical"], ()

    counted = "critical" if denominator == "critical" else None
    return Objective(evaluate, token_inputs=("critical",), denominator=counted)


@register("label-smoothing")
def label_smoothing(lam: float = 0.1) -> Objective:
    """Label smoothing with the uniform distribution over the true vocabulary (y included, padding not).

    loss = -(1 - lam) log p(y) - lam/V sum_v log p_v;  c_y = 1 - lam, c_r = lam, r uniform.  lam in [0, 1]; 0 is sft.
    Source: arXiv 1512.00567.
    """
    lam = in_range("lam", lam, 0, 1)
    if lam == 0:
        return sft()

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, 1 - lam, (lam,)

    return Objective(evaluate, residuals=(_UNIFORM,))


@register("sft-kl", example={"lam": 0.5})
def sft_kl(lam: float) -> Objective:
    """SFT with a pull towards a reference model, forward KL.

    loss = -log p(y) + lam KL(ref || p);  c_y = 1, c_r = lam, r = softmax(t) of the reference (M = 1 + lam).  lam >= 0,
    no default; 0 is sft and reads no reference.  Source: the baseline in arXiv 2509.04259.
    """
    lam = in_range("lam", lam, 0, math.inf)
    return _with_divergence(lam, torch.ones_like) if lam else sft()


@register("asft")
def asft(lam: float = 0.05) -> Objective:
    """Anchored SFT: dft with a pull towards the base model.

    loss = -sg(p(y)) log p(y) + lam KL(base || p);  c_y = p(y), c_r = lam, r = softmax(t) of the base model.  lam >= 0;
    0 is dft and reads no base model. 0.05 is the paper's value, its released code has 0.1.  Source: arXiv 2509.23753.
    """
    lam = in_range("lam", lam, 0, math.inf)
    return _with_divergence(lam, lambda p: p) if lam else dft()


@register("psft")
def psft(epsilon_low: float = 0.2, epsilon_high: float = 0.28, refresh: int = 8) -> Objective:
    """Proximal SFT: a clipped likelihood ratio to the model as it was some updates ago.

    loss = -min(r, clip(r, 1 - epsilon_low, 1 + epsilon_high)), r = p(y) / p_old(y);
    c_y = r where r <= 1 + epsilon_high, else 0.  The log-ratio is clamped to +-20; where it is, the mass is 0 like the
    derivative.  epsilon_low (in [0, 1]) is the paper's and never acts, because the minimum takes the smaller r;
    epsilon_high >= 0.  refresh: p_old is the second model, which is the trained one as it was at the last step that
    this number divides; 0: p_old is of the token input, the same in every step.
    token_inputs: "old_log_prob" where refresh=0, log p_old(y) in nats, from qtarget score.  Source: arXiv 2508.17784.

    The released method takes p_old anew every 8 updates. With one that stays no token is trained beyond
    (1 + epsilon_high) times its first probability, and training stalls when the tokens have got there. Training keeps
    the old model beside the trained one, in its checkpoints as well: its weights once more, and its forward.
    """
    epsilon_low = in_range("epsilon_low", epsilon_low, 0, 1)
    epsilon_high = in_range("epsilon_high", epsilon_high, 0, math.inf)
    if not isinstance(refresh, int) or isinstance(refresh, bool) or refresh < 0:
        raise ValueError(f"refresh must be a whole number of steps, or 0, got {refresh!r}")

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        old = stats.residuals[0].log_p if refresh else inputs["old_log_prob"]
        assert old is not None  # requested
        log_ratio = stats.log_p - old
        ratio = log_ratio.clamp(-_SATURATED, _SATURATED).exp()
        loss = -torch.minimum(ratio, ratio.clamp(1 - epsilon_low, 1 + epsilon_high))
        moves = (ratio <= 1 + epsilon_high) & (log_ratio.abs() <= _SATURATED)
        return loss, ratio.masked_fill(~moves, 0.0), (0.0,) if refresh else ()

    if refresh:
        return Objective(evaluate, residuals=(_TEACHER,), residual_label=True, refresh=refresh)
    return Objective(
        evaluate,
        token_inputs=("old_log_prob",),
        note="old log-probabilities stay as the data has them, so that no token is trained beyond "
        f"{1 + epsilon_high:g} times its probability there; the released psft renews them every 8 updates",
    )


@register("gem")
def gem(beta: float = 0.7, h: str = "linear") -> Objective:
    """GEM (game-theoretic entropy maximisation): SFT that spreads the rest by the model's own tempered distribution.

    loss = CE(onehot(y), p) - CE(sg(q), p), q = softmax(z / beta);  c_y = 1, c_r = -1, r = q (M = 0, so that there is no
    target distribution and no trust).  beta > 0; 1 has the gradient of sft.  Source: arXiv 2408.16673.

    h="logsigmoid", which the released scripts run, is refused: its gradient q_k w_k - W [k = y], with
    w_k = sigmoid((z_k - z_y) / 100) and W = sum_k q_k w_k, weighs every token of the vocabulary by itself, and no
    softmax(a z + b t) is such a residual.
    """
    beta = in_range("beta", beta, 0, math.inf, open_low=True)
    if h != "linear":
        reason = (
            "its residual q_k sigmoid((z_k - z_y)/100) is no softmax(a z + b t): use h='linear', the paper's other form"
            if h == "logsigmoid"
            else "expected 'linear'"
        )
        raise ValueError(f"gem(h={h!r}) is not available: {reason}")

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, 1.0, (-1.0,)

    return Objective(evaluate, residuals=((1 / beta, 0.0),))


@register("kd")
def kd(temperature: float = 1.0) -> Objective:
    """Knowledge distillation: forward KL from the teacher, at a temperature T.

    loss = T^2 KL(teacher_T || p_T) with p_T = softmax(z/T), teacher_T = softmax(t/T);  c_y = 0.
    T = 1: one residual r = teacher with c_r = 1 (M = 1).  T != 1: g = T (p_T - teacher_T), which is two residuals,
    (1/T, 0) with mass -T and (0, 1/T) with mass T (M = 0).  T > 0.  Source: arXiv 1503.02531.
    """
    temperature = in_range("temperature", temperature, 0, math.inf, open_low=True)
    if temperature == 1:
        return _with_divergence(1.0, torch.zeros_like)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        student, teacher = stats.residuals
        assert teacher.entropy is not None  # requested
        cross_entropy = student.lse - teacher.mean_logit / temperature
        loss = temperature**2 * (cross_entropy - teacher.entropy)
        return loss, torch.zeros_like(stats.p), (-temperature, temperature)

    return Objective(evaluate, residuals=((1 / temperature, 0.0), (0.0, 1 / temperature)), residual_entropy=True)


@register("hybrid-kd")
def hybrid_kd(lam: float = 0.5) -> Objective:
    """Labels and a teacher together.

    loss = (1 - lam) CE(onehot(y), p) + lam KL(teacher || p);  c_y = 1 - lam, c_r = lam, r = teacher (M = 1).  lam in
    [0, 1]; 0 is sft and reads no teacher, 1 is kd.  Source: arXiv 1503.02531.
    """
    lam = in_range("lam", lam, 0, 1)
    return _with_divergence(lam, lambda p: torch.full_like(p, 1 - lam)) if lam else sft()


@register("target-sft")
def target_sft(eta: float = 0.5) -> Objective:
    """Target-SFT: trust the observed token by its likelihood, give the rest to a teacher-guided distribution.

    loss = -sum_k Q_k log p_k,  Q = sg[p(y) onehot(y) + (1 - p(y)) r],  r = softmax((1 - eta) z + eta t).
    c_y = p(y), c_r = 1 - p(y) (M = 1).  eta in [0, 1]: 0 takes r = p (the gradient of dft, no teacher needed), 1 takes
    r = teacher.  Source: arXiv 2606.11189, which publishes no value of eta: 0.5 is this project's default.
    """
    eta = in_range("eta", eta, 0, 1)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, *label_and_rest(stats.log_p)

    return Objective(evaluate, residuals=((1 - eta, eta),))


@register("anchored")
def anchored(alpha: float = 0.5) -> Objective:
    """Anchored learning: a step towards a fine-tuned second model from wherever the model is.

    loss = KL(anchor || p), anchor = sg(softmax((1 - alpha) z + alpha t));  c_y = 0, c_r = 1, r = anchor (M = 1).
    alpha in (0, 1]; 0.5 is the paper's value, 1 is kd.  The second model is the base model fine-tuned by sft; the
    trained one starts from the base model.  Source: arXiv 2605.04468.
    """
    alpha = in_range("alpha", alpha, 0, 1, open_low=True)

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return stats.kl_divergence(), torch.zeros_like(stats.p), (1.0,)

    return Objective(
        evaluate,
        residuals=((1 - alpha, alpha),),
        residual_entropy=True,
        note="the anchor is of the model as it is in each step; the paper holds it for several epochs",
    )


def kept_or_all(denominator: str) -> str | None:
    """Objective's denominator of a mask: "all" supervised tokens, or the "kept" ones, whose label mass is not 0."""
    if denominator not in ("all", "kept"):
        raise ValueError(f"denominator must be 'all' or 'kept', got {denominator!r}")
    return "label_mass" if denominator == "kept" else None


def deformed_log(stats: TokenStatistics, alpha: Tensor) -> LossAndMasses:
    """loss = (1 - p(y)^alpha) / alpha with alpha [N] detached, none of it 0;  c_y = p(y)^alpha."""
    return -torch.expm1(alpha * stats.log_p) / alpha, (alpha * stats.log_p).exp(), ()


def label_and_rest(log_trust: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    """Masses of a target with the trust gamma = exp(log_trust):  c_y = gamma, c_r = 1 - gamma."""
    return log_trust.exp(), (-torch.expm1(log_trust),)


def _with_divergence(lam: float, label_mass: Callable[[Tensor], Tensor]) -> Objective:
    """loss = -sg(c) log p(y) + lam KL(r || p), c = label_mass(p(y)), r = softmax(t);  c_y = c, c_r = lam."""

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        mass = label_mass(stats.p)
        return stats.weighted_nll(mass) + lam * stats.kl_divergence(), mass, (lam,)

    return Objective(evaluate, residuals=(_TEACHER,), residual_entropy=True)
