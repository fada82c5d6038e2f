"""What a Hugging Face ``config.json`` says about a decoder, read as plain JSON.

No transformers class and no remote code is involved: an ``auto_map`` in the file is ignored, and an architecture that
no file of ``families/`` declares is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtarget_megatron.huggingface.config import families
from qtarget_megatron.huggingface.config.config_file import (
    boolean,
    declared_dtype,
    positive_int,
    positive_number,
    read_config,
    rule,
    shown,
    token_ids,
)
from qtarget_megatron.huggingface.config.experts import Experts, read_experts
from qtarget_megatron.huggingface.config.family import Family
from qtarget_megatron.huggingface.config.latent import LatentAttention, read_latent
from qtarget_megatron.huggingface.config.layers import read_unrotated_layers, read_windows
from qtarget_megatron.huggingface.config.multipliers import Multipliers, read_multipliers
from qtarget_megatron.huggingface.config.quantization import read_quantization
from qtarget_megatron.huggingface.config.rope import (
    RopeScaling,
    check_frequencies,
    inverse_frequencies,
    read_partial_rotary,
    read_rope,
)

# Nothing comes near: models have up to some hundred layers, and heads of some hundred numbers.
_MOST_LAYERS, _MOST_HEAD_DIM = 10_000, 2**16

# A null means "absent", except where null is itself the meaning (no window, no such token).
_NULLABLE = (
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "num_key_value_heads",
    "head_dim",
    "q_lora_rank",
    "partial_rotary_factor",
)


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder checkpoint.

    ``head_dim``: of a query and key head. ``ffn_hidden_size``: of the MLP in layers without experts. ``tied``: the
    output head is the embedding. ``qkv_bias``, ``output_bias`` (o_proj) and ``mlp_bias``: which linear layers carry a
    bias. ``qk_norm``: RMS norm per head on queries and keys. ``sinks``: the softmax of each head has a learnt score
    more, whose value is 0. ``rope_scaling`` is None for the default rotary embedding.
    ``partial_rotary_factor``: of a head's numbers, the first ones, have the rotary embedding (``rotary_dim`` of them);
    ``rotary_interleaved``: it pairs neighbouring numbers, not those half its width apart.
    ``sliding_window``: tokens that a layer of ``window_layers`` attends to, itself included. ``window_layers`` and
    ``unrotated_layers`` (without rotary embedding) have one entry per layer, or none where no layer is of that kind.
    ``experts`` is None where every layer has one MLP, ``latent`` where queries, keys and values are made from the
    hidden states. ``dtype`` is what config.json declares, bfloat16 where it declares nothing. ``eos_token_ids`` is
    empty and ``bos_token_id`` None where the model has none. ``further_layers``: a checkpoint may hold so many behind
    the last one, which predict further tokens; they count among the model's tensors where ``has_further`` (see
    with_further). ``output_norms``: further RMS norms behind attention
    and MLP. ``multipliers`` is None where nothing is multiplied by a fixed number.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope_base: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    window_layers: tuple[bool, ...] = ()
    unrotated_layers: tuple[bool, ...] = ()
    experts: Experts | None = None
    latent: LatentAttention | None = None
    partial_rotary_factor: float = 1.0
    rotary_interleaved: bool = False
    further_layers: int = 0
    has_further: bool = False
    output_norms: bool = False
    multipliers: Multipliers | None = None
    sinks: bool = False

    def with_further(self) -> Architecture:
        """The model with its layers that predict further tokens."""
        return dataclasses.replace(self, has_further=self.further_layers > 0)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts; one that predicts further tokens is like the last one."""
        return self.experts is not None and self.experts.layers[min(layer, self.num_layers - 1)]

    @classmethod
    def from_hf(cls, directory: str | Path) -> Architecture:
        """Read ``directory/config.json``.

        Raises ValueError, in one line, for a missing or malformed file, an unknown architecture, a
        quantisation that is not read, and any setting that this package would not reproduce exactly.
        """
        raw = read_config(directory)
        try:
            return cls.from_config(raw)
        except ValueError as error:
            raise ValueError(f"{directory}/{error}") from None

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> Architecture:
        """What the entries of a config.json say. Raises ValueError as from_hf does."""
        family = _find_family(raw)
        config = dict(family.defaults)
        for key, value in raw.items():
            if value is not None or key in _NULLABLE:
                config[family.aliases.get(key, key)] = value
        _refuse(config, family.fixed)
        heads = positive_int(config, "num_attention_heads")
        hidden = positive_int(config, "hidden_size")
        layers = positive_int(config, "num_hidden_layers", _MOST_LAYERS)
        positions = positive_int(config, "max_position_embeddings")
        groups = heads
        if config.get("num_key_value_heads") is not None:
            groups = positive_int(config, "num_key_value_heads")
        if heads % groups:
            raise ValueError(
                f"config.json: expected num_attention_heads ({heads}) to be a multiple of "
                f"num_key_value_heads ({groups})"
            )
        rope_base, rope_scaling = read_rope(config, positions, family.rope_types)
        unrotated = read_unrotated_layers(config, family, layers)
        window, window_layers = read_windows(config, family.window, layers, unrotated)
        latent = read_latent(config) if family.latent else None
        head_dim = _head_dim(config, hidden, heads) if latent is None else latent.plain_dim + latent.rotary_dim
        arch = cls(
            family=family.name,
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=positive_int(config, "intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            vocab_size=positive_int(config, "vocab_size"),
            max_position_embeddings=positions,
            norm_epsilon=positive_number(config, "rms_norm_eps", default=1e-6),
            tied=boolean(config, "tie_word_embeddings"),
            qkv_bias=rule(config, family.qkv_bias),
            output_bias=rule(config, family.output_bias),
            mlp_bias=rule(config, family.mlp_bias),
            qk_norm=rule(config, family.qk_norm),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            sliding_window=window,
            dtype=declared_dtype(config) or torch.bfloat16,
            eos_token_ids=token_ids(config, "eos_token_id"),
            bos_token_id=next(iter(token_ids(config, "bos_token_id")), None),
            window_layers=window_layers,
            unrotated_layers=unrotated,
            experts=read_experts(config, family.experts, layers),
            latent=latent,
            partial_rotary_factor=read_partial_rotary(config, family.partial_rotary, head_dim),
            rotary_interleaved=family.rotary_interleaved,
            further_layers=_further_layers(config, family.further_layers),
            output_norms=family.output_norms,
            multipliers=read_multipliers(config) if family.multipliers else None,
            sinks=family.sinks,
        )
        check_frequencies(arch.rotary_dim, rope_base, rope_scaling)
        return arch

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a query and key head have the rotary embedding."""
        if self.latent is not None:
            return self.latent.rotary_dim
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the longest sequence whose rotary embedding is that of inverse_frequencies()."""
        scaling = self.rope_scaling
        if scaling is None or scaling.short_factor == scaling.long_factor:
            return self.max_position_embeddings
        return min(self.max_position_embeddings, scaling.original_max_position_embeddings)

    def sequence_limit(self, who: str) -> str:
        """max_sequence_length in words, with the reason where it is below max_position_embeddings. who: the model."""
        limit = self.max_sequence_length
        if limit == self.max_position_embeddings:
            return f"{limit} positions of the {who}"
        return (
            f"{limit} positions of the {who} (its original_max_position_embeddings: longer sequences have other rotary "
            "frequencies in transformers, by long_factor, but Megatron has the same for all)"
        )

    def inverse_frequencies(self) -> torch.Tensor:
        """Rotary inverse frequencies, float32 ``[rotary_dim / 2]``, the bits that transformers computes."""
        return inverse_frequencies(self.rotary_dim, self.rope_base, self.rope_scaling)

    def softmax_scale(self) -> float | None:
        """What the scores q k are multiplied by; None for 1 / sqrt(head_dim), and for latent attention.

        The attention factor multiplies cosine and sine, hence all of queries and keys where all of them are rotated:
        the scores by its square.
        """
        factor = self._attention_factor() if self._rotates_all() else 1.0
        if factor == 1 and self.multipliers is None:
            return None
        plain = 1 / math.sqrt(self.head_dim) if self.multipliers is None else self.multipliers.attention
        return factor**2 * plain

    def rotary_scale(self) -> float:
        """What cosine and sine are multiplied by, where softmax_scale() does not do it."""
        return 1.0 if self._rotates_all() else self._attention_factor()

    def _attention_factor(self) -> float:
        # Megatron's latent attention has yarn of its own.
        if self.latent is not None or self.rope_scaling is None:
            return 1.0
        return self.rope_scaling.attention_factor

    def _rotates_all(self) -> bool:
        return self.rotary_dim == self.head_dim and not self.unrotated_layers


def _find_family(raw: Mapping[str, Any]) -> Family:
    try:
        return families.by_architecture(raw.get("architectures"))
    except ValueError as error:
        own_code = "; code that a checkpoint brings along (auto_map) is never run" if raw.get("auto_map") else ""
        raise ValueError(f"config.json: {error}{own_code}") from None


def _further_layers(config: Mapping[str, Any], key: str | None) -> int:
    return 0 if key is None or config.get(key) in (None, 0) else positive_int(config, key, _MOST_LAYERS)


def _refuse(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    read_quantization(config)
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json: expected {key} to be {value!r}, got {shown(config[key])}: not supported")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(
            f"config.json: expected hidden_act 'silu' (a gated SiLU MLP), got {shown(activation)}; "
            "this activation is not supported"
        )


def _head_dim(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        head_dim = positive_int(config, "head_dim")
    elif hidden % heads:
        raise ValueError(
            f"config.json: expected hidden_size ({hidden}) to be a multiple of "
            f"num_attention_heads ({heads}), or an explicit head_dim"
        )
    else:
        head_dim = hidden // heads
    if head_dim > _MOST_HEAD_DIM:
        raise ValueError(f"config.json: expected head_dim of at most {_MOST_HEAD_DIM}, got {head_dim}")
    if head_dim % 2:
        raise ValueError(f"config.json: expected an even head_dim for rotary pairs, got {head_dim}")
    return head_dim
