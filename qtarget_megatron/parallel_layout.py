"""How a training is cut into ranks, and what of a model, a sequence or a batch the cut does not divide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qtarget_megatron.huggingface import Architecture


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
        """Tokens of a micro-batch on one context-parallel rank."""
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
    if seq_length is not None and seq_length > arch.max_sequence_length:
        yield f"--seq-length {seq_length} exceeds the {arch.sequence_limit(who)}"


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
    if experts.bias and expert_tensor > 1:
        yield (
            f"Megatron does not cut experts with biases, as those of the {who} have: give "
            "--expert-tensor-parallel-size 1 (the default is the size of tensor parallelism)"
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


def sequence_problems(seq_length: int, context: int, sequence_parallel: int) -> Iterator[str]:
    """One line where a sequence does not divide among context-parallel ranks, or each part of it among those of
    sequence parallelism (1: none)."""
    if context > 1 and seq_length % (2 * context):
        yield (
            f"--seq-length {seq_length}: CP {context} cuts it into {2 * context} equal parts, use a multiple of that"
        )
    elif seq_length // context % sequence_parallel:
        yield (
            f"--seq-length {seq_length}: --sequence-parallel cuts it into {sequence_parallel} equal parts"
            f"{f' on each of {context} context-parallel ranks' if context > 1 else ''}, use a multiple of "
            f"{sequence_parallel * context}"
        )


def layout_problems(layout: Layout) -> Iterator[str]:
    """One line for each way in which ranks, tokens and batch do not divide, all of them."""
    cp = layout.context
    yield from sequence_problems(layout.seq_length, cp, layout.tensor if layout.sequence_parallel else 1)
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


# ---- the loss


# ---- what travels


# ---- the plan
