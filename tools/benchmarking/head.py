"""The output layer and the loss together: logits a chunk at a time against logits as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qtarget_megatron import objectives, qtarget_cross_entropy, qtarget_linear_cross_entropy
from qtarget_megatron.statistics import IGNORE_INDEX
from tools.benchmarking import figures, peers
from tools.benchmarking.kernels import ETA, left_out
from tools.benchmarking.measure import Subject, alternate, memory

FUSED, MAIN_GRAD, FROZEN = "fused head", "fused head, main_grad", "fused head, frozen weight"
WHOLE, TORCH, EAGER = "whole logits, in place", "whole logits, torch", "whole logits, eager"
# Gradients of float32 and of bfloat16 products that are summed in another order, as a share of the largest entry.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """A shape. supervised: share of the tokens with a label; teacher: measure target-sft with a second head of the same
    shape, else sft; chunk_sizes: of the fused head, the first one also with the ignored tokens. peers: measure other
    packages' output layer and loss in one as well, and the fused head at each chunk size without the weight's gradient.
    """

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str
    chunk_sizes: list[int] = field(default_factory=lambda: [512])
    supervised: list[float] = field(default_factory=lambda: [1.0, 0.3])
    teacher: bool = False
    peers: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Head:
    """The tensors of one case."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor


def measure(
    *, say: Callable[[str], None], cases: list[dict[str, Any]], seconds: float, min_rounds: int
) -> list[dict[str, Any]]:
    """One row for each case, share of supervised tokens, method and chunk size. Times are of forward and backward, with
    the gradients of hidden states and weight; memory is that of one run, before the timed ones.

    resident_bytes: growth of the process's resident memory; allocated_bytes, extra_bytes: of torch's allocator, with
    and without the gradients that the run returns."""
    # Thread pools and the libraries' own buffers, on a small shape.
    _run_once(Case(8, 16, 64, "float32", chunk_sizes=[4]))
    _run_once(Case(8, 16, 64, "bfloat16", chunk_sizes=[4]))
    rows = []
    for arguments in cases:
        case = Case(**arguments)
        for share in case.supervised:
            say(
                f"{case.tokens} tokens ({share:.0%} supervised), hidden {case.hidden}, vocabulary {case.vocabulary}, "
                f"{case.dtype}{', with a teacher' if case.teacher else ''}: memory, and checking that all agree"
            )
            rows += _case(case, share, say, seconds, min_rounds)
    return rows


def _run_once(case: Case) -> None:
    head = draw(case, 1.0)
    for subject in methods(case, head, 1.0).values():
        subject.prepare()
        subject.run()


def methods(case: Case, head: Head, share: float) -> dict[tuple[str, int | None], Subject]:
    """(name, chunk size) -> forward and backward: loss per token or its sum, gradients of hidden states and of the
    weight, None for a frozen one."""
    objective = objectives.target_sft(eta=ETA) if case.teacher else objectives.sft()
    chunk_sizes = case.chunk_sizes if share == 1.0 else case.chunk_sizes[:1]
    found: dict[tuple[str, int | None], Callable[[], Tensor]] = {}
    for chunk_size in chunk_sizes:
        found[FUSED, chunk_size] = partial(_fused, head, objective, chunk_size)
    found[WHOLE, None] = partial(_whole, head, objective)
    if case.teacher:
        found[EAGER, None] = partial(_eager, head)
    else:
        found[TORCH, None] = partial(_torch, head)
    if case.peers:
        # A group of one rank.
        group = dist.new_group(backend="nccl") if case.device == "cuda" else dist.group.WORLD
        for name, loss in peers.linear_cross_entropies(torch.device(case.device), group).items():
            found[name, None] = partial(loss, head.hidden, head.weight, head.labels)
    upstream = torch.ones(case.tokens, device=case.device)

    def step(loss_of: Callable[[], Tensor], weight: Tensor) -> tuple[Tensor | None, ...]:
        loss = loss_of()
        leaves = (head.hidden, weight) if weight.requires_grad else (head.hidden,)
        of_hidden, *of_weight = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype) if loss.dim() else None)
        return loss.detach(), of_hidden, getattr(weight, "main_grad", *of_weight or [None])

    subjects = {key: Subject(partial(step, loss_of, head.weight)) for key, loss_of in found.items()}
    if head.weight.dtype != torch.float32:
        # As in training by Megatron, where the float32 sum is there already.
        weight = head.weight.detach().requires_grad_()
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        loss_of = partial(_fused, replace(head, weight=weight), objective, chunk_sizes[0])
        subjects[MAIN_GRAD, chunk_sizes[0]] = Subject(partial(step, loss_of, weight), weight.main_grad.zero_)
    if case.peers:
        frozen = replace(head, weight=head.weight.detach())
        for size in chunk_sizes:
            subjects[FROZEN, size] = Subject(partial(step, partial(_fused, frozen, objective, size), frozen.weight))
    return subjects


def _fused(head: Head, objective, chunk_size: int) -> Tensor:
    return qtarget_linear_cross_entropy(
        head.hidden,
        head.weight,
        head.labels,
        objective=objective,
        teacher_hidden=head.teacher_hidden,
        teacher_weight=head.teacher_weight,
        chunk_size=chunk_size,
    )


def _whole(head: Head, objective) -> Tensor:
    return qtarget_cross_entropy(
        head.hidden @ head.weight.t(),
        head.labels,
        objective=objective,
        teacher_logits=_teacher_logits(head) if objective.needs_teacher else None,
        inplace=True,
    )


def _torch(head: Head) -> Tensor:
    return peers.torch_cross_entropy(head.hidden @ head.weight.t(), head.labels)


def _eager(head: Head) -> Tensor:
    loss = peers.eager_target_sft(head.hidden @ head.weight.t(), _teacher_logits(head), head.labels.clamp(min=0), ETA)
    return loss.masked_fill(head.labels == IGNORE_INDEX, 0)


def _teacher_logits(head: Head) -> Tensor:
    with torch.no_grad():
        return head.teacher_hidden @ head.teacher_weight.t()


def draw(case: Case, share: float) -> Head:
    """Random tensors, logits of standard deviation 3, and labels for a share of the tokens."""
    generator = torch.Generator(case.device).manual_seed(2)
    draw_with = dict(generator=generator, device=case.device)
    dtype = getattr(torch, case.dtype)

    def matrix(rows: int, scale: float) -> Tensor:
        return torch.randn(rows, case.hidden, **draw_with).mul_(scale).to(dtype)

    labels = torch.randint(case.vocabulary, (case.tokens,), **draw_with)
    labels[torch.randperm(case.tokens, **draw_with)[round(share * case.tokens) :]] = IGNORE_INDEX
    scale = 3 / case.hidden**0.5
    rows = case.vocabulary if case.teacher else 0
    return Head(
        hidden=matrix(case.tokens, 1).requires_grad_(),
        weight=matrix(case.vocabulary, scale).requires_grad_(),
        teacher_hidden=matrix(case.tokens, 1),
        teacher_weight=matrix(rows, scale),
        labels=labels,
    )


def _case(
    case: Case, share: float, say: Callable[[str], None], seconds: float, min_rounds: int
) -> list[dict[str, Any]]:
    device = torch.device(case.device)
    head = draw(case, share)
    subjects = methods(case, head, share)
    used, reference = {}, None
    optional = peers.linear_cross_entropies(device, dist.group.WORLD) if case.peers else {}
    for key, subject in list(subjects.items()):
        try:
            if case.device == "cuda":
                # What a first run compiles or keeps is not the method's.
                subject.prepare()
                subject.run()
            used[key], results = memory(subject, device)
            reference = results if reference is None else reference
            _check(key[0], results, reference)
            del results
        except Exception as error:
            if key[0] not in optional:
                raise
            say(left_out(key[0], error))
            del subjects[key]
    del reference
    times = alternate(subjects, device=device, seconds=seconds, min_rounds=min_rounds)
    say(f"{len(next(iter(times.values())))} rounds of {len(subjects)} methods are done")
    return [
        {
            "tokens": case.tokens,
            "hidden": case.hidden,
            "vocabulary": case.vocabulary,
            "dtype": case.dtype,
            "objective": "target-sft" if case.teacher else "sft",
            "supervised": share,
            "threads": torch.get_num_threads() if case.device == "cpu" else None,
            "method": name,
            "chunk_size": chunk_size,
            "allocated_bytes": used[name, chunk_size].peak,
            "extra_bytes": used[name, chunk_size].extra,
            "resident_bytes": used[name, chunk_size].resident,
            "seconds": times[name, chunk_size],
            **figures.summary(times[name, chunk_size]),
        }
        for name, chunk_size in subjects
    ]


def _check(name: str, results: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> None:
    """Refuse to time something that computes something else."""
    tolerance = _TOLERANCE[reference[1].dtype]
    for what, found, expected in zip(("loss", "dHidden", "dWeight"), results, reference, strict=True):
        if found is None:
            continue
        if found.dim() == 0:
            # One number is compared with the sum of the others.
            found, expected = found[None], expected.sum()[None]
        # A row at a time: no copy of the matrix is made.
        off = max((a.float() - b.float()).abs().max() for a, b in zip(found, expected, strict=True))
        off = off / expected.abs().max()
        if not off <= tolerance:
            raise RuntimeError(
                f"{name}: {what} differs from that of {FUSED} by {off:.2g} of its largest value, {tolerance} allowed"
            )
