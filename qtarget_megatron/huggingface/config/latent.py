"""Multi-head latent attention: what config.json says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtarget_megatron.huggingface.config.config_file import boolean, positive_int, positive_number, shown

# What transformers gives the norms of the latents, whatever rms_norm_eps says.
_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose queries, keys and values are made from small latents.

    query_rank, key_value_rank: widths of the latents. Each head of queries and keys has plain_dim numbers without and
    rotary_dim numbers with rotary embedding, the latter shared by the keys of all heads; value_dim: of a value head.
    """

    query_rank: int
    key_value_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int


def read_latent(config: Mapping[str, Any]) -> LatentAttention:
    """The latent attention of a config. ValueError where Megatron would compute something else."""
    if config.get("num_key_value_heads") not in (None, config.get("num_attention_heads")):
        raise ValueError(
            "config.json: expected num_key_value_heads to be num_attention_heads (latent attention), got "
            f"{shown(config['num_key_value_heads'])}"
        )
    if boolean(config, "attention_bias"):
        raise ValueError("config.json: expected attention_bias false: Megatron's latent attention has no biases")
    if not boolean({"rope_interleave": True, **config}, "rope_interleave"):
        raise ValueError("config.json: expected rope_interleave true: Megatron's latent attention rotates pairs")
    if (epsilon := positive_number(config, "rms_norm_eps", default=1e-6)) != _NORM_EPSILON:
        raise ValueError(
            f"config.json: expected rms_norm_eps {_NORM_EPSILON}, which the norms of the latents have in any case, got "
            f"{epsilon}: Megatron has one for all norms"
        )
    if config.get("q_lora_rank") is None:
        raise ValueError(
            "config.json: expected q_lora_rank to be a number, got null: Megatron adds a norm to queries that are made "
            "without a latent"
        )
    rotary = positive_int(config, "qk_rope_head_dim", most=2**16)
    if rotary % 2:
        raise ValueError(f"config.json: expected an even qk_rope_head_dim for rotary pairs, got {rotary}")
    return LatentAttention(
        query_rank=positive_int(config, "q_lora_rank"),
        key_value_rank=positive_int(config, "kv_lora_rank"),
        plain_dim=positive_int(config, "qk_nope_head_dim"),
        rotary_dim=rotary,
        value_dim=positive_int(config, "v_head_dim"),
    )
