"""Divergences from a teacher, forward and backward of given logits: what each costs over sft and kd, and what the loss
costs as one would write it, a chunk of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtarget_megatron import SparseTeacher, objectives, qtarget_cross_entropy
from tools.benchmarking import figures
from tools.benchmarking.kernels import COPY, OURS, check
from tools.benchmarking.measure import Subject, alternate, memory

CHUNKED = "eager, in chunks"
NO_TEACHER, WHOLE = "none", "logits"


@dataclass(frozen=True)
class Method:
    """One way to compute an objective's loss per token and its gradient to the logits; ours writes it over them."""

    objective: str
    name: str
    teacher: str
    step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (logits, teacher_logits, labels)


def measure(
    *,
    say: Callable[[str], None],
    tokens: int,
    vocabulary: int,
    dtype: str,
    top_k: int,
    chunk_size: int,
    seconds: float,
    min_rounds: int,
) -> list[dict[str, Any]]:
    """A row for each method, on the CPU with torch's number of threads. What is held: logits, a copy of them, the
    teacher's and one gradient. Raises RuntimeError where a method computes something else than ours."""
    say(f"{tokens} x {vocabulary} {dtype}, {torch.get_num_threads()} thread(s)")
    generator = torch.Generator().manual_seed(3)
    fresh = torch.empty(tokens, vocabulary, dtype=getattr(torch, dtype))
    teacher = torch.empty_like(fresh)
    for matrix in (fresh, teacher):
        for rows in matrix.split(chunk_size):  # no float32 copy of the whole
            rows.copy_(torch.randn(rows.shape, generator=generator).mul_(3))
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    kept = _kept(teacher, top_k, chunk_size)
    chosen = methods(kept, chunk_size)

    say("checking that all agree")
    few = slice(0, min(chunk_size, tokens))
    reference: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for method in methods(kept.rows(few), chunk_size // 2):
        loss, gradient = method.step(fresh[few].clone().requires_grad_(), teacher[few], labels[few])
        expected = reference.setdefault((method.objective, method.teacher), (loss, gradient))
        check(method.name, method.objective, loss, gradient, *expected)
    reference.clear()

    logits = torch.empty_like(fresh).requires_grad_()

    def refill() -> None:
        logits.detach().copy_(fresh)

    subjects = {method: Subject(partial(method.step, logits, teacher, labels), refill) for method in chosen}
    extra = {}
    for method, subject in subjects.items():
        used, _ = memory(subject, logits.device)
        extra[method] = used.extra
        say(f"{method.objective}, {method.name}, teacher: {method.teacher}")
    copy = Method("", COPY, NO_TEACHER, chosen[0].step)
    extra[copy] = 0
    times = alternate({copy: Subject(refill)} | subjects, device=logits.device, seconds=seconds, min_rounds=min_rounds)
    return [
        {
            "tokens": tokens,
            "vocabulary": vocabulary,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "chunk_size": chunk_size,
            "objective": method.objective,
            "method": method.name,
            "teacher": method.teacher,
            "logits_bytes": fresh.nbytes,
            "extra_bytes": extra[method],
            "seconds": taken,
            **figures.summary(taken),
        }
        for method, taken in times.items()
    ]


def methods(kept: SparseTeacher, chunk_size: int) -> list[Method]:
    """What is measured; ours comes before what it is compared with."""
    few = f"{kept.ids.shape[-1]} largest"
    chosen = {
        "kd": objectives.kd(),
        "reverse-kl": objectives.reverse_kl(),
        "mixed-kl": objectives.mixed_kl(),
        "jsd": objectives.jsd(),
        "skew-kl": objectives.skew_kl(),
        "skew-reverse-kl": objectives.skew_reverse_kl(),
        "total-variation": objectives.total_variation(),
    }
    found = [Method("sft", OURS, NO_TEACHER, partial(_ours, objectives.sft(), None))]
    found += [Method(name, OURS, WHOLE, partial(_ours, objective, None)) for name, objective in chosen.items()]
    found += [Method(name, OURS, few, partial(_ours, chosen[name], kept)) for name in EAGER_OF_KEPT]
    found += [Method(name, CHUNKED, WHOLE, partial(_in_chunks, loss, None, chunk_size)) for name, loss in EAGER.items()]
    found += [
        Method(name, CHUNKED, few, partial(_in_chunks, loss, kept, chunk_size)) for name, loss in EAGER_OF_KEPT.items()
    ]
    return found


def _ours(
    objective, kept: SparseTeacher | None, logits: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    given = {}
    if objective.needs_teacher:
        given = {"teacher_logits": teacher} if kept is None else {"sparse_teacher": kept}
    loss = qtarget_cross_entropy(logits, labels, objective=objective, inplace=True, **given)
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    return loss.detach(), gradient


def _in_chunks(
    loss_of, kept: SparseTeacher | None, chunk_size: int, logits: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of a chunk and its gradient, then those of the next; the gradient goes over the logits as ours does."""
    losses = []
    for start in range(0, len(labels), chunk_size):
        rows = slice(start, start + chunk_size)
        part = logits.detach()[rows].float().requires_grad_()
        log_p = F.log_softmax(part, dim=-1)
        if kept is None:
            loss = loss_of(log_p, F.log_softmax(teacher[rows].float(), dim=-1))
        else:  # the kept entries renormalised, nothing elsewhere: the tail rule "drop"
            loss = loss_of(log_p.gather(-1, kept.ids[rows]), kept.log_p[rows].log_softmax(-1))
        (gradient,) = torch.autograd.grad(loss.sum(), part)
        logits.detach()[rows].copy_(gradient)
        losses.append(loss.detach())
    return torch.cat(losses), logits.detach()


def _kd(log_p: Tensor, log_t: Tensor) -> Tensor:
    return F.kl_div(log_p, log_t, reduction="none", log_target=True).sum(-1)


def _reverse_kl(log_p: Tensor, log_t: Tensor) -> Tensor:
    return F.kl_div(log_t, log_p, reduction="none", log_target=True).sum(-1)


def _jsd(log_p: Tensor, log_t: Tensor) -> Tensor:
    middle = torch.logaddexp(log_p, log_t) - math.log(2)
    return 0.5 * (_kd(middle, log_t) + _kd(middle, log_p))


def _jsd_of_kept(log_p: Tensor, log_t: Tensor) -> Tensor:
    """p log(p / m) is p log 2 where t is 0."""
    return _jsd(log_p, log_t) + 0.5 * math.log(2) * (1 - log_p.exp().sum(-1))


EAGER = {"kd": _kd, "reverse-kl": _reverse_kl, "jsd": _jsd}
EAGER_OF_KEPT = {"kd": _kd, "jsd": _jsd_of_kept}


def _kept(teacher: Tensor, top_k: int, chunk_size: int) -> SparseTeacher:
    ids, log_p = [], []
    for rows in teacher.split(chunk_size):
        largest = F.log_softmax(rows.float(), dim=-1).topk(top_k, dim=-1)
        ids.append(largest.indices)
        log_p.append(largest.values)
    log_p = torch.cat(log_p)
    return SparseTeacher(torch.cat(ids), log_p, -torch.expm1(log_p.logsumexp(-1)).clamp(max=0), rule="drop")
