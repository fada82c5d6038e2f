"""Forward and backward of the loss of given logits, against other implementations and the time that the bytes take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qtarget_megatron import objectives, qtarget_cross_entropy
from tools.benchmarking import figures, peers
from tools.benchmarking.measure import Subject, alternate, memory

ETA = 0.5
OURS, OURS_IN_PLACE, COPY = "qtarget", "qtarget, in place", "copy"
# How far gradients of one loss may lie apart, as a share of the largest entry: rounding only.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Method:
    """One way to compute an objective's loss per token from (logits, teacher_logits, labels)."""

    objective: str
    name: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    optional: bool = False  # left out, with the reason, where its package's release does not compute the same

    @property
    def passes(self) -> int:
        return figures.PASSES_WITH_TEACHER if self.objective == "target-sft" else figures.PASSES


def methods(dtype: torch.dtype, device: torch.device, compiled: list[str]) -> list[Method]:
    """What is measured; of each objective ours comes first. compiled: objectives to give torch.compile as well."""
    chosen = {"sft": objectives.sft(), "dft": objectives.dft(), "target-sft": objectives.target_sft(eta=ETA)}
    found = []
    for name, objective in chosen.items():
        found.append(Method(name, OURS, partial(_ours, objective, False)))
        found.append(Method(name, OURS_IN_PLACE, partial(_ours, objective, True)))
    group = dist.new_group(backend="nccl") if device.type == "cuda" else dist.group.WORLD
    plain = {"torch": peers.torch_cross_entropy}
    if dtype != torch.float32:
        plain["torch, float32 copy"] = peers.torch_cross_entropy_float32
    if "sft" in compiled:
        plain["torch.compile"] = torch.compile(peers.torch_cross_entropy_float32, dynamic=False)
    plain["Megatron"] = peers.megatron_cross_entropy(group)
    if device.type == "cuda":
        plain["Megatron, fused"] = peers.megatron_fused_cross_entropy(group)
        for name, loss in peers.optional_cross_entropies(group).items():
            found.append(Method("sft", name, partial(_without_teacher, loss), optional=True))
    found += [Method("sft", name, partial(_without_teacher, loss)) for name, loss in plain.items()]
    found.append(Method("dft", "eager", partial(_without_teacher, peers.eager_dft)))
    found.append(Method("target-sft", "eager", partial(_with_teacher, peers.eager_target_sft)))
    if "target-sft" in compiled:
        loss = torch.compile(peers.eager_target_sft, dynamic=False)
        found.append(Method("target-sft", "torch.compile", partial(_with_teacher, loss)))
    return found


def _ours(objective, inplace: bool, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return qtarget_cross_entropy(
        logits,
        labels,
        objective=objective,
        teacher_logits=teacher if objective.needs_teacher else None,
        inplace=inplace,
    )


def _without_teacher(loss: peers.Loss, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return loss(logits, labels)


def _with_teacher(loss, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return loss(logits, teacher, labels, ETA)


def measure(
    *,
    say: Callable[[str], None],
    tokens: int,
    vocabularies: list[int],
    dtypes: list[str],
    seconds: float,
    min_rounds: int,
    compiled: list[str],
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """One row for each vocabulary, dtype and method; ``seconds`` is spent on each vocabulary and dtype, or what
    min_rounds rounds take. On the CPU with torch's number of threads."""
    rows = []
    for vocabulary in vocabularies:
        for dtype in dtypes:
            say(f"{tokens} x {vocabulary} {dtype}, {_where(device)}: checking that all agree")
            where = torch.device(device)
            chosen = methods(getattr(torch, dtype), where, compiled)
            rows += measure_shape(tokens, vocabulary, getattr(torch, dtype), where, chosen, say, seconds, min_rounds)
    return rows


def _where(device: str) -> str:
    return f"{torch.get_num_threads()} thread(s)" if device == "cpu" else device


def measure_shape(
    tokens: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    chosen: list[Method],
    say: Callable[[str], None],
    seconds: float,
    min_rounds: int,
) -> list[dict[str, Any]]:
    """The rows of one vocabulary and dtype. Raises RuntimeError where a method computes something else than the first
    one of its objective."""
    generator = torch.Generator(device).manual_seed(1)
    draw = partial(torch.randn, tokens, vocabulary, generator=generator, device=device)
    fresh, teacher = draw().mul_(3).to(dtype), draw().mul_(3).to(dtype)
    logits = torch.empty_like(fresh).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    upstream = torch.ones(tokens, device=device)

    def refill() -> None:
        # Some overwrite the logits: each run gets them anew, outside of what is timed.
        logits.detach().copy_(fresh)

    def step(method: Method) -> tuple[Tensor, Tensor]:
        loss = method.loss(logits, teacher, labels)
        # One number (a sum) has the upstream 1, a loss per token ones of its own type.
        (gradient,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype) if loss.dim() else None)
        return loss.detach(), gradient

    subjects = {method: Subject(partial(step, method), refill) for method in chosen}
    extra, reference = {}, {}

    def extra_of(method: Method) -> int:
        subject = subjects[method]
        if method.name == "torch.compile" or device.type == "cuda":
            # What compiling allocates is not the method's.
            started = time.monotonic()
            subject.prepare()
            subject.run()
            if method.name == "torch.compile":
                say(f"compiled {method.objective} in {time.monotonic() - started:.1f} s")
        used, (loss, gradient) = memory(subject, device)
        if method.objective not in reference:
            reference[method.objective] = loss, gradient
        check(method.name, method.objective, loss, gradient, *reference[method.objective])
        return used.extra

    for method in chosen:
        try:
            extra[method] = extra_of(method)
        except Exception as error:
            if not method.optional:
                raise
            say(left_out(method.name, error))
            del subjects[method]
    reference.clear()

    copy = Method("", COPY, _without_teacher)
    subjects = {copy: Subject(refill)} | subjects
    extra[copy] = 0
    times = alternate(subjects, device=device, seconds=seconds, min_rounds=min_rounds)
    say(f"{len(times[copy])} rounds of {len(subjects)} methods are done")
    return [
        {
            "tokens": tokens,
            "vocabulary": vocabulary,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "objective": method.objective,
            "method": method.name,
            "passes": figures.COPY_PASSES if method is copy else method.passes,
            "logits_bytes": fresh.nbytes,
            "extra_bytes": extra[method],
            "seconds": times[method],
            **figures.summary(times[method]),
        }
        for method in subjects
    ]


def left_out(name: str, error: Exception) -> str:
    """The line that says so, of a peer."""
    return f"left out: {name}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def check(name: str, objective: str, loss: Tensor, gradient: Tensor, loss_0: Tensor, gradient_0: Tensor) -> None:
    """Refuse to time something that computes something else. One number is compared with the sum of the others."""
    tolerance = _TOLERANCE[gradient_0.dtype]
    if loss.dim() == 0:
        loss_0 = loss_0.sum()
    loss_off = (loss.float() - loss_0).abs().max() / loss_0.abs().max()
    # A row at a time: no copy of the matrix is made.
    gradient_off = max((a.float() - b.float()).abs().max() for a, b in zip(gradient, gradient_0, strict=True))
    gradient_off = gradient_off / gradient_0.abs().max()
    if not (loss_off <= tolerance and gradient_off <= tolerance):
        raise RuntimeError(
            f"{name} computes another {objective} than {OURS}: loss off by {loss_off:.2g}, gradient by "
            f"{gradient_off:.2g} of the largest value, {tolerance} allowed"
        )
