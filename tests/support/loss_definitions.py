"""The objectives written out in float64 from their published definitions, for autograd to derive.

Nothing of the package's formulas is used here: a definition takes whole rows of logits and returns
the loss, with stop-gradients where the paper has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget_megatron import Objective, Samples, objectives

# A definition: (student logits z [N, V], labels y [N], second model's logits t [N, V], side inputs x) -> loss [N].


def sft(z, y, t, x):
    return -_log_p(z, y)


def weighted(weight):
    """-sg(w) log p, w = weight(z, y, x)."""

    def loss(z, y, t, x):
        return -weight(z.detach(), y, x) * _log_p(z, y)

    return loss


def beyond_log(alpha):
    def loss(z, y, t, x):
        return (1 - _log_p(z, y).exp() ** alpha) / alpha

    return loss


def deft(z, y, t, x):
    alpha = torch.softmax(z.detach(), -1).square().sum(-1)
    return (1 - _log_p(z, y).exp() ** alpha) / alpha


def focal(gamma):
    def loss(z, y, t, x):
        log_p = _log_p(z, y)
        return -((-torch.expm1(log_p)) ** gamma) * log_p

    return loss


def poly1(epsilon):
    def loss(z, y, t, x):
        return -_log_p(z, y) + epsilon * (1 - _log_p(z, y).exp())

    return loss


def psft(epsilon_low, epsilon_high, old=lambda t, y, x: _log_p(t, y)):
    def loss(z, y, t, x):
        ratio = (_log_p(z, y) - old(t, y, x)).clip(-20, 20).exp()
        return -torch.minimum(ratio, ratio.clip(1 - epsilon_low, 1 + epsilon_high))

    return loss


def label_smoothing(lam):
    def loss(z, y, t, x):
        log_p = torch.log_softmax(z, -1)
        smooth = torch.full_like(log_p, lam / z.shape[-1])
        smooth[torch.arange(len(y)), y] += 1 - lam
        return _cross_entropy(smooth, log_p)

    return loss


def iw_sft(temperature, maximum, start=lambda t, y, x: _log_p(t, y)):
    def loss(z, y, t, x):
        ratio = (_log_p(z, y) - start(t, y, x)).detach()
        same = x["sample"][:, None] == x["sample"]
        means = torch.where(same, ratio, 0.0).sum(1) / same.sum(1)
        return -(temperature * means).exp().clip(0, maximum) * _log_p(z, y)

    return loss


def pear(level, gamma=0.999, block=4):
    """A loop over tokens, in logarithms; the clamps are those of the paper."""

    def loss(z, y, t, x):
        ratio = (_log_p(z, y) - _log_p(t, y)).detach().clip(-0.08, 0.3)
        weights = torch.zeros_like(ratio)
        for sample in x["sample"].unique():
            places = (x["sample"] == sample).nonzero()[:, 0].tolist()
            last, size = len(places) - 1, {"token": 1, "block": block}.get(level)
            for place, token in enumerate(places):
                if size is None:
                    weights[token] = ratio[places].sum()
                    continue
                end = min((place // size + 1) * size - 1, last)
                weights[token] = (last - end) * math.log(gamma) + ratio[places[end + 1 :]].sum()
        return -weights.clip(-10, 5).exp() * _log_p(z, y)

    return loss


def tsallis(q):
    """(1 - P^(1 - q)) / (1 - q) of each sample, shared out over its tokens as their loss is."""

    def loss(z, y, t, x):
        log_p = _log_p(z, y)
        same = x["sample"][:, None] == x["sample"]
        return -((1 - q) * torch.where(same, log_p.detach(), 0.0).sum(1)).exp() * log_p

    return loss


def infosft_weight(p_bar):
    def weight(z, y, x):
        log_p = _log_p(z, y)
        rest = torch.log_softmax(z, -1).scatter(-1, y[:, None], -torch.inf).logsumexp(-1)
        return log_p.exp() * (1 - (log_p - rest) / math.log(p_bar / (1 - p_bar))).clip(0)

    return weight


def idft_weight(beta, low, high):
    def weight(z, y, x):
        surprise = -_log_p(z, y) - entropy(z)
        return likelihood(z, y) ** (surprise / beta).exp().clip(low, high)

    return weight


def anchored(alpha):
    def loss(z, y, t, x):
        anchor = (1 - alpha) * z.detach() + alpha * t
        return kd(1.0)(z, y, anchor, x)

    return loss


def with_kl(label_weight, lam):
    """-sg(label_weight(p)) log p + lam KL(softmax(t) || p)."""

    def loss(z, y, t, x):
        log_p = _log_p(z, y)
        return -label_weight(log_p.detach().exp()) * log_p + lam * kd(1.0)(z, y, t, x)

    return loss


def gem(beta):
    def loss(z, y, t, x):
        return -_log_p(z, y) - _cross_entropy(torch.softmax(z.detach() / beta, -1), torch.log_softmax(z, -1))

    return loss


def kd(temperature):
    def loss(z, y, t, x):
        teacher = torch.softmax(t / temperature, -1)
        log_p = torch.log_softmax(z / temperature, -1)
        entropy = _cross_entropy(teacher, torch.log_softmax(t / temperature, -1))
        return temperature**2 * (_cross_entropy(teacher, log_p) - entropy)

    return loss


def target_sft(eta):
    def loss(z, y, t, x):
        log_p = torch.log_softmax(z, -1)
        p_y = log_p.detach().gather(-1, y[:, None]).exp()
        # 0 * -inf: an absent factor is left out.
        u = (z.detach() if eta == 0 else t) if eta in (0, 1) else (1 - eta) * z.detach() + eta * t
        target = (1 - p_y) * torch.softmax(u, -1)
        target[torch.arange(len(y)), y] += p_y[:, 0]
        return _cross_entropy(target, log_p)

    return loss


def gift(beta):
    def loss(z, y, t, x):
        tilted = t.clone()
        tilted[torch.arange(len(y)), y] += beta
        return _cross_entropy(torch.softmax(tilted, -1), torch.log_softmax(z, -1))

    return loss


def reverse_kl(z, y, t, x):
    return _kl(_log_softmax(z), _log_softmax(t))


def mixed_kl(alpha):
    def loss(z, y, t, x):
        log_p, log_r = _log_softmax(z), _log_softmax(t)
        return alpha * _kl(log_r, log_p) + (1 - alpha) * _kl(log_p, log_r)

    return loss


def to_mixture(share, of_teacher, of_student):
    """of_teacher KL(r || m) + of_student KL(p || m), m = share r + (1 - share) p."""

    def loss(z, y, t, x):
        log_p, log_r = _log_softmax(z), _log_softmax(t)
        log_m = torch.logaddexp(log_r + math.log(share), log_p + math.log1p(-share))
        return of_teacher * _kl(log_r, log_m) + of_student * _kl(log_p, log_m)

    return loss


def total_variation(z, y, t, x):
    return (_log_softmax(z).exp() - _log_softmax(t).exp()).abs().sum(-1) / 2


def beside_label(lam, divergence):
    """(1 - lam) CE(onehot(y), p) + lam D."""

    def loss(z, y, t, x):
        return -(1 - lam) * _log_p(z, y) + lam * divergence(z, y, t, x)

    return loss


def top_k_entropy(z, k):
    q = torch.softmax(z.sort(-1, descending=True).values[:, :k], -1)
    return -torch.special.xlogy(q, q).sum(-1)


def entropy(z):
    p = torch.softmax(z, -1)
    return -torch.special.xlogy(p, p).sum(-1)


def _log_softmax(z):
    """With a floor whose exponential is 0, so that no derivative is of -inf."""
    return torch.log_softmax(z.clamp_min(-2e4), -1)


def _kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_p(z, y):
    return torch.log_softmax(z, -1).gather(-1, y[:, None])[:, 0]


def _cross_entropy(q, log_p):
    return -torch.where(q == 0, torch.zeros_like(q), q.detach() * log_p).sum(-1)


def constant(mass):
    return lambda z, y: torch.full((len(y),), float(mass), dtype=torch.float64)


def likelihood(z, y):
    return _log_p(z, y).exp()


@dataclass(frozen=True)
class Case:
    """An objective of the package and, independently, what it must compute.

    mass: (z, y) -> [N], at least the absolute masses of the terms that the gradient is a difference of.
    loss_unit: the factor on the difference of entropies that the loss is, in nats.
    """

    name: str
    objective: Objective
    definition: Callable[[Tensor, Tensor, Tensor | None, dict[str, Tensor]], Tensor]
    mass: Callable[[Tensor, Tensor], Tensor] = constant(1)
    loss_unit: float = 1.0

    def teacher(self, logits: Tensor) -> Tensor | None:
        return logits if self.objective.needs_teacher else None

    def samples(self, labels: Tensor, group=None) -> Samples | None:
        """Samples of three tokens each, for an objective that takes means over them."""
        if not self.objective.needs_samples:
            return None
        return Samples(sample_ids(labels), max(labels.numel(), 1), group)

    def inputs(self, logits: Tensor, labels: Tensor, vocab_size: int | None = None) -> dict[str, Tensor]:
        """Side inputs [...] for whole rows of logits [..., V]; each follows from its own row alone."""
        z = logits.detach().double()[..., : vocab_size or logits.shape[-1]]
        label = labels.clamp(0, z.shape[-1] - 1)[..., None]
        log_p = torch.log_softmax(z, -1).gather(-1, label)[..., 0].nan_to_num(-1.0, -1.0, -200.0)
        uniform = (log_p * 7919).frac().abs()
        drawn = {
            "weight": 2 * uniform,
            "critical": (uniform < 0.6).double(),
            "is_prompt": (uniform < 0.6).double(),
            # Some ratios are clipped (above 1.28), most are not.
            "old_log_prob": (log_p + 1.2 * (uniform - 0.6)).clamp(max=0.0),
        }
        return {name: drawn[name] for name in self.objective.token_inputs}


def sample_ids(labels: Tensor) -> Tensor:
    return (torch.arange(labels.numel()) // 3).reshape(labels.shape)


def _indicator(condition):
    return condition.double()


CASES = {
    case.name: case
    for case in (
        Case("sft", objectives.sft(), sft),
        Case("dft", objectives.dft(), weighted(lambda z, y, x: likelihood(z, y)), likelihood),
        Case("beyond-log", objectives.beyond_log(alpha=0.5), beyond_log(0.5), lambda z, y: likelihood(z, y) ** 0.5),
        Case("profit", objectives.profit(tau=0.02), weighted(lambda z, y, x: _indicator(likelihood(z, y) >= 0.02))),
        Case("eaft", objectives.eaft(), weighted(lambda z, y, x: top_k_entropy(z, 20) / math.log(20))),
        Case(
            "eaft-k3",
            objectives.eaft(k=3, normalizer=0.5, exponent=2),
            weighted(lambda z, y, x: (top_k_entropy(z, 3) / 0.5) ** 2),
            constant(5),
        ),
        # More than one shard of the tests' vocabularies holds.
        Case("eaft-k50", objectives.eaft(k=50), weighted(lambda z, y, x: top_k_entropy(z, 50) / math.log(50))),
        Case("weighted-sft", objectives.weighted_sft(), weighted(lambda z, y, x: x["weight"]), constant(2)),
        Case("iw-sft", objectives.iw_sft(temperature=0.3, maximum=2.0), iw_sft(0.3, 2.0), constant(2)),
        Case(
            "iw-sft-data",
            objectives.iw_sft(start="data"),
            iw_sft(1.0, 16.0, lambda t, y, x: x["old_log_prob"]),
            constant(16),
        ),
        Case("infosft", objectives.infosft(), weighted(infosft_weight(0.93)), constant(0.51)),
        Case("idft", objectives.idft(), weighted(idft_weight(1.0, 0.1, 2.0)), lambda z, y: likelihood(z, y) ** 0.1),
        Case("pear", objectives.pear(), pear("token"), constant(3)),
        Case("pear-block", objectives.pear("block", gamma=0.9, block=2), pear("block", 0.9, 2), constant(3)),
        Case("pear-sequence", objectives.pear("sequence"), pear("sequence"), constant(3)),
        Case("tsallis", objectives.tsallis(q=0.75), tsallis(0.75)),
        Case("anchored", objectives.anchored(alpha=0.25), anchored(0.25)),
        Case(
            "wit",
            objectives.wit(prompt=0.3, response=0.8),
            weighted(lambda z, y, x: 0.8 - 0.5 * x["is_prompt"]),
        ),
        Case("cft", objectives.cft(), weighted(lambda z, y, x: x["critical"])),
        Case("label-smoothing", objectives.label_smoothing(lam=0.1), label_smoothing(0.1)),
        Case("sft-kl", objectives.sft_kl(lam=0.3), with_kl(torch.ones_like, 0.3), constant(1.3)),
        Case("asft", objectives.asft(lam=0.05), with_kl(lambda p: p, 0.05), lambda z, y: likelihood(z, y) + 0.05),
        Case("psft", objectives.psft(), psft(0.2, 0.28), constant(1.28)),
        Case(
            "psft-data",
            objectives.psft(refresh=0),
            psft(0.2, 0.28, lambda t, y, x: x["old_log_prob"]),
            constant(1.28),
        ),
        Case("gem", objectives.gem(), gem(0.7)),
        Case("kd", objectives.kd(), kd(1.0)),
        Case("kd-T2", objectives.kd(temperature=2.0), kd(2.0), constant(2), loss_unit=4),
        # The log ratio that p is multiplied with is rounded at up to 30 nats.
        Case("reverse-kl", objectives.reverse_kl(), reverse_kl, constant(8)),
        Case("reverse-kl-0.6", objectives.reverse_kl(lam=0.6), beside_label(0.6, reverse_kl), constant(8)),
        Case("mixed-kl", objectives.mixed_kl(alpha=0.3), mixed_kl(0.3), constant(8)),
        Case("jsd", objectives.jsd(beta=0.3), to_mixture(0.3, 0.3, 0.7)),
        Case("jsd-0.6", objectives.jsd(beta=0.5, lam=0.6), beside_label(0.6, to_mixture(0.5, 0.5, 0.5))),
        Case("skew-kl", objectives.skew_kl(alpha=0.1), to_mixture(0.1, 1.0, 0.0), constant(2)),
        Case("skew-reverse-kl", objectives.skew_reverse_kl(alpha=0.1), to_mixture(0.9, 0.0, 1.0), constant(2)),
        Case("total-variation", objectives.total_variation(), total_variation),
        Case("hybrid-kd", objectives.hybrid_kd(lam=0.4), with_kl(lambda p: torch.full_like(p, 0.6), 0.4)),
        Case("target-sft", objectives.target_sft(eta=0.3), target_sft(0.3)),
        Case("target-sft-eta0", objectives.target_sft(eta=0), target_sft(0)),
        Case("target-sft-eta1", objectives.target_sft(eta=1), target_sft(1)),
        Case("deft", objectives.deft(), deft),
        Case("focal", objectives.focal(), focal(2.0), constant(1.5)),
        Case("talr", objectives.talr(tau=2.0), weighted(lambda z, y, x: likelihood(z, y) ** 0.5)),
        Case("poly1", objectives.poly1(epsilon=0.5), poly1(0.5), constant(1.5)),
        Case("gift", objectives.gift(beta=1.5), gift(1.5)),
        Case(
            "entropy-mask",
            objectives.entropy_mask(threshold=1.5),
            weighted(lambda z, y, x: _indicator(entropy(z) >= 1.5)),
        ),
    )
}


def _mass(*terms):
    return constant(sum(abs(term) for term in terms))


# Name -> (draw: (low, high) -> number) -> a case with parameters drawn over their ranges.
RANDOM_CASES = {
    **{name: (lambda draw, case=case: case) for name, case in CASES.items() if not case.objective.parameters},
    "beyond-log": lambda draw: _random_beyond_log(draw(-0.5, 3.0)),
    "profit": lambda draw: _random_profit(draw(0.0, 0.9)),
    "eaft": lambda draw: _random_eaft(int(draw(2, 90))),
    "label-smoothing": lambda draw: _random(objectives.label_smoothing, label_smoothing, draw(0, 1)),
    "sft-kl": lambda draw: _random(objectives.sft_kl, lambda lam: with_kl(torch.ones_like, lam), draw(0, 3), 1),
    "asft": lambda draw: _random(objectives.asft, lambda lam: with_kl(lambda p: p, lam), draw(0, 3), 1),
    "iw-sft": lambda draw: _random_iw_sft(draw(-1, 1), draw(0.5, 20)),
    "psft": lambda draw: _random_psft(draw(0, 1), draw(0, 2)),
    "infosft": lambda draw: _random_infosft(draw(0.51, 0.99)),
    "idft": lambda draw: _random_idft(draw(0.2, 3), draw(0.05, 1), draw(1, 3)),
    "pear": lambda draw: _random_pear(draw(0.5, 1), int(draw(1, 4))),
    "tsallis": lambda draw: _random(objectives.tsallis, tsallis, draw(0, 1)),
    "anchored": lambda draw: _random(objectives.anchored, anchored, draw(0.01, 1)),
    "wit": lambda draw: _random_wit(draw(0, 1), draw(0.1, 2)),
    "gem": lambda draw: _random(objectives.gem, gem, draw(0.3, 3)),
    "kd": lambda draw: _random_kd(draw(0.3, 4)),
    "hybrid-kd": lambda draw: _random(
        objectives.hybrid_kd, lambda lam: with_kl(lambda p: torch.full_like(p, 1 - lam), lam), draw(0, 1)
    ),
    "target-sft": lambda draw: _random(objectives.target_sft, target_sft, draw(0, 1)),
    "reverse-kl": lambda draw: _random(objectives.reverse_kl, lambda lam: beside_label(lam, reverse_kl), draw(0, 1), 7),
    "mixed-kl": lambda draw: _random(objectives.mixed_kl, mixed_kl, draw(0.01, 0.99), 7),
    "jsd": lambda draw: _random(objectives.jsd, lambda beta: to_mixture(beta, beta, 1 - beta), draw(0.01, 0.99)),
    "skew-kl": lambda draw: _random(objectives.skew_kl, lambda a: to_mixture(a, 1.0, 0.0), draw(0.01, 0.99), 1),
    "skew-reverse-kl": lambda draw: _random(
        objectives.skew_reverse_kl, lambda a: to_mixture(1 - a, 0.0, 1.0), draw(0.01, 0.99), 1
    ),
    "total-variation": lambda draw: _random(
        objectives.total_variation, lambda lam: beside_label(lam, total_variation), draw(0, 1)
    ),
    "focal": lambda draw: _random(objectives.focal, focal, draw(1, 4), 1),
    "talr": lambda draw: _random_talr(draw(0.3, 4)),
    "poly1": lambda draw: _random(objectives.poly1, poly1, draw(-1, 2), 1),
    "gift": lambda draw: _random(objectives.gift, gift, draw(0, 6)),
    "entropy-mask": lambda draw: _random_entropy_mask(draw(0.01, 4)),
}


def _random(objective, definition, parameter, *more_mass) -> Case:
    return Case("", objective(parameter), definition(parameter), _mass(1, parameter, *more_mass))


def _random_beyond_log(alpha) -> Case:
    # Near 0 the definition itself loses digits in 1 - p^alpha.
    alpha = alpha if abs(alpha) > 0.05 else 0.05
    unit = 1 / abs(alpha)
    return Case("", objectives.beyond_log(alpha), beyond_log(alpha), lambda z, y: likelihood(z, y) ** alpha, unit)


def _random_profit(tau) -> Case:
    return Case("", objectives.profit(tau), weighted(lambda z, y, x: _indicator(likelihood(z, y) >= tau)))


def _random_eaft(k) -> Case:
    return Case("", objectives.eaft(k), weighted(lambda z, y, x: top_k_entropy(z, k) / math.log(k)))


def _random_psft(low, high) -> Case:
    return Case("", objectives.psft(low, high), psft(low, high), constant(1 + high))


def _random_infosft(p_bar) -> Case:
    # Near 0.5 the weight is of any size.
    largest = 1 / math.log(p_bar / (1 - p_bar))
    return Case("", objectives.infosft(p_bar), weighted(infosft_weight(p_bar)), constant(1 + largest))


def _random_idft(beta, low, high) -> Case:
    objective, weight = objectives.idft(beta, low, high), weighted(idft_weight(beta, low, high))
    return Case("", objective, weight, lambda z, y: likelihood(z, y) ** low)


def _random_pear(gamma, block) -> Case:
    return Case("", objectives.pear("block", gamma=gamma, block=block), pear("block", gamma, block), constant(3))


def _random_wit(prompt, response) -> Case:
    weight = weighted(lambda z, y, x: torch.where(x["is_prompt"] == 1, prompt, response))
    return Case("", objectives.wit(prompt, response), weight, constant(max(prompt, response)))


def _random_iw_sft(temperature, maximum) -> Case:
    return Case("", objectives.iw_sft(temperature, maximum), iw_sft(temperature, maximum), constant(maximum))


def _random_kd(temperature) -> Case:
    return Case("", objectives.kd(temperature), kd(temperature), constant(temperature), max(temperature**2, 1))


def _random_talr(tau) -> Case:
    return Case("", objectives.talr(tau), weighted(lambda z, y, x: likelihood(z, y) ** (1 / tau)))


def _random_entropy_mask(threshold) -> Case:
    return Case("", objectives.entropy_mask(threshold), weighted(lambda z, y, x: _indicator(entropy(z) >= threshold)))


# Objectives whose residual is formed from logits with rounding: u = a z + b t is not exact in float32.
ROUNDED_EXPONENTS = ("target-sft", "gem", "anchored")


@dataclass(frozen=True)
class Truth:
    """float64 results for the same, already rounded, logits: 0 for ignored tokens and padding.

    loss, mass: [...]; gradient: [..., V]; mass includes the upstream gradient.
    """

    loss: Tensor
    gradient: Tensor
    mass: Tensor
    loss_unit: float


def truth(
    case: Case,
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    upstream: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Truth:
    """A case's definition and its derivative, on the supervised rows and the true vocabulary."""
    columns = logits.shape[-1]
    vocab_size = columns if vocab_size is None else vocab_size
    rows = (labels != ignore_index).reshape(-1)
    z = logits.detach().double().reshape(-1, columns)[rows, :vocab_size].requires_grad_()
    t = teacher.detach().double().reshape(-1, columns)[rows, :vocab_size]
    y, scale = labels.reshape(-1)[rows], upstream.double().reshape(-1)[rows]
    side = {name: value.reshape(-1)[rows] for name, value in case.inputs(logits, labels, vocab_size).items()}
    side["sample"] = sample_ids(labels).reshape(-1)[rows]
    row_loss = case.definition(z, y, t, side)
    (row_gradient,) = torch.autograd.grad(row_loss, z, scale)
    loss, mass = torch.zeros(2, labels.numel(), dtype=torch.float64)
    gradient = torch.zeros(labels.numel(), columns, dtype=torch.float64)
    loss[rows] = row_loss.detach()
    mass[rows] = case.mass(z.detach(), y) * scale.abs()
    gradient[rows.nonzero(), torch.arange(vocab_size)] = row_gradient
    return Truth(
        loss.reshape(labels.shape),
        gradient.reshape(logits.shape),
        mass.reshape(labels.shape),
        case.loss_unit,
    )


def assert_close_to_truth(loss: Tensor, gradient: Tensor, expected: Truth, exponent_rounding: float = 0.0) -> None:
    """Bounds by the logits' dtype.

    Loss: local sums are float32 and so is the result: 1e-6 of the loss, or of 1 nat where a
        divergence is a small difference of cross-entropies. float64: 1e-12 likewise.
    Gradient: 1e-5 of each row in L2 for float32, 1e-12 for float64. bfloat16 and float16 sum in
        float32 and round each element once, by 2^-9 or 2^-12 of it: here at most twice that.
        Where terms cancel (p near 1, a residual near p) the rounding of the terms remains: four
        units in the last place of the masses. Below 2^-120 (2^-24 in float16) a gradient may be 0.
    exponent_rounding: added to the relative bounds where u = a z + b t is too large for float32 to
        hold it, before it is exponentiated, to much better than 1e-6.
    """
    dtype = gradient.dtype
    exact = dtype == torch.float64
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    tolerance = (1e-12 if exact else 1e-6) + exponent_rounding
    torch.testing.assert_close(
        loss.double(),
        expected.loss,
        rtol=tolerance,
        atol=tolerance * expected.loss_unit,
        msg=lambda text: f"loss: {text}",
    )
    error, size = (gradient.double() - expected.gradient).abs(), expected.gradient.abs()
    floor = (2**-50 if exact else 2**-22) * expected.mass + 2**-120
    if dtype in (torch.float64, torch.float32):
        error, size = error.norm(dim=-1), size.norm(dim=-1)
        relative = 1e-12 if exact else 1e-5
    else:
        floor = floor[..., None] + (2**-24 if dtype == torch.float16 else 0)
        relative = 2**-8 if dtype == torch.bfloat16 else 2**-11
    allowed = (relative + exponent_rounding) * size + floor
    worst = (error - allowed).amax() if error.numel() else 0
    assert (error <= allowed).all(), f"gradient: {worst:.2e} beyond the bound for {dtype}"
