"""Attention of this rank's heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from .distributed import divide
from .module.base import TransformerEngineBaseModule


class DotProductAttention(TransformerEngineBaseModule):
    """Causal attention over [sequence, batch, heads, channels], softmax in float32.

    num_attention_heads, num_gqa_groups: of all ranks. kv_channels: of keys and values, or of each. window_size: tokens
    before and behind the one that attends, itself not counted; none behind it. softmax_type: "learnable" has a score
    more for each head.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group=None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
    ):
        super().__init__()
        before, behind = window_size or (-1, 0)
        if (attn_mask_type, behind, attention_dropout, attention_type) != ("causal", 0, 0.0, "self"):
            raise NotImplementedError("the stand-in for Transformer Engine has causal self-attention alone")
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.set_tensor_parallel_group(tp_group)
        if softmax_type not in ("vanilla", "learnable"):
            raise NotImplementedError(f"the stand-in for Transformer Engine has no softmax of type {softmax_type}")
        self.softmax_offset = None
        if softmax_type == "learnable":
            offsets = torch.empty(divide(num_attention_heads, self.tp_size), device="cuda")
            self.softmax_offset = torch.nn.Parameter(offsets)
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        self.num_gqa_groups_per_partition = divide(self.num_gqa_groups, self.tp_size)
        channels = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v = channels
        self.window_size = before, behind
        self.softmax_scale = channels[0] ** -0.5 if softmax_scale is None else softmax_scale

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, *, attn_mask_type: str = "causal"):
        if attn_mask_type != "causal":
            raise NotImplementedError("the stand-in for Transformer Engine has causal self-attention alone")
        heads, groups = divide(self.num_attention_heads, self.tp_size), self.num_gqa_groups_per_partition
        expected = heads, self.hidden_size_per_attention_head_k
        found = tuple(query_layer.shape[2:]), tuple(key_layer.shape[2:]), tuple(value_layer.shape[2:])
        if found != (expected, (groups, expected[1]), (groups, self.hidden_size_per_attention_head_v)):
            raise ValueError(f"unexpected heads and channels of queries, keys and values: {found}")
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_layer, key_layer, value_layer))
        key, value = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in (key, value))
        scores = torch.einsum("bhqc,bhkc->bhqk", query.float(), key.float()) * self.softmax_scale
        length = scores.shape[-1]
        position = torch.arange(length, device=scores.device)
        distance, before = position[:, None] - position, self.window_size[0]
        unseen = (distance < 0) | ((distance > before) if before >= 0 else False)
        scores = scores.masked_fill(unseen, -torch.inf)
        if self.softmax_offset is not None:
            offsets = self.softmax_offset.float()[:, None, None]
            scores = torch.cat([scores, offsets.expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)[..., :length]
        out = torch.einsum("bhqk,bhkc->qbhc", weights, value.float())
        return out.to(value.dtype).flatten(2)
