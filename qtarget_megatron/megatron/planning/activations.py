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
    head norms           n (norm(d) per head)           float32: keys' input is the linear layer's output, kept whole
    rotary embedding     4 s d e                        cosine and sine, of queries and of keys
    attention            n (2 q + v) e + n a s e + s s  queries, keys, v values; probabilities (4 + e bytes where the
                                                        softmax is float32 and e < 4); mask
      recomputed         n (q + k + (q + 2 k)) e        its inputs
    output layer         n q e
    MLP                  3 n f e                        output of the first linear layer, input of the second

v = q where several heads share keys and values, else the linear layer's whole output, q + 2 k. Experts: k' per token,
balanced, of width f' on each of E' expert tensor-parallel ranks make k' n' E' rows: (h + 3 f' + 1) e each, and 20 k' +
(1 + e) E for the choice among E experts. Latent attention: for each latent of width w n (norm(w) + w e), in float32 the
keys' rotary part beside it, n a (4 rotary, plain and value widths) e for queries, keys, values and the output layer's
input, and the probabilities and mask; of the rotary embedding 4 s r e, r its width.
"""

from __future__ import annotations

import argparse
import copy

from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.parallel_layout import Layout


class Activations:
    """What is kept of one micro-batch, in bytes; in_float32: whether probabilities are."""

    def __init__(self, args: argparse.Namespace, layout: Layout, arch: Architecture, *, in_float32: bool):
        self._args, self._layout, self._arch = args, layout, arch
        self._element = args.params_dtype.itemsize
        self._in_float32 = in_float32
        self._is_local = args.transformer_impl == "local"
        # Those of one tensor-parallel rank where sequence parallelism shares them.
        self._rows = layout.tokens / (layout.tensor if layout.sequence_parallel else 1)

    def hidden_states(self) -> float:
        return self._rows * self._arch.hidden_size * self._element

    def embedding(self) -> float:
        if not self._is_local:
            return self._megatrons(0)
        return self._layout.tokens * (8 + (self._layout.tensor > 1))

    def final_norm(self) -> float:
        """Megatron counts none."""
        return self._norm(self._rows, self._arch.hidden_size) + self.hidden_states() if self._is_local else 0

    def layer(self, index: int, *, recomputes_attention: bool) -> float:
        has_experts = self._has_experts(index)
        if not self._is_local:
            return self._megatrons(1, has_experts) - self._megatrons(0, has_experts)
        found = 2 * (self._norm(self._rows, self._arch.hidden_size) + self.hidden_states())
        attention = self._attention if self._arch.latent is None else self._latent_attention
        found += attention(recomputes_attention)
        return found + (self._experts() if has_experts else self._mlp(self._arch.ffn_hidden_size))

    def gradients(self, index: int) -> float:
        """The most of a layer's gradients at once: of probabilities and scores where they exist, or those of the MLP's
        inputs."""
        of_mlp = self._experts() if self._has_experts(index) else self._mlp(self._arch.ffn_hidden_size)
        length = self._layout.seq_length / self._layout.context
        scores = self._layout.tokens * self._arch.num_attention_heads / self._layout.tensor * length * self._element
        return max(of_mlp, 2 * scores if self._is_local else 0)

    def _has_experts(self, index: int) -> bool:
        return self._arch.experts is not None and self._arch.experts.layers[index]

    def _norm(self, rows: float, width: int) -> float:
        return rows * ((8 if self._element == 4 else 10) * width + 4)

    def _attention(self, recomputes: bool) -> float:
        arch, layout, element = self._arch, self._layout, self._element
        heads = arch.num_attention_heads / layout.tensor
        groups = max(arch.num_query_groups / layout.tensor, 1)
        queries, keys = heads * arch.head_dim, groups * arch.head_dim
        length = layout.seq_length / layout.context
        found = 4 * length * arch.head_dim * element
        numbers, has_whole = queries, False  # the output layer's input; the first linear layer's whole output
        if arch.qk_norm:
            found += self._norm(layout.tokens, arch.head_dim) * (heads + groups)
            # In float32 the input is that output: of queries a part of it, where they do not share keys.
            has_whole = element == 4
            found -= 4 * layout.tokens * (keys if heads > groups else queries + keys) if has_whole else 0
        if recomputes:
            numbers, has_whole = numbers + queries + keys, True
        else:
            found += self._scores(heads)
            numbers += 2 * queries
            if heads > groups:
                numbers += queries
            else:
                has_whole = True
        return found + layout.tokens * (numbers + (queries + 2 * keys if has_whole else 0)) * element

    def _latent_attention(self, recomputes: bool) -> float:
        latent, layout, element = self._arch.latent, self._layout, self._element
        heads = self._arch.num_attention_heads / layout.tensor
        found = 4 * layout.seq_length / layout.context * latent.rotary_dim * element
        for width in (latent.query_rank, latent.key_value_rank):
            found += self._norm(layout.tokens, width) + layout.tokens * width * element
        found += layout.tokens * latent.rotary_dim * element if element == 4 else 0
        numbers = heads * 2 * (latent.plain_dim + latent.rotary_dim + latent.value_dim)
        return found + layout.tokens * numbers * element + (0 if recomputes else self._scores(heads))

    def _scores(self, heads: float) -> float:
        """Probabilities and mask."""
        length = self._layout.seq_length / self._layout.context
        number = self._element + (4 if self._in_float32 and self._element < 4 else 0)
        return self._layout.tokens * heads * length * number + length**2

    def _mlp(self, width: int) -> float:
        return 3 * self._layout.tokens * width / self._layout.tensor * self._element

    def _experts(self) -> float:
        experts, element, ranks = self._arch.experts, self._element, self._layout.expert_tensor
        rows = experts.per_token * self._rows * ranks
        found = rows * (self._arch.hidden_size + 3 * experts.ffn_hidden_size / ranks + 1) * element
        found += self._rows * (20 * experts.per_token + (1 + element) * experts.count)
        return found + self._mlp(experts.shared_ffn_hidden_size or 0)

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
