"""Bytes of the activations that Megatron's layers keep for their backward, on one rank.

Transformer Engine's layers: Megatron's own estimate (megatron.training.theoretical_memory_usage), applied to one layer,
scaled from bfloat16 to the training dtype and to the tokens of a context-parallel rank. It leaves out a third of a
gated MLP (4 bytes per token and unit of its width, not 6) and counts dropout masks and key/value heads that are not
there: for Llama 3 8B these cancel but for a fifteenth, 32 h bytes per token and layer against 34 h counted by hand. A
layer with experts is taken for a dense one as wide as what one token goes through, with two rows of hidden states for
each expert of a token besides.

Local layers: counted, tensor by tensor, without dropout. Per micro-batch, with n tokens of s a sample, n' of them on a
rank of sequence parallelism (else n' = n), e bytes of a number, h hidden size, and of a tensor-parallel rank: a query
heads of width d, q = a d and k numbers of queries and of keys, MLP width f:

    norm of width w      8 w + 4, in 16 bits 10 w + 4   input and product in float32, scale; the product in 16 bits
    a layer's two norms  2 n' (norm(h) + h e)           with their outputs, which the linear layers keep
      of the outputs     2 n' norm(h)                   where attention and MLP have norms behind them
    head norms           n (norm(d) per head)           float32: keys' input is the linear layer's output, kept whole
    rotary embedding     4 s r e                        cosine and sine, of queries and of keys; r of d are rotated
    attention            n (q + k + (q + 2 k)) e        its inputs: rotated queries and keys, the linear layer's output
      not recomputed     4 n a                          logsumexp; its output is the output layer's input
      of packed rows     n q e                          the samples' outputs besides; of C ranks as below
      of C ranks         n (q + C (2 q + 2 k)) e        queries and output at their places in the sequence, keys, values
      with a window w    n (4 q e + 4 a) + s (w + B) e  queries, keys and values of every head, the output of blocks of
                                                        B queries; their masks
      with sinks         n (q + 2 (a + g) (d + p)) e    p 1 in float32, else 3; g key/value heads; the output besides
      and a window       n (q + (4 + 2 m) a (d + p)) e  m = (1 - B / s) (1 + w / B), at least 0
    output layer         n q e
    MLP                  3 n f e                        output of the first linear layer, input of the second

Experts: k' per token, balanced, of width f' on each of E' expert tensor-parallel ranks make k' n' E' rows: (h + 3 f' +
1) e each (8 f' where they are clamped), and n' (20 k' + (1 + e) E) for the choice among E experts; of a weighted shared
expert n' (h + 1) e.

Latent attention, with r, p, v the rotary, plain and value widths: for each latent of width w n (norm(w) + w e), in
float32 the keys' rotary part beside it, n a (2 (r + p) + 2 v) e for queries, keys, values and the output layer's input,
and where attention is not recomputed n a (2 (r + p) - v) e + 4 n a for values as wide as keys, the output, and
logsumexp; of the rotary embedding 4 s r e.
"""

from __future__ import annotations

import argparse
import copy

from qtarget_megatron.huggingface import Architecture, Lora, linear_layers, projections
from qtarget_megatron.parallel_layout import Layout


class Activations:
    """What is kept of one micro-batch, in bytes."""

    def __init__(self, args: argparse.Namespace, layout: Layout, arch: Architecture, lora: Lora | None = None):
        self._args, self._layout, self._arch, self._lora = args, layout, arch, lora
        self._element = args.params_dtype.itemsize
        self._is_local = args.transformer_impl == "local"
        # Those of one tensor-parallel rank where sequence parallelism shares them.
        self._rows = layout.tokens / (layout.tensor if layout.sequence_parallel else 1)

    def hidden_states(self) -> float:
        return self._rows * self._arch.hidden_size * self._element

    def embedding(self) -> float:
        if not self._is_local:
            return self._megatrons(0)
        return 0 if self._lora else self._layout.tokens * (8 + (self._layout.tensor > 1))

    def final_norm(self) -> float:
        """Megatron counts none."""
        return self._norm(self._rows, self._arch.hidden_size) + self.hidden_states() if self._is_local else 0

    def layer(self, index: int, *, recomputes_attention: bool) -> float:
        has_experts = self._has_experts(index)
        if not self._is_local:
            found = self._megatrons(1, has_experts) - self._megatrons(0, has_experts)
            return found + self._adapters(index)
        norm, adapted = self._norm(self._rows, self._arch.hidden_size), self._adapted(index)
        found = 2 * norm + 2 * norm * self._arch.output_norms
        # What a frozen linear layer has multiplied is kept for its adapter alone, or for a router.
        kept = (("self_attention.linear_qkv", "self_attention.linear_kv_down_proj"), ("mlp.linear_fc1",))
        for inputs in kept:
            is_routed = has_experts and inputs == kept[1]
            found += self.hidden_states() if is_routed or self._keeps(adapted, *inputs) else 0
        if self._arch.latent is None:
            found += self._attention(index, recomputes_attention)
        else:
            found += self._latent_attention(recomputes_attention)
        found += self._experts(index) if has_experts else self._mlp(index, self._arch.ffn_hidden_size)
        return found + self._adapters(index)

    def gradients(self, index: int) -> float:
        """The most of a layer's gradients at once: those of the MLP's inputs."""
        if self._has_experts(index):
            return self._experts(index)
        return 3 * self._layout.tokens * self._arch.ffn_hidden_size / self._layout.tensor * self._element

    def _adapted(self, index: int) -> dict[str, int]:
        """The linear layers of a layer that have an adapter, and the projections in each."""
        if self._lora is None:
            return {}
        found = {}
        for path, linear in linear_layers(self._arch, index).items():
            numbers = projections(linear.sources, self._arch, self._lora)
            if count := len({number for number in numbers if number is not None}):
                found[path] = count
        return found

    def _keeps(self, adapted: dict[str, int], *paths: str) -> bool:
        """Whether the input of one of these linear layers is kept."""
        return self._lora is None or any(path in adapted for path in paths)

    def _adapters(self, index: int) -> float:
        """The products of A of a layer's adapters, B in the places of its rows, and what dropout has made."""
        found, layout, adapted = 0.0, self._layout, self._adapted(index)
        for path, linear in linear_layers(self._arch, index).items() if adapted else ():
            if path not in adapted:
                continue
            is_expert, width = path.startswith("mlp.experts."), adapted[path] * self._lora.rank
            ranks = layout.expert_tensor if is_expert else layout.tensor
            experts = self._arch.experts.count // layout.expert_parallel if is_expert else 1
            rows: float = self._arch.experts.per_token * self._rows * ranks if is_expert else layout.tokens
            inputs = rows if is_expert or linear.cut == 1 else self._rows
            if linear.cut == 1 and not is_expert:
                rows = self._rows
            found += rows * width * self._element
            if linear.cut == 0 and adapted[path] > 1:
                found += experts * linear.rows / ranks * (width + adapted[path]) * self._element
            if self._lora.dropout:
                columns = linear.columns / (ranks if linear.cut == 1 else 1)
                found += inputs * columns * (self._element + 1)
        return found

    def _has_experts(self, index: int) -> bool:
        return self._arch.experts is not None and self._arch.experts.layers[index]

    def _norm(self, rows: float, width: int) -> float:
        numbers = 8 if self._element == 4 else 10
        if self._lora is not None:
            # The scale's gradient needs the product.
            numbers -= 4 if self._element == 4 else 2
        return rows * (numbers * width + 4)

    def _attention(self, index: int, recomputes: bool) -> float:
        arch, layout, element = self._arch, self._layout, self._element
        heads = arch.num_attention_heads / layout.tensor
        groups = max(arch.num_query_groups / layout.tensor, 1)
        queries, keys = heads * arch.head_dim, groups * arch.head_dim
        length = layout.seq_length / layout.context
        found = 4 * length * arch.rotary_dim * element
        # The output layer's input, rotated queries and keys; the first linear layer's whole output, with the values.
        numbers, whole = 2 * queries + keys, queries + 2 * keys
        whole_is_normed = arch.qk_norm and element == 4
        if arch.qk_norm:
            found += self._norm(layout.tokens, arch.head_dim) * (heads + groups)
            if whole_is_normed:
                # The norms' inputs are that output: of queries only where no copy groups them by their keys.
                found -= 4 * layout.tokens * (keys if heads > groups > 1 else queries + keys)
        if not recomputes:
            found += 4 * layout.context * layout.tokens * heads
            if layout.context > 1:
                # The whole sequence's, in place of the rotated ones and values of this rank.
                numbers = queries + layout.context * (2 * queries + 2 * keys)
                whole = whole if whole_is_normed else 0
            elif self._args.pack:
                # The outputs of a row's samples, besides the row that they are put together to.
                numbers += queries
            window = arch.sliding_window - 1 if arch.window_layers and arch.window_layers[index] else None
            if window is not None and window < layout.seq_length - 1:
                from qtarget_megatron.megatron.model.attention import BLOCK

                numbers += layout.context * queries if layout.context == 1 else 0
                found += layout.seq_length * min(window + BLOCK, layout.seq_length) * element
                if heads > groups:
                    # Keys and values of every head in place of those of the groups.
                    numbers += 2 * layout.context * queries - (
                        keys if layout.context == 1 else 2 * layout.context * keys
                    )
                    whole = whole if whole_is_normed else 0
            if arch.sinks:
                numbers, whole = queries + layout.context * self._with_sinks(heads, groups, window), 0
        return found + layout.tokens * (numbers + whole) * element

    def _with_sinks(self, heads: float, groups: float, window: int | None) -> float:
        """Numbers per token of queries, keys, values and output with those of the sinks, which are copies."""
        from qtarget_megatron.megatron.model.attention import BLOCK

        length, wide = self._layout.seq_length, self._arch.head_dim + (1 if self._element == 4 else 3)
        if window is None or window >= length - 1:
            return 2 * (heads + groups) * wide
        # Each block of queries but the first has keys and values of its own.
        more = max(1 - BLOCK / length, 0) * (1 + window / BLOCK)
        return (4 + 2 * more) * heads * wide

    def _latent_attention(self, recomputes: bool) -> float:
        latent, layout, element = self._arch.latent, self._layout, self._element
        heads = self._arch.num_attention_heads / layout.tensor
        found = 4 * layout.seq_length / layout.context * latent.rotary_dim * element
        for width in (latent.query_rank, latent.key_value_rank):
            found += self._norm(layout.tokens, width) + layout.tokens * width * element
        found += layout.tokens * latent.rotary_dim * element if element == 4 else 0
        width = latent.plain_dim + latent.rotary_dim
        numbers = heads * 2 * (width + latent.value_dim)
        if not recomputes:
            numbers += heads * (2 * width - latent.value_dim) + self._args.pack * heads * latent.value_dim
            found += 4 * layout.tokens * heads
        return found + layout.tokens * numbers * element

    def _mlp(self, index: int, width: int, path: str = "mlp") -> float:
        widths = 2 + self._keeps(self._adapted(index), f"{path}.linear_fc2")
        return widths * self._layout.tokens * width / self._layout.tensor * self._element

    def _experts(self, index: int) -> float:
        experts, element, ranks = self._arch.experts, self._element, self._layout.expert_tensor
        rows = experts.per_token * self._rows * ranks
        # Megatron's fused SiLU keeps its input; of clamped functions autograd keeps each step.
        adapted = self._adapted(index)
        widths = (2 if experts.clamp is None else 7) + self._keeps(adapted, "mlp.experts.linear_fc2")
        inputs = self._arch.hidden_size * self._keeps(adapted, "mlp.experts.linear_fc1")
        found = rows * (inputs + widths * experts.ffn_hidden_size / ranks + 1) * element
        found += self._rows * (20 * experts.per_token + (1 + element) * experts.count)
        found += self._rows * (self._arch.hidden_size + 1) * element if experts.shared_weight else 0
        return found + self._mlp(index, experts.shared_ffn_hidden_size or 0, "mlp.shared_experts")

    def _megatrons(self, layers: int, has_experts: bool = False) -> float:
        """Megatron's estimate for these layers and the embedding before them.

        It is its figure for the first stage of two with a single micro-batch in flight, which leaves out the output
        layer.
        """
        from megatron.training import theoretical_memory_usage as megatrons

        layout, arch, args = self._layout, self._arch, copy.copy(self._args)
        width, rows = arch.ffn_hidden_size, 0.0
        if has_experts:
            experts = arch.experts
            width = experts.per_token * experts.ffn_hidden_size + (experts.shared_ffn_hidden_size or 0)
            rows = 2 * experts.per_token * layers
        changes = dict(num_layers=2 * layers, hidden_size=arch.hidden_size, ffn_hidden_size=width)
        changes |= dict(seq_length=layout.seq_length // layout.context, micro_batch_size=layout.micro_batch_size)
        changes |= dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=None)
        vars(args).update(changes)
        # Neither counts attention scores. The second is for tensor parallelism without sequence parallelism and takes
        # the MLP to be 4 h wide; Megatron's own report also shows it wherever nothing is recomputed.
        if layout.sequence_parallel or layout.tensor == 1:
            found = megatrons.compute_activation_memory(args, num_microbatches=1)
        else:
            found = megatrons.compute_activation_memory_without_sp(args, num_microbatches=1)
        return found * self._element / 2 + rows * self.hidden_states() * layout.expert_tensor
