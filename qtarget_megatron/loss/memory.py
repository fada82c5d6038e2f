"""What a loss costs beside its logits: bytes on a rank at its peak, and what its collectives send.

Bytes on one rank unless said otherwise. n: tokens of a micro-batch on a context-parallel rank, all of them taken as
supervised; V: columns of the vocabulary shard; h: hidden size; e: bytes of a number in the training dtype; T: ranks of
the tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtarget_megatron.loss.linear_cross_entropy import COLUMN_TILE

# A token's statistics, maxima and masses that live until backward, float64.
_TOKEN_BYTES = 8 * 20


# An entry of a cached teacher: int64 id and float32 log-probability; a token's tail.
_ENTRY_BYTES, _TAIL_BYTES = 12, 4


@dataclass(frozen=True)
class LossShape:
    """What the loss is computed from on the last pipeline stage.

    width:            float32 numbers per token and rank that the objective's statistics have (StatisticsRequest.width).
    gradient_element: bytes of a number in main_grad.
    teacher_hidden:   width of a live second model, else 0.
    entries:          kept by a cached one per token, else 0.
    on_cpu:           torch then copies what is added in another dtype.
    frozen_head:      the output layer's weight is not trained, so that nothing is made for its gradient.
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
    frozen_head: bool = False

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
        """Bytes of what autograd gets for the weight."""
        return 0 if self.frozen_head else self.columns * self.hidden * self.element


def fused_loss_bytes(shape: LossShape, chunk_size: int) -> int:
    """Peak of the fused head's forward and backward: hidden states in, their gradient out.

    The rows of hidden states (of both models) and chunk_size rows of logits of each live from forward to backward.
    At the peak there are, besides, either the gradient of these rows and a product of COLUMN_TILE rows of the
    weight's gradient (16-bit dtypes), or, once the logits are gone, that gradient in both orders and what autograd
    gets in place of the weight's gradient. The sum of the products is main_grad, or a float32 matrix where that has
    16 bits.
    """
    kept = shape.tokens * (shape.hidden + shape.teacher_hidden) * shape.element
    logits = min(chunk_size, shape.tokens) * shape.columns * shape.element * shape.models
    product = total = 0
    if shape.element < 4 and not shape.frozen_head:
        product = min(COLUMN_TILE, shape.columns) * shape.hidden * (shape.element + (4 if shape.on_cpu else 0))
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
    """Bytes of a cached teacher's entries on the last stage: as read, [b, s, K], and transposed, [s, b, K]."""
    return 2 * shape.tokens * (shape.entries * _ENTRY_BYTES + _TAIL_BYTES)


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
        if not fused and not shape.frozen_head:
            # Megatron's output layer keeps its own part only, and its weight's gradient needs all of it.
            found.append(Transfer("hidden states, in backward", "all-gather", group, shape.hidden_bytes))
    operation = "reduce-scatter" if shape.sequence_parallel else "all-reduce"
    return [*found, Transfer("gradient of hidden states", operation, group, shape.hidden_bytes)]
