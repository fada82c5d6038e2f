"""Memory and communication of a layout before anything is built: the parts that follow from this package's own loss.

Bytes on one rank unless said otherwise. n: tokens of a micro-batch on a context-parallel rank, all of them taken as
supervised; V: columns of the vocabulary shard; h: hidden size; e: bytes of a number in the training dtype; T: ranks of
the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qtarget_megatron.checkpoint import Architecture

GIB = 2**30
# A token's statistics, maxima and masses that live until backward, float64.
_TOKEN_BYTES = 8 * 20
# Rows of the weight's gradient that the fused head makes at a time where the dtype has 16 bits.
_GRADIENT_ROWS = 8192
# An entry of a cached teacher: int64 id and float32 log-probability; a token's tail.
_ENTRY_BYTES, _TAIL_BYTES = 12, 4


@dataclass(frozen=True)
class Layout:
    """How a training is cut."""

    world_size: int
    tensor: int
    pipeline: int
    context: int
    sequence_parallel: bool
    seq_length: int
    micro_batch_size: int
    global_batch_size: int | None
    expert_parallel: int = 1
    expert_tensor: int = 1

    @property
    def model_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        return self.world_size // self.model_ranks

    @property
    def expert_data(self) -> int:
        """Ranks that have the same experts."""
        return self.world_size // (self.expert_tensor * self.expert_parallel * self.pipeline)

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.seq_length // self.context


def division_problems(arch: Architecture, who: str, *, tensor: int, seq_length: int | None) -> Iterator[str]:
    """One line for each thing of a model that tensor parallelism does not divide or that it has too little of.

    who: the model in the text. Its layers are another matter: see stage_problems.
    """
    flag = f"--tensor-model-parallel-size {tensor}"
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    if heads % tensor:
        yield f"{flag} does not divide the {heads} attention heads of the {who}: use one of {divisors(heads)}"
    if groups % tensor and tensor % groups:
        fitting = [size for size in divisors(heads) if groups % size == 0 or size % groups == 0]
        yield (
            f"{flag} neither divides nor is a multiple of the {groups} key/value heads of the {who}: use one of "
            f"{fitting}"
        )
    if arch.ffn_hidden_size % tensor:
        yield f"{flag} does not divide the MLP width {arch.ffn_hidden_size} of the {who}"
    if arch.hidden_size % tensor:
        yield f"{flag} does not divide the hidden size {arch.hidden_size} of the {who}"
    if seq_length is not None and seq_length > arch.max_position_embeddings:
        yield f"--seq-length {seq_length} exceeds the {arch.max_position_embeddings} positions of the {who}"


def stage_problems(arch: Architecture, who: str, *, pipeline: int) -> Iterator[str]:
    """One line where the layers of the first model do not divide into stages, and no flag says how they are shared. (A
    teacher's are shared whatever their number.)"""
    if arch.num_layers % pipeline:
        yield (
            f"--pipeline-model-parallel-size {pipeline} does not divide the {arch.num_layers} layers of the {who}: use "
            f"one of {divisors(arch.num_layers)}, or say with --pipeline-model-parallel-layout which stage has which"
        )


def expert_problems(
    arch: Architecture,
    who: str,
    *,
    world_size: int,
    tensor: int,
    pipeline: int,
    expert_parallel: int,
    expert_tensor: int,
) -> Iterator[str]:
    """One line for each thing of a model's experts that the layout does not divide; none for a model without."""
    experts = arch.experts
    if experts is None:
        return
    if experts.count % expert_parallel:
        yield (
            f"--expert-model-parallel-size {expert_parallel} does not divide the {experts.count} experts of the {who}: "
            f"use one of {divisors(experts.count)}"
        )
    if experts.ffn_hidden_size % expert_tensor:
        yield (
            f"--expert-tensor-parallel-size {expert_tensor} (default: that of tensor parallelism) does not divide the "
            f"expert width {experts.ffn_hidden_size} of the {who}"
        )
    if (experts.shared_ffn_hidden_size or 0) % tensor:
        yield (
            f"--tensor-model-parallel-size {tensor} does not divide the width {experts.shared_ffn_hidden_size} of the "
            f"experts of the {who} that every token goes through"
        )
    ranks = expert_tensor * expert_parallel * pipeline
    if world_size % ranks:
        yield (
            f"expected a multiple of {ranks} processes for expert tensor x expert x pipeline parallel = "
            f"{expert_tensor} x {expert_parallel} x {pipeline}, got {world_size}"
        )


def layout_problems(layout: Layout) -> Iterator[str]:
    """One line for each way in which ranks, tokens and batch do not divide, all of them."""
    cp, length = layout.context, layout.seq_length
    if cp > 1 and length % (2 * cp):
        yield f"--seq-length {length}: CP {cp} cuts it into {2 * cp} equal parts, use a multiple of that"
    elif layout.sequence_parallel and length // cp % layout.tensor:
        yield (
            f"--seq-length {length}: --sequence-parallel cuts it into {layout.tensor} equal parts"
            f"{f' on each of {cp} context-parallel ranks' if cp > 1 else ''}, use a multiple of {layout.tensor * cp}"
        )
    if layout.world_size % layout.model_ranks:
        yield (
            f"--world-size {layout.world_size} is no multiple of TP {layout.tensor} x PP {layout.pipeline} x CP {cp} = "
            f"{layout.model_ranks}"
        )
        return
    samples = layout.micro_batch_size * layout.data
    if layout.global_batch_size is not None and layout.global_batch_size % samples:
        yield (
            f"--global-batch-size {layout.global_batch_size} is no multiple of --micro-batch-size "
            f"{layout.micro_batch_size} x DP {layout.data} = {samples}"
        )


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


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


# ---- the loss


@dataclass(frozen=True)
class LossShape:
    """What the loss is computed from on the last pipeline stage.

    width: float32 numbers per token and rank that the objective's statistics have (StatisticsRequest.width).
    gradient_element: bytes of a number in main_grad. teacher_hidden: width of a live second model, else 0. entries:
    kept by a cached one per token, else 0. on_cpu: torch then copies what is added in another dtype.
    """

    tokens: int
    hidden: int
    columns: int
    ranks: int
    sequence_parallel: bool
    element: int
    width: int
    gradient_element: int = 4
    teacher_hidden: int = 0
    entries: int = 0
    on_cpu: bool = False

    @property
    def statistics_width(self) -> int:
        # The entries of a cached teacher are a shard of their own.
        return self.width * (2 if self.entries else 1)

    @property
    def hidden_bytes(self) -> int:
        return self.tokens * self.hidden * self.element

    @property
    def token_bytes(self) -> int:
        """Partials of all ranks, their float64 copy, and the merged statistics."""
        return self.tokens * (self.statistics_width * self.ranks * (4 + 8) + _TOKEN_BYTES)

    @property
    def models(self) -> int:
        """That have logits."""
        return 2 if self.teacher_hidden else 1

    @property
    def weight_bytes(self) -> int:
        return self.columns * self.hidden * self.element


def fused_loss_bytes(shape: LossShape, chunk_size: int) -> int:
    """Peak of the fused head's forward and backward: hidden states in, their gradient out.

    The rows of hidden states (of both models) and chunk_size rows of logits of each live from forward to backward. At
    the peak there are, besides, either the gradient of these rows and a product of 8192 rows of the weight's gradient
    (16-bit dtypes), or, once the logits are gone, that gradient in both orders and what autograd gets in place of the
    weight's gradient. The sum of the products is main_grad, or a float32 matrix where that has 16 bits.
    """
    kept = shape.tokens * (shape.hidden + shape.teacher_hidden) * shape.element
    logits = min(chunk_size, shape.tokens) * shape.columns * shape.element * shape.models
    product = total = 0
    if shape.element < 4:
        product = min(_GRADIENT_ROWS, shape.columns) * shape.hidden * (shape.element + (4 if shape.on_cpu else 0))
        total = 4 * shape.columns * shape.hidden if shape.gradient_element < 4 else 0
    shard = shape.hidden_bytes // (shape.ranks if shape.sequence_parallel else 1)
    in_chunks = shape.hidden_bytes + logits + product
    at_end = shape.hidden_bytes + max(shard + shape.weight_bytes, shape.hidden_bytes)
    return kept + total + max(in_chunks, at_end) + shape.token_bytes


def whole_loss_bytes(shape: LossShape) -> int:
    """Peak of Megatron's output layer and the loss of its logits: n V e for each model that has them.

    The gradient overwrites the student's logits; the teacher's live as long. With the gradients of hidden states and
    of the weight (or what autograd gets in its place).
    """
    logits = shape.tokens * shape.columns * shape.element * shape.models
    shard = shape.hidden_bytes // shape.ranks if shape.sequence_parallel else 0
    return logits + shape.hidden_bytes + shard + shape.weight_bytes + shape.token_bytes


def cached_teacher_bytes(shape: LossShape) -> int:
    """Of a cached teacher's entries on the last stage, as read and in the order of the hidden states."""
    return 2 * shape.tokens * (shape.entries * _ENTRY_BYTES + _TAIL_BYTES)


# ---- what travels


@dataclass(frozen=True)
class Transfer:
    """A message of one micro-batch: what, by which operation, within which group, bytes of the whole tensor."""

    what: str
    operation: str
    group: str
    bytes: int


def loss_transfers(shape: LossShape, *, fused: bool) -> list[Transfer]:
    """The collectives of the loss for one micro-batch, over the tensor-parallel group; none for a group of one.

    bytes: of the tensor that every rank has afterwards (all-gather, all-reduce) or had before (reduce-scatter).
    """
    if shape.ranks == 1:
        return []
    group = f"TP {shape.ranks}"
    statistics = 4 * shape.statistics_width * shape.tokens * shape.ranks
    found = [Transfer("statistics", "all-gather", group, statistics)]
    taught = shape.tokens * shape.teacher_hidden * shape.element
    if shape.sequence_parallel:
        found.append(Transfer("hidden states", "all-gather", group, shape.hidden_bytes))
        if taught:
            found.append(Transfer("teacher's hidden states", "all-gather", group, taught))
        if not fused:
            # Megatron's output layer keeps its own part only.
            found.append(Transfer("hidden states, in backward", "all-gather", group, shape.hidden_bytes))
    operation = "reduce-scatter" if shape.sequence_parallel else "all-reduce"
    return [*found, Transfer("gradient of hidden states", operation, group, shape.hidden_bytes)]


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


# ---- the plan


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
    """problems: what does not fit or divide; notes: what could be better; counted: the second model that the totals
    hold, "live", "cached" or "none". losses: bytes of the loss on the last stage with "fused" and "whole" logits, for
    each second model that is possible."""

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
