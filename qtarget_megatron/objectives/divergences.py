"""Divergences whose target depends on p at each token of the vocabulary by itself: reverse and mixed KL,
Jensen-Shannon, skew KL, total variation; alone or next to the label.

With r = softmax(t) of the teacher and l_k = log p_k - log r_k, each has the logit gradient p_k (h(l_k) - E_p h); see
Divergence in qtarget_megatron.statistics. The reverse KL needs no more passes and collectives than the forward KL; the
others have one of each more.
"""

from __future__ import annotations

from qtarget_megatron.objectives.published import hybrid_kd, kd, sft
from qtarget_megatron.objectives.registry import LossAndMasses, Objective, TokenInputs, in_range, refuse, register
from qtarget_megatron.statistics import Divergence, TokenStatistics

_TEACHER = (0.0, 1.0)  # r = softmax(t)


@register("reverse-kl")
def reverse_kl(lam: float = 1.0) -> Objective:
    """Reverse KL: the student is held to what the teacher finds likely, and may leave out the rest.

    loss = (1 - lam) CE(onehot(y), p) + lam KL(p || teacher);  c_y = 1 - lam, d = lam, h = l.  lam in [0, 1]; 0 is sft
    and reads no teacher.  Source: arXiv 2306.08543.
    """
    return _with_label(Divergence.reverse_kl(), in_range("lam", lam, 0, 1))


@register("mixed-kl")
def mixed_kl(alpha: float = 0.5) -> Objective:
    """Forward and reverse KL together.

    loss = alpha KL(teacher || p) + (1 - alpha) KL(p || teacher);  c_y = 0, c_r = alpha, d = 1 - alpha, h = l.  alpha in
    [0, 1]; 1 is kd, 0 is reverse-kl.  Source: the mixed KL of NeMo-RL's distillation loss.
    """
    alpha = in_range("alpha", alpha, 0, 1)
    if alpha in (0, 1):
        return kd() if alpha else reverse_kl()

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        assert stats.divergence is not None  # requested
        loss = alpha * stats.kl_divergence() + (1 - alpha) * stats.divergence
        return loss, 0.0, (alpha, 1 - alpha)

    return Objective(evaluate, residuals=(_TEACHER,), residual_entropy=True, divergence=Divergence.reverse_kl())


@register("jsd")
def jsd(beta: float = 0.5, lam: float = 1.0) -> Objective:
    """Generalised Jensen-Shannon divergence, GKD's loss.

    loss = (1 - lam) CE(onehot(y), p) + lam [beta KL(teacher || m) + (1 - beta) KL(p || m)], with the mixture
    m = beta teacher + (1 - beta) p;  c_y = 1 - lam, d = lam, h = (1 - beta) log(p / m).  beta in [0, 1]; 0 is the
    forward KL and 1 the reverse KL, as GKD takes them (the divergence itself tends to 0 there).  lam in [0, 1].
    Source: arXiv 2306.13649.
    """
    beta, lam = in_range("beta", beta, 0, 1), in_range("lam", lam, 0, 1)
    if beta in (0, 1):
        return reverse_kl(lam) if beta else hybrid_kd(lam)
    return _with_label(Divergence.mixture(beta, of_residual=beta, of_model=1 - beta), lam)


@register("skew-kl")
def skew_kl(alpha: float = 0.1, lam: float = 1.0) -> Objective:
    """Skew KL: the forward KL to a student that has a share of the teacher in it, so that its gradient is bounded.

    loss = (1 - lam) CE(onehot(y), p) + lam KL(teacher || m), m = alpha teacher + (1 - alpha) p;  c_y = 1 - lam,
    d = lam, h = -(1 - alpha) teacher / m.  alpha in [0, 1); 0 is the forward KL.  lam in [0, 1].
    Source: arXiv 2402.03898.
    """
    alpha, lam = _share("alpha", alpha), in_range("lam", lam, 0, 1)
    return _with_label(Divergence.mixture(alpha, of_residual=1.0), lam) if alpha else hybrid_kd(lam)


@register("skew-reverse-kl")
def skew_reverse_kl(alpha: float = 0.1, lam: float = 1.0) -> Objective:
    """Skew reverse KL: the reverse KL to a teacher that has a share of the student in it.

    loss = (1 - lam) CE(onehot(y), p) + lam KL(p || m), m = (1 - alpha) teacher + alpha p;  c_y = 1 - lam, d = lam,
    h = log(p / m) - alpha p / m.  alpha in [0, 1); 0 is the reverse KL.  lam in [0, 1].  Source: arXiv 2402.03898.
    """
    alpha, lam = _share("alpha", alpha), in_range("lam", lam, 0, 1)
    return _with_label(Divergence.mixture(1 - alpha, of_model=1.0), lam) if alpha else reverse_kl(lam)


@register("total-variation")
def total_variation(lam: float = 1.0) -> Objective:
    """Total variation: half the sum of |p - teacher|, whose gradient does not grow with how wrong the student is.

    loss = (1 - lam) CE(onehot(y), p) + lam / 2 sum_k |p_k - teacher_k|;  c_y = 1 - lam, d = lam, h = sign(l) / 2, and 0
    where p and teacher are equal.  lam in [0, 1].  Source: arXiv 2307.15190.
    """
    return _with_label(Divergence.total_variation(), in_range("lam", lam, 0, 1))


def _share(name: str, value: float) -> float:
    value = in_range(name, value, 0, 1)
    if value == 1:
        raise ValueError(f"{name} must be below 1, where the loss is 0 whatever the model does, got {value!r}")
    return value


def _with_label(divergence: Divergence, lam: float) -> Objective:
    """loss = (1 - lam) CE(onehot(y), p) + lam D(p, teacher);  c_y = 1 - lam, d = lam."""

    def evaluate(stats: TokenStatistics, inputs: TokenInputs) -> LossAndMasses:
        return None, 1 - lam, (0.0, lam)

    return Objective(evaluate, residuals=(_TEACHER,), divergence=divergence) if lam else sft()


refuse("gkd", "it is jsd on the student's own answers: generate them, and train on them with jsd")
