"""Causal attention of Megatron's local layers by torch's scaled_dot_product_attention: no matrix of scores is kept.

Megatron's own local attention makes [b, heads, s, s] scores and probabilities, takes neither packed rows nor context
parallelism, and is an order of magnitude slower on a CPU. This one serves machines without Transformer Engine, a CPU or
a GPU (where torch has flash kernels).

    out_i = sum_j softmax_j(scale q_i . k_j) v_j,    j <= i, i - j <= window, j in the same sample as i

A sink is a learnt number of each head that takes part in the softmax like another score, whose value is 0:

    out_i = sum_j exp(scale q_i . k_j) v_j / (exp(sink) + sum_j exp(scale q_i . k_j))

To torch's kernels it is a key before the first one. Queries and keys get further numbers: sink / scale in a query, 1 in
that key, 0 in the others.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from qtarget_megatron.megatron.model.context_parallel import Edges, own_tokens, places_in_order

# Queries that share a mask, where a window needs one: torch's kernels know the causal rule alone.
BLOCK = 512


class LocalAttention(MegatronModule):
    """Core attention of a layer, in the place of Megatron's DotProductAttention.

    Shapes: query [s, b, heads, d], key [s, b, groups, d], value [s, b, groups, d_v] -> [s, b, heads d_v]; packed rows
    have no b. Under context parallelism s is this rank's part of the sequence: chunks r and 2 C - 1 - r of 2 C.

    Collectives: under context parallelism one all-gather of keys and one of values over that group, and their
    reduce-scatters in backward.

    softmax_offset: the sinks of this rank's heads, where config.softmax_type is learnable; else None.

    Errors: ValueError for a window that looks ahead.
    """

    softmax_offset: Tensor | None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ):
        """k_channels, v_channels: head widths of latent attention; default config.kv_channels. softmax_scale: default
        1 / sqrt(the head width of keys)."""
        super().__init__(config=config)
        self._scale = softmax_scale or 1 / math.sqrt(k_channels or config.kv_channels)
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._window = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, max(1, layer_number)):
            left, right = config.window_size
            if right != 0:
                raise ValueError(f"a causal window has no tokens to the right, got --window-size {left},{right}")
            self._window = left if left >= 0 else None
        self._cp = pg_collection.cp if config.context_parallel_size > 1 else None
        self._ranks = config.context_parallel_size
        self._tp = pg_collection.tp
        self.softmax_offset = None
        if config.softmax_type != "vanilla":
            self.softmax_offset = self._new_sinks(config)

    def _new_sinks(self, config: TransformerConfig) -> torch.nn.Parameter:
        if config.softmax_type != "learnable":
            raise ValueError(f"sinks are learnt or absent in local layers, got --softmax-type {config.softmax_type}")
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        heads = config.num_attention_heads // self._tp.size()
        sinks = torch.nn.Parameter(torch.empty(heads, device=device, dtype=config.params_dtype))
        if config.perform_initialization:
            config.init_method(sinks)
        return sinks

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The sinks, as Megatron's own attention saves them."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._tp,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of these queries. attention_mask: not read, since what a token sees follows from its position."""
        if packed_seq_params is None:
            edges = [(0, len(query) * self._ranks)]
            return self._samples(query, key, value, edges)
        query, key, value = (x[:, None] for x in (query, key, value))
        return self._samples(query, key, value, sample_edges(packed_seq_params)).squeeze(1)

    def _samples(self, query: Tensor, key: Tensor, value: Tensor, edges: Edges) -> Tensor:
        """[s, b, heads d_v] of rows with a sample between each two edges."""
        if self._cp is None:
            return self._causal_each(query, key, value, edges)
        # Queries keep their places in the sequence, so that torch's causal kernels know what each one sees. The ranks
        # share all of a layer but the work of this.
        device = query.device
        order = places_in_order(edges, self._ranks).to(device)
        own = own_tokens(edges, self._cp.rank(), self._ranks).to(device)
        key, value = (gather_from_sequence_parallel_region(x, group=self._cp)[order] for x in (key, value))
        # A row of zeros stands for the queries of others. (index_copy would keep this rank's for backward.)
        places = torch.full((len(key),), len(query), device=device)
        places[own] = torch.arange(len(query), device=device)
        whole = torch.cat([query, torch.zeros_like(query[:1])])[places]
        return self._causal_each(whole, key, value, edges)[own]

    def _causal_each(self, query: Tensor, key: Tensor, value: Tensor, edges: Edges) -> Tensor:
        if len(edges) == 1:
            return self._causal(query, key, value)
        return torch.cat([self._causal(*(x[begin:end] for x in (query, key, value))) for begin, end in edges])

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, batch, heads, _ = query.shape
        width = value.shape[-1]
        if width < query.shape[-1]:
            # torch's kernels without scores have one width; zeros in values stay zeros.
            value = F.pad(value, (0, query.shape[-1] - width))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.softmax_offset is not None:
            query, key, value = self._with_sinks(query, key, value)
        if self._window is None or self._window >= length - 1:
            out = self._attend(query, key, value, is_causal=True, enable_gqa=heads != key.shape[1])
        else:
            out = self._windowed(query, key, value)
        # A sink has a query of its own, so that torch's rule of what is causal holds.
        return out[:, :, -length:, :width].permute(2, 0, 1, 3).reshape(length, batch, heads * width)

    def _windowed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        share = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(share, 1) if share > 1 else x for x in (key, value))
        blocks = []
        for first in range(0, query.shape[2], BLOCK):
            block = query[:, :, first : first + BLOCK]
            end, low = first + block.shape[2], max(first - self._window, 0)
            at, seen = (torch.arange(*ends, device=query.device) for ends in ((first, end), (low, end)))
            keys, values = key[:, :, low:end], value[:, :, low:end]
            if self.softmax_offset is not None and low:
                keys, values = (torch.cat([x[:, :, :1], x[:, :, low:end]], 2) for x in (key, value))
                seen = F.pad(seen, (1, 0))
            mask = (seen <= at[:, None]) & (seen >= at[:, None] - self._window)
            if self.softmax_offset is not None:
                mask |= seen == 0
            blocks.append(self._attend(block, keys, values, attn_mask=mask))
        return torch.cat(blocks, 2)

    def _with_sinks(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[b, heads or groups, 1 + s, d + p]: a sink's key before the others; p numbers add up to sink / scale."""
        rest, parts = self.softmax_offset.float() / self._scale, []
        # What float32 holds takes three numbers of 16 bits.
        for _ in range(1 if query.itemsize > 2 else 3):
            parts.append(rest.to(query.dtype))
            rest = (rest - parts[-1]).detach()
        query, key, value = (F.pad(x, (0, len(parts), 1, 0)) for x in (query, key, value))
        query[..., -len(parts) :] = torch.stack(parts, -1)[:, None]
        key[:, :, 0, -len(parts) :] = 1
        return query, key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **how) -> Tensor:
        dropout = self._dropout if self.training else 0.0
        # As Megatron: ranks that hold other heads drop other probabilities.
        draws = nullcontext if dropout == 0 or self.config.sequence_parallel else get_cuda_rng_tracker().fork
        with draws():
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self._scale, **how)


def sample_edges(packed: PackedSeqParams) -> Edges:
    """Begin and end of each sample in a packed row, which the host knows where batches.py has made them; else it waits
    for the device, once per row."""
    edges = getattr(packed, "host_edges", None)
    if edges is None:
        ends = packed.cu_seqlens_q.tolist()
        edges = packed.host_edges = [(begin, end) for begin, end in zip(ends, ends[1:], strict=False) if end > begin]
    return edges
