"""What a plan says: bytes of each stage, what travels, what does not fit and what could be better."""

from __future__ import annotations

from dataclasses import dataclass, field

from qtarget_megatron.loss.memory import Transfer
from qtarget_megatron.parallel_layout import Layout

GIB = 2**30


def padding_note(vocab_size: int, padded: int, tensor: int, multiple: int, row_bytes: int, who: str) -> str | None:
    """One line on rows of the vocabulary's matrices that no token uses; None where there are none.

    multiple: --make-vocab-size-divisible-by. row_bytes: of a row of them with its gradient and optimizer state, on all
    ranks of a replica.
    """
    if padded == vocab_size:
        return None
    sizes = [2**power for power in range(multiple.bit_length()) if 2**power < multiple]
    better = max((size for size in sizes if vocab_size % (size * tensor) == 0), default=None)
    unused = padded - vocab_size
    return (
        f"vocabulary of the {who}: {vocab_size:,} tokens are padded to {padded:,} rows, {unused / vocab_size:.1%} more "
        f"or {unused * row_bytes / GIB:.2f} GiB over all ranks of a replica"
        + (f"; --make-vocab-size-divisible-by {better} pads none" if better else "")
    )


def pipeline_transfers(layout: Layout, element: int, hidden: int, teacher_hidden: int) -> list[Transfer]:
    """What goes from each pipeline stage to the next one and back: [s, b, h_student + h_teacher]."""
    if layout.pipeline == 1:
        return []
    rows = layout.tokens // (layout.tensor if layout.sequence_parallel else 1)
    size = rows * (hidden + teacher_hidden) * element
    what = "hidden states of both models" if teacher_hidden else "hidden states"
    return [
        Transfer(what, "send to the next stage", f"PP {layout.pipeline}", size),
        Transfer(f"gradient of {what}", "send back", f"PP {layout.pipeline}", size),
    ]


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: its layers, parameters and bytes by item on each of its ranks."""

    rank: int
    layers: int
    parameters: int
    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class CachedTeacher:
    """entries kept of each token; bytes on a rank of the last stage, besides the loss; on disk for each supervised
    token."""

    entries: int
    bytes: int
    disk_bytes_per_token: int


@dataclass
class Plan:
    """What a layout takes.

    counted:  the second model that the totals hold: "live", "self" (the student without its adapters), "cached" or
              "none".
    losses:   bytes of the loss on the last stage with "fused" and "whole" logits, for each second model that is
              possible.
    problems: what does not fit or divide.
    notes:    what could be better.
    """

    summary: str
    stages: list[Stage] = field(default_factory=list)
    counted: str = "none"
    losses: dict[str, dict[str, int]] = field(default_factory=dict)
    cached: CachedTeacher | None = None
    transfers: list[Transfer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def shown_stages(self) -> dict[str, Stage]:
        """First, middle (the one with the highest total) and last, as far as there are that many."""
        first, *others = self.stages
        if not others:
            return {"only": first}
        *middle, last = others
        shown = {"first": first}
        if middle:
            shown["middle"] = max(middle, key=lambda stage: stage.total)
        return shown | {"last": last}


def memory_problem(stages: list[Stage], limit: int, advice: dict[str, str]) -> str | None:
    """One line where a stage needs more than limit: the worst one's largest items and what to change; else None.

    advice: what to change, by the first word of an item's name.
    """
    too_large = [stage for stage in stages if stage.total > limit]
    if not too_large:
        return None
    worst = max(too_large, key=lambda stage: stage.total)
    largest = sorted(worst.items, key=worst.items.get, reverse=True)[:3]
    sizes = ", ".join(f"{name} {worst.items[name] / GIB:.1f}" for name in largest)
    todo = dict.fromkeys(advice[name.split()[0].strip(",")] for name in largest if worst.items[name])
    return (
        f"{len(too_large)} of {len(stages)} stages need more than {limit / GIB:.1f} GiB per rank; stage {worst.rank} "
        f"{worst.total / GIB:.1f}, most of it {sizes}. Change: {'; '.join(todo)}"
    )
