"""Objectives: pure functions from token statistics to (loss value, label mass, residual mass).

Every objective here has, per token, the logit gradient

    g_k = M p_k - c_y [k = y] - sum_i c_i r_ik ,   r_i = softmax(a_i z + b_i t) ,   M = c_y + sum_i c_i

with z the student logits, p = softmax(z), y the label, t the logits of a second, frozen model. The masses c_y and c_i
and the residuals r_i are detached. Where M != 0 the objective pulls p towards the target distribution
Q = (c_y onehot(y) + sum_i c_i r_i) / M, with trust gamma = c_y / M in the observed token.

An objective therefore states its residual coefficients (a, b) and computes a loss value and the masses from
statistics of size O(N). It never sees the vocabulary, a process group or a device, so it runs unchanged on every
backend and every parallel layout::

    @objectives.register("poly1")
    def poly1(epsilon: float = 1.0) -> Objective:
        def evaluate(stats, inputs):
            weight = 1 + epsilon * stats.p
            return stats.weighted_nll(weight), weight, ()

        return Objective(evaluate)
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qtarget_megatron.statistics import MAX_RESIDUALS, Residuals, TokenStatistics

Evaluate = Callable[[TokenStatistics, Mapping[str, Tensor]], tuple[Tensor, Tensor, Sequence[Tensor]]]


@dataclass(frozen=True)
class Objective:
    """One objective with its parameters fixed.

    evaluate:     (stats, inputs) -> (loss, c_y, [c_i ...]); float64 [N] tensors, loss in nats. Must be elementwise.
    residuals:    (a, b) of each residual softmax(a*z + b*t), at most two.
    token_inputs: names of the per-token side inputs it needs, handed to evaluate as float64 [N] tensors.
    name, parameters: filled in by register().
    """

    evaluate: Evaluate = field(repr=False)
    residuals: Residuals = ()
    token_inputs: tuple[str, ...] = ()
    name: str = "unregistered"
    parameters: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if len(self.residuals) > MAX_RESIDUALS:
            raise ValueError(f"an objective has at most {MAX_RESIDUALS} residuals, got {len(self.residuals)}")
        for coefficients in self.residuals:
            if len(coefficients) != 2 or not all(math.isfinite(c) for c in coefficients):
                raise ValueError(f"a residual is a pair of finite numbers (a, b), got {coefficients!r}")

    @property
    def needs_teacher(self) -> bool:
        """True where some residual reads the second model's logits (b != 0)."""
        return any(b != 0 for _, b in self.residuals)

    def __str__(self) -> str:
        parameters = ", ".join(f"{key}={value}" for key, value in self.parameters)
        return f"{self.name}({parameters})"


_REGISTRY: dict[str, Callable[..., Objective]] = {}


def register(name: str) -> Callable[[Callable[..., Objective]], Callable[..., Objective]]:
    """Register an objective factory under a name; '-' and '_' are the same in names.

    The factory's keywords are the objective's parameters: they can be given to get() and on the command line.
    Raises ValueError where the name is taken.
    """
    key = _key(name)

    def decorate(factory: Callable[..., Objective]) -> Callable[..., Objective]:
        if key in _REGISTRY:
            raise ValueError(f"an objective named {key!r} is registered already: choose another name")
        signature = inspect.signature(factory)

        def build(*args, **kwargs) -> Objective:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return replace(factory(*args, **kwargs), name=key, parameters=tuple(bound.arguments.items()))

        build.__name__, build.__doc__, build.__signature__ = (
            factory.__name__,
            factory.__doc__,
            signature,
        )
        _REGISTRY[key] = build
        return build

    return decorate


def names() -> list[str]:
    """Names of all registered objectives, sorted."""
    return sorted(_REGISTRY)


def get(name: str, **parameters: Any) -> Objective:
    """Build a registered objective by name, e.g. ``get("target-sft", eta=0.3)``.

    Raises ValueError for an unknown name, an unknown or missing parameter, or a value out of range.
    """
    factory = _REGISTRY.get(_key(name))
    if factory is None:
        raise ValueError(f"unknown objective {name!r}: expected one of {', '.join(names())}")
    accepted = factory.__signature__.parameters
    for key in parameters:
        if key not in accepted:
            known = ", ".join(str(p) for p in accepted.values()) or "none"
            raise ValueError(f"objective {_key(name)!r} has no parameter {key!r}: its parameters are {known}")
    for key, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and key not in parameters:
            raise ValueError(f"objective {_key(name)!r} needs the parameter {key!r}: give {key}=VALUE")
    return factory(**parameters)


def from_arguments(name: str, arguments: Sequence[str]) -> Objective:
    """Build an objective from command-line words such as ``["eta=0.5"]``; values are Python literals or plain text."""
    parameters: dict[str, Any] = {}
    for word in arguments:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise ValueError(f"an objective argument is KEY=VALUE, got {word!r}")
        if key in parameters:
            raise ValueError(f"objective argument {key!r} is given twice")
        try:
            parameters[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parameters[key] = text
    return get(name, **parameters)


def _key(name: str) -> str:
    return name.replace("_", "-").lower()


def _in_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low < value if open_low else low <= value) or not value <= high or not math.isfinite(value):
        interval = f"{'(' if open_low else '['}{low}, {high}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")
    return float(value)


@register("sft")
def sft() -> Objective:
    """Supervised fine-tuning: one-hot cross-entropy.

    loss = -log p(y);  c_y = 1.  All trust in the observed token.
    """

    def evaluate(stats, inputs):
        one = torch.ones_like(stats.p)
        return stats.weighted_nll(one), one, ()

    return Objective(evaluate)


@register("dft")
def dft() -> Objective:
    """Dynamic fine-tuning: the likelihood weighs the token.

    loss = -sg(p(y)) log p(y);  c_y = p(y).  The weight is detached: without it the gradient changes sign at
    p(y) = 1/e.  Source: arXiv 2508.05629.
    """

    def evaluate(stats, inputs):
        return stats.weighted_nll(stats.p), stats.p, ()

    return Objective(evaluate)


@register("label-smoothing")
def label_smoothing(lam: float = 0.1) -> Objective:
    """Label smoothing with the uniform distribution over the true vocabulary (y included, padding not).

    loss = -(1 - lam) log p(y) - lam/V sum_v log p_v;  c_y = 1 - lam, c_r = lam, r uniform.  lam in [0, 1].
    Source: arXiv 1512.00567.
    """
    lam = _in_range("lam", lam, 0, 1)
    if lam == 0:
        return sft()

    def evaluate(stats, inputs):
        label_mass = torch.full_like(stats.p, 1 - lam)
        return stats.weighted_nll(label_mass) + lam * stats.cross_entropy(), label_mass, (lam,)

    return Objective(evaluate, residuals=((0.0, 0.0),))


@register("kd")
def kd(temperature: float = 1.0) -> Objective:
    """Knowledge distillation: forward KL from the teacher, at a temperature T.

    loss = T^2 KL(teacher_T || p_T) with p_T = softmax(z/T), teacher_T = softmax(t/T);  c_y = 0.
    T = 1: one residual r = teacher with c_r = 1 (M = 1).  T != 1: g = T (p_T - teacher_T), which is two residuals,
    (1/T, 0) with mass -T and (0, 1/T) with mass T (M = 0).  T > 0.  Source: arXiv 1503.02531.
    """
    temperature = _in_range("temperature", temperature, 0, math.inf, open_low=True)
    if temperature == 1:

        def evaluate(stats, inputs):
            return stats.kl_divergence(), torch.zeros_like(stats.p), (1.0,)

        return Objective(evaluate, residuals=((0.0, 1.0),))

    def evaluate_tempered(stats, inputs):
        student, teacher = stats.residuals
        cross_entropy = student.lse - teacher.mean_logit / temperature
        loss = temperature**2 * (cross_entropy - teacher.entropy)
        return loss, torch.zeros_like(stats.p), (-temperature, temperature)

    return Objective(evaluate_tempered, residuals=((1 / temperature, 0.0), (0.0, 1 / temperature)))


@register("target-sft")
def target_sft(eta: float = 0.5) -> Objective:
    """Target-SFT: trust the observed token by its likelihood, give the rest to a teacher-guided distribution.

    loss = -sum_k Q_k log p_k,  Q = sg[p(y) onehot(y) + (1 - p(y)) r],  r = softmax((1 - eta) z + eta t).
    c_y = p(y), c_r = 1 - p(y) (M = 1).  eta in [0, 1]: 0 takes r = p (the gradient of dft, no teacher needed), 1 takes
    r = teacher.  Source: arXiv 2606.11189, which publishes no value of eta: 0.5 is this project's default.
    """
    eta = _in_range("eta", eta, 0, 1)

    def evaluate(stats, inputs):
        rest = -torch.expm1(stats.log_p)
        cross_entropy = stats.cross_entropy()
        residual_loss = torch.where(rest == 0, torch.zeros_like(rest), rest * cross_entropy)
        return stats.weighted_nll(stats.p) + residual_loss, stats.p, (rest,)

    return Objective(evaluate, residuals=((1 - eta, eta),))
