"""Causal attention of Megatron's local layers by torch's scaled_dot_product_attention: no matrix of scores is kept.

Megatron's own local attention makes [b, heads, s, s] scores and probabilities, takes neither packed rows nor context
parallelism, and is an order of magnitude slower on a CPU. This one serves machines without Transformer Engine, a CPU or
a GPU (where torch has flash kernels).

    out_i = sum_j softmax_j(scale q_i . k_j) v_j,    j <= i, i - j <= window, j in the same sample as i
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
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

# Queries that share a mask, where a window needs one: torch's kernels know the causal rule alone.
BLOCK = 512


class LocalAttention(MegatronModule):
    """Core attention of a layer, in the place of Megatron's DotProductAttention.

    Shapes: query [s, b, heads, d], key [s, b, groups, d], value [s, b, groups, d_v] -> [s, b, heads d_v]; packed rows
    have no b. Under context parallelism s is this rank's part of the sequence: chunks r and 2 C - 1 - r of 2 C.

    Collectives: under context parallelism one all-gather of keys and one of values over that group, and their
    reduce-scatters in backward.

    Errors: ValueError for a softmax with an offset and for a window that looks ahead.
    """

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
        if config.softmax_type != "vanilla":
            raise ValueError(f"local layers have the vanilla softmax only, got --softmax-type {config.softmax_type}")
        self._scale = softmax_scale or 1 / math.sqrt(k_channels or config.kv_channels)
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._window = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, max(1, layer_number)):
            left, right = config.window_size
            if right != 0:
                raise ValueError(f"a causal window has no tokens to the right, got --window-size {left},{right}")
            self._window = left if left >= 0 else None
        self._cp = pg_collection.cp if config.context_parallel_size > 1 else None

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
        if packed_seq_params is not None:
            parts = [
                self._row(*(x[begin:end, None] for x in (query, key, value)))
                for begin, end in sample_edges(packed_seq_params)
            ]
            return torch.cat(parts).squeeze(1)
        return self._row(query, key, value)

    def _row(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[s, b, heads d_v], of rows that are one sample each."""
        if self._cp is None:
            return self._causal(query, key, value)
        # Queries keep their places in the sequence, so that torch's causal kernels know what each one sees. The ranks
        # share all of a layer but the work of this.
        order = places_in_order(len(query), self._cp.size(), query.device)
        key, value = (gather_from_sequence_parallel_region(x, group=self._cp)[order] for x in (key, value))
        own = order.argsort()[self._cp.rank() * len(query) :][: len(query)]
        # A row of zeros stands for the queries of others. (index_copy would keep this rank's for backward.)
        places = torch.full((len(key),), len(query), device=query.device)
        places[own] = torch.arange(len(query), device=query.device)
        whole = torch.cat([query, torch.zeros_like(query[:1])])[places]
        return self._causal(whole, key, value)[own]

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, batch, heads, _ = query.shape
        width = value.shape[-1]
        if width < query.shape[-1]:
            # torch's kernels without scores have one width; zeros in values stay zeros.
            value = F.pad(value, (0, query.shape[-1] - width))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self._window is None or self._window >= length - 1:
            out = self._attend(query, key, value, is_causal=True, enable_gqa=heads != key.shape[1])
        else:
            out = self._windowed(query, key, value)
        return out[..., :width].permute(2, 0, 1, 3).reshape(length, batch, heads * width)

    def _windowed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        share = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(share, 1) if share > 1 else x for x in (key, value))
        blocks = []
        for first in range(0, query.shape[2], BLOCK):
            block = query[:, :, first : first + BLOCK]
            end, low = first + block.shape[2], max(first - self._window, 0)
            at, seen = (torch.arange(*ends, device=query.device) for ends in ((first, end), (low, end)))
            mask = (seen <= at[:, None]) & (seen >= at[:, None] - self._window)
            blocks.append(self._attend(block, key[:, :, low:end], value[:, :, low:end], attn_mask=mask))
        return torch.cat(blocks, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **how) -> Tensor:
        dropout = self._dropout if self.training else 0.0
        # As Megatron: ranks that hold other heads drop other probabilities.
        draws = nullcontext if dropout == 0 or self.config.sequence_parallel else get_cuda_rng_tracker().fork
        with draws():
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self._scale, **how)


def sample_edges(packed: PackedSeqParams) -> list[tuple[int, int]]:
    """Begin and end of each sample in a packed row. It waits for the device once per row, at the first layer."""
    edges = getattr(packed, "host_edges", None)
    if edges is None:
        ends = packed.cu_seqlens_q.tolist()
        edges = packed.host_edges = [(begin, end) for begin, end in zip(ends, ends[1:], strict=False) if end > begin]
    return edges


def places_in_order(share: int, ranks: int, device: torch.device) -> Tensor:
    """Where each token of a sequence stands in what the ranks of context parallelism hold of it, share tokens each, one
    rank after another: of 2 C chunks rank r has chunks r and 2 C - 1 - r."""
    chunks = torch.arange(share * ranks, device=device).view(2 * ranks, -1)
    return torch.cat([chunks[::2], chunks[1::2].flip(0)]).flatten()
