"""How time and memory grow: time with tokens, vocabulary and shards, memory with tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtarget_megatron import objectives, qtarget_cross_entropy
from tools.benchmarking import figures, head
from tools.benchmarking.kernels import ETA
from tools.benchmarking.measure import Subject, alternate, memory

BY_TOKENS, BY_VOCABULARY, BY_SHARDS, MEMORY = "time by tokens", "time by vocabulary", "time by shards", "memory"


def measure(
    *,
    say: Callable[[str], None],
    tokens: list[int],
    tokens_at: int,
    vocabularies: list[int],
    vocabularies_at: int,
    shards: list[int],
    shards_at: tuple[int, int],
    memory_tokens: list[int],
    memory_at: tuple[int, int],
    chunk_size: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Rows of four series, float32, in place, forward and backward:

    time by tokens: ``tokens`` at the vocabulary ``tokens_at``; time by vocabulary: ``vocabularies`` at
    ``vocabularies_at`` tokens; time by shards: shards_at = (tokens, vocabulary) cut by vocabulary, each shard timed by
    itself (what one rank computes; collectives are not in it); memory: bytes of torch's allocator of the output layer
    and loss at ``memory_tokens`` tokens, memory_at = (hidden size, vocabulary),
    a chunk of the fused head being of chunk_size tokens.
    """
    rows = []
    for series, sizes in {
        BY_TOKENS: [(number, tokens_at) for number in tokens],
        BY_VOCABULARY: [(vocabularies_at, number) for number in vocabularies],
    }.items():
        say(f"{series}: {', '.join(str(x) for x in (tokens if series == BY_TOKENS else vocabularies))}")
        for objective in ("sft", "target-sft"):
            times = _times({size: _subject(objective, *size) for size in sizes}, seconds)
            for (number, vocabulary), taken in times.items():
                row = {"series": series, "objective": objective, "tokens": number, "vocabulary": vocabulary}
                rows.append(row | {"seconds": taken, **figures.summary(taken)})

    number, vocabulary = shards_at
    say(f"{BY_SHARDS}: {number} x {vocabulary} cut into {', '.join(map(str, shards))}")
    for objective in ("sft", "target-sft"):
        parts = [(count, rank) for count in shards for rank in range(count)]
        times = _times(
            {part: _subject(objective, number, vocabulary // part[0], seed=part[1]) for part in parts}, seconds
        )
        for (count, rank), taken in times.items():
            row = {"series": BY_SHARDS, "objective": objective, "tokens": number, "vocabulary": vocabulary}
            rows.append(row | {"shards": count, "shard": rank, "seconds": taken, **figures.summary(taken)})

    hidden, vocabulary = memory_at
    say(f"{MEMORY}: {', '.join(map(str, memory_tokens))} tokens")
    for number in memory_tokens:
        case = head.Case(number, hidden, vocabulary, "float32", chunk_sizes=[chunk_size])
        drawn = head.draw(case, 1.0)
        for (name, chunk), subject in head.methods(case, drawn, 1.0).items():
            used, _ = memory(subject, torch.device("cpu"))
            row = {"series": MEMORY, "method": name, "chunk_size": chunk, "tokens": number, "hidden": hidden}
            rows.append(row | {"vocabulary": vocabulary, "allocated_bytes": used.peak, "extra_bytes": used.extra})
    return rows


def _times(subjects: dict[Any, Subject], seconds: float) -> dict[Any, list[float]]:
    for subject in subjects.values():
        subject.prepare()
        subject.run()
    return alternate(subjects, device=torch.device("cpu"), seconds=seconds, min_rounds=5)


def _subject(name: str, tokens: int, vocabulary: int, seed: int = 0) -> Subject:
    objective = objectives.sft() if name == "sft" else objectives.target_sft(eta=ETA)
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(tokens, vocabulary, generator=generator)
    teacher = torch.randn(tokens, vocabulary, generator=generator) if objective.needs_teacher else None
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    logits, upstream = torch.empty_like(fresh).requires_grad_(), torch.ones(tokens)

    def step() -> tuple[Tensor, ...]:
        loss = qtarget_cross_entropy(logits, labels, objective=objective, teacher_logits=teacher, inplace=True)
        return torch.autograd.grad(loss, logits, upstream)

    return Subject(step, partial(logits.detach().copy_, fresh))
