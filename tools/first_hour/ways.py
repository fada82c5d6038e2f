"""Every objective against the float64 reference, called as GPU code is: captured, on another stream, another device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qtarget_megatron import objectives, qtarget_cross_entropy, qtarget_linear_cross_entropy
from qtarget_megatron.megatron.verify.problem import (
    LOSS_BOUND,
    Problem,
    Setting,
    chosen_objectives,
    gradient_bound,
    measure,
)
from qtarget_megatron.objectives import Objective
from tools.first_hour.work import Failed

Run = Callable[[Callable[[], tuple]], tuple]
_VOCABULARY, _HIDDEN, _TOKENS = 5003, 64, 64


def at_once(compute: Callable[[], tuple]) -> tuple:
    return compute()


def captured(compute: Callable[[], tuple]) -> tuple:
    """What a replay of a CUDA graph computes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # What a first call allocates or loads is not for a capture.
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compute()
    for tensor in found:
        if tensor.is_contiguous():
            tensor.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return tuple(tensor.clone() for tensor in found)


def on_a_stream(compute: Callable[[], tuple]) -> tuple:
    """On a stream that is behind: a kernel on any other one reads what has not been written yet."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        found = compute()
    stream.synchronize()
    return found


WAYS: dict[str, Run] = {"captured": captured, "stream": on_a_stream, "second device": at_once}


def compare(device: torch.device, dtype: torch.dtype, run: Run, chosen: list[Objective] | None = None) -> str:
    """In a line, how far the worst one is off; Failed with all that are beyond the bounds of verify_parallel."""
    problem = Problem.draw(
        vocab_size=_VOCABULARY, hidden=_HIDDEN, tokens=_TOKENS, seed=1, dtype=dtype, device=device, ranks=1
    )
    backend = "cuda" if device.type == "cuda" else "auto"
    bound, wrong, count, loss, gradient = gradient_bound(dtype, 1), [], 0, 0.0, 0.0
    for objective in chosen or chosen_objectives([]):
        for kind, found in measure(problem, objective, Setting(backend=backend, run=run), sparse=False).items():
            count, loss, gradient = count + 1, max(loss, found.loss), max(gradient, found.gradient)
            if not (found.loss <= LOSS_BOUND and found.gradient <= bound):
                wrong.append(f"{objective}, {kind}: loss {found.loss:.1e}, gradient {found.gradient:.1e}")
    if wrong:
        raise Failed(f"{len(wrong)} of {count} beyond {LOSS_BOUND:.0e} and {bound:.1e}: {'; '.join(wrong)}")
    return (
        f"{count} comparisons, loss off by {loss:.1e} of {LOSS_BOUND:.0e}, gradient by {gradient:.1e} of {bound:.1e} "
        "allowed at most"
    )


def no_labels(*, say: Callable[[str], None], device: str) -> None:
    """A batch without a supervised token, its vocabulary over all ranks; to be called on each."""
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    group = dist.new_group(backend="nccl" if device == "cuda" else "gloo")
    for name in ("sft", "target-sft"):
        check_no_labels(objectives.get(name), group, device)
    say("all zero")


def check_no_labels(objective: Objective, group: Any, device: str) -> None:
    """Failed where a loss or a gradient is not 0."""
    hidden, weight = (torch.randn(rows, 64, device=device).requires_grad_() for rows in (32, 1000))
    labels = torch.full((32,), -100, device=device)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    teacher = objective.needs_teacher
    loss = qtarget_cross_entropy(
        logits, labels, objective=objective, teacher_logits=logits.detach() if teacher else None, group=group
    )
    found: list[Tensor] = [loss, *torch.autograd.grad(loss.sum(), logits)]
    loss = qtarget_linear_cross_entropy(
        hidden,
        weight,
        labels,
        objective=objective,
        teacher_hidden=hidden.detach() if teacher else None,
        teacher_weight=weight.detach() if teacher else None,
        group=group,
    )
    found += [loss, *torch.autograd.grad(loss.sum(), (hidden, weight))]
    if not all((tensor == 0).all() for tensor in found):
        raise Failed(f"{objective}: a batch without labels has a loss or a gradient other than 0")
