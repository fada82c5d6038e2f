"""The objectives written out in float64 from their published definitions, for autograd to derive.

Nothing of the package's formulas is used here: a definition takes whole rows of logits and returns
the loss, with stop-gradients where the paper has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget_megatron import Objective, objectives


def sft(z, y, t):
    return -_log_p(z, y)


def dft(z, y, t):
    log_p = _log_p(z, y)
    return -log_p.exp().detach() * log_p


def label_smoothing(lam):
    def loss(z, y, t):
        log_p = torch.log_softmax(z, -1)
        smooth = torch.full_like(log_p, lam / z.shape[-1])
        smooth[torch.arange(len(y)), y] += 1 - lam
        return _cross_entropy(smooth, log_p)

    return loss


def kd(temperature):
    def loss(z, y, t):
        teacher = torch.softmax(t / temperature, -1)
        log_p = torch.log_softmax(z / temperature, -1)
        entropy = _cross_entropy(teacher, torch.log_softmax(t / temperature, -1))
        return temperature**2 * (_cross_entropy(teacher, log_p) - entropy)

    return loss


def target_sft(eta):
    def loss(z, y, t):
        log_p = torch.log_softmax(z, -1)
        p_y = log_p.detach().gather(-1, y[:, None]).exp()
        # 0 * -inf: an absent factor is left out.
        u = (z.detach() if eta == 0 else t) if eta in (0, 1) else (1 - eta) * z.detach() + eta * t
        target = (1 - p_y) * torch.softmax(u, -1)
        target[torch.arange(len(y)), y] += p_y[:, 0]
        return _cross_entropy(target, log_p)

    return loss


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

    mass: (z, y) -> [N], the absolute masses of the terms that the gradient is a difference of.
    loss_unit: the factor on the difference of entropies that the loss is, in nats.
    """

    name: str
    objective: Objective
    definition: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    mass: Callable[[Tensor, Tensor], Tensor] = constant(1)
    loss_unit: float = 1.0

    def teacher(self, logits: Tensor) -> Tensor | None:
        return logits if self.objective.needs_teacher else None


CASES = {
    case.name: case
    for case in (
        Case("sft", objectives.sft(), sft),
        Case("dft", objectives.dft(), dft, likelihood),
        Case("label-smoothing", objectives.label_smoothing(lam=0.1), label_smoothing(0.1)),
        Case("kd", objectives.kd(), kd(1.0)),
        Case("kd-T2", objectives.kd(temperature=2.0), kd(2.0), constant(2), loss_unit=4),
        Case("target-sft", objectives.target_sft(eta=0.3), target_sft(0.3)),
        Case("target-sft-eta0", objectives.target_sft(eta=0), target_sft(0)),
        Case("target-sft-eta1", objectives.target_sft(eta=1), target_sft(1)),
    )
}


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
    row_loss = case.definition(z, y, t)
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
