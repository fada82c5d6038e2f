"""What a Hugging Face ``config.json`` says about a dense decoder, read as plain JSON.

No transformers class and no remote code is involved: an ``auto_map`` in the file is ignored, and an
architecture that is not in the table below is refused. A further dense family is one more entry of
``_FAMILIES``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qtarget_megatron.checkpoint.model_files import model_file

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROPE_TYPES = ("default", "linear", "llama3")
_ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class _Family:
    """How one Hugging Face architecture differs from the common Llama-shaped decoder.

    The bias rules are either a constant or the name of the config field that decides.
    ``defaults`` are the values that transformers assumes for fields the file leaves out.
    """

    name: str
    qkv_bias: bool | str
    output_bias: bool | str
    mlp_bias: bool | str
    qk_norm: bool = False
    window_switch: bool = False  # sliding_window counts only with use_sliding_window = true
    defaults: Mapping[str, Any] = field(default_factory=dict)


_FAMILIES = {
    "LlamaForCausalLM": _Family(
        name="llama",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "MistralForCausalLM": _Family(
        name="mistral",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "Qwen2ForCausalLM": _Family(
        name="qwen2",
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        window_switch=True,
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "Qwen3ForCausalLM": _Family(
        name="qwen3",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=False,
        qk_norm=True,
        window_switch=True,
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling, normalised: ``type`` "linear" (factor only) or "llama3" (all fields)."""

    type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class Architecture:
    """The shape of a dense decoder checkpoint.

    ``tied``: the output head is the embedding. ``qkv_bias``, ``output_bias`` (o_proj) and
    ``mlp_bias``: which linear layers carry a bias. ``qk_norm``: RMS norm per head on queries and
    keys. ``rope_scaling`` is None for the default rotary embedding. ``sliding_window`` is None
    where every layer sees the full context. ``dtype`` is what config.json declares, bfloat16 where
    it declares nothing. ``eos_token_ids`` is empty and ``bos_token_id`` None where the model has
    none.
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

    @classmethod
    def from_hf(cls, directory: str | Path) -> Architecture:
        """Read ``directory/config.json``.

        Raises ValueError, in one line, for a missing or malformed file, an unknown architecture, a
        quantised checkpoint, and any setting that this package would not reproduce exactly.
        """
        raw = read_config(directory)
        try:
            return cls._from_config(raw)
        except ValueError as error:
            raise ValueError(f"{directory}/{error}") from None

    @classmethod
    def _from_config(cls, raw: Mapping[str, Any]) -> Architecture:
        family = _find_family(raw)
        # A null means "absent", except where null is itself the meaning (no window, no such token).
        nullable = (
            "sliding_window",
            "bos_token_id",
            "eos_token_id",
            "num_key_value_heads",
            "head_dim",
        )
        config = dict(family.defaults)
        config.update({k: v for k, v in raw.items() if v is not None or k in nullable})
        if config.get("quantization_config"):
            raise ValueError(
                "config.json: expected unquantised weights, got a quantization_config; load the "
                "model with its own library, dequantise it, save it in bfloat16 and remove that "
                "entry"
            )
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise ValueError(
                f"config.json: expected hidden_act 'silu' (a gated SiLU MLP), got {activation!r}; "
                "this activation is not supported"
            )

        heads = _positive_int(config, "num_attention_heads")
        hidden = _positive_int(config, "hidden_size")
        layers = _positive_int(config, "num_hidden_layers")
        positions = _positive_int(config, "max_position_embeddings")
        groups = heads
        if config.get("num_key_value_heads") is not None:
            groups = _positive_int(config, "num_key_value_heads")
        if heads % groups:
            raise ValueError(
                f"config.json: expected num_attention_heads ({heads}) to be a multiple of "
                f"num_key_value_heads ({groups})"
            )
        if config.get("head_dim") is not None:
            head_dim = _positive_int(config, "head_dim")
        elif hidden % heads:
            raise ValueError(
                f"config.json: expected hidden_size ({hidden}) to be a multiple of "
                f"num_attention_heads ({heads}), or an explicit head_dim"
            )
        else:
            head_dim = hidden // heads
        if head_dim % 2:
            raise ValueError(f"config.json: expected an even head_dim for rotary pairs, got {head_dim}")
        rope_base, rope_scaling = _read_rope(config, positions)

        return cls(
            family=family.name,
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=_positive_int(config, "intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            vocab_size=_positive_int(config, "vocab_size"),
            max_position_embeddings=positions,
            norm_epsilon=_positive_number(config, "rms_norm_eps", default=1e-6),
            tied=_boolean(config, "tie_word_embeddings"),
            qkv_bias=_rule(config, family.qkv_bias),
            output_bias=_rule(config, family.output_bias),
            mlp_bias=_rule(config, family.mlp_bias),
            qk_norm=family.qk_norm,
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            sliding_window=_read_window(config, family, layers),
            dtype=declared_dtype(config) or torch.bfloat16,
            eos_token_ids=_token_ids(config, "eos_token_id"),
            bos_token_id=next(iter(_token_ids(config, "bos_token_id")), None),
        )

    def inverse_frequencies(self) -> torch.Tensor:
        """Rotary inverse frequencies, float32 ``[head_dim / 2]``.

        With f_j = base^(-2j/head_dim): "default" is f; "linear" is f / factor; "llama3" divides by
        factor the wavelengths 2 pi / f above L / low_freq_factor, keeps those below
        L / high_freq_factor, and blends in between with
        s = (L f / 2 pi - low) / (high - low): (1 - s) f / factor + s f; L is
        original_max_position_embeddings. The order of operations is that of transformers, so that
        the float32 results are the same bits.
        """
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        inv_freq = 1.0 / (self.rope_base**exponent)
        scaling = self.rope_scaling
        if scaling is None:
            return inv_freq
        if scaling.type == "linear":
            return inv_freq / scaling.factor
        length, low, high = (
            scaling.original_max_position_embeddings,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
        )
        wavelength = 2 * math.pi / inv_freq
        share = (length / wavelength - low) / (high - low)
        blended = (1 - share) * inv_freq / scaling.factor + share * inv_freq
        return torch.where(
            wavelength > length / low,
            inv_freq / scaling.factor,
            torch.where(wavelength < length / high, inv_freq, blended),
        )


def read_config(directory: str | Path) -> dict[str, Any]:
    """``directory/config.json`` as a dict. ValueError where it is missing or not a JSON object."""
    directory = Path(directory)
    if not directory.is_dir():
        found = "a file" if directory.exists() else "none"
        raise ValueError(f"{directory}: expected a checkpoint directory, found {found}; check the path")
    path = model_file(directory, "config.json")
    if not path.is_file():
        raise ValueError(
            f"{directory}: expected a config.json, found none; point to the folder that save_pretrained wrote"
        )
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object; ValueError otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path}: expected JSON, got a parse error ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def declared_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype a config declares (``dtype`` wins over the older ``torch_dtype``), or None."""
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        return None
    if name not in tuple(_DTYPES):
        raise ValueError(f"config.json: expected dtype to be one of {sorted(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """A checkpoint dtype as config.json spells it ("bfloat16"); ValueError for other dtypes."""
    for name, value in _DTYPES.items():
        if value == dtype:
            return name
    raise ValueError(f"expected a checkpoint dtype of {sorted(_DTYPES)}, got {dtype}")


def _find_family(config: Mapping[str, Any]) -> _Family:
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in tuple(_FAMILIES):
        return _FAMILIES[names[0]]
    raise ValueError(
        f"config.json: expected architectures to hold one of {', '.join(_FAMILIES)}, got "
        f"{names!r}; only these dense decoders can be converted"
    )


def _rule(config: Mapping[str, Any], rule: bool | str) -> bool:
    return rule if isinstance(rule, bool) else _boolean(config, rule)


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: expected {key} to be true or false, got {value!r}")
    return value


def _positive_int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"config.json: expected {key} to be a positive integer, got {value!r}")
    return value


def _positive_number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf):
        raise ValueError(f"config.json: expected {key} to be a positive number, got {value!r}")
    return float(value)


def _token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(f"config.json: expected {key} to be an integer, a list of integers or null, got {value!r}")
    return tuple(ids)


def _read_window(config: Mapping[str, Any], family: _Family, num_layers: int) -> int | None:
    """The window that all layers share, None where no layer has one; mixed layers are refused."""
    if family.window_switch and not _boolean(config, "use_sliding_window"):
        return None
    if config.get("sliding_window") is None:
        return None
    window = _positive_int(config, "sliding_window")
    if not family.window_switch:
        return window
    kinds = config.get("layer_types")
    if kinds is None:
        first = config["max_window_layers"]  # the first layer with a window
        full = min(_positive_int(config, "max_window_layers") if first != 0 else 0, num_layers)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (num_layers - full)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ValueError(f"config.json: expected layer_types to list {num_layers} layers, got {kinds!r}")
    if all(kind == "full_attention" for kind in kinds):
        return None
    if all(kind == "sliding_attention" for kind in kinds):
        return window
    raise ValueError(
        f"config.json: expected one kind of attention in all layers, got "
        f"{sorted(set(map(str, kinds)))}; models that mix full and sliding-window layers are not "
        "supported"
    )


def _read_rope(config: Mapping[str, Any], positions: int) -> tuple[float, RopeScaling | None]:
    """(base, scaling) from rope_theta + rope_scaling or from rope_parameters.

    Precedence is transformers': rope_scaling over rope_parameters, an inner rope_theta over the
    outer.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"config.json: expected one flat set of rotary parameters for all layers, got {rope!r}")
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | rope
    base = _positive_number(rope, "rope_theta")
    for partial in (rope.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
        if partial not in (None, 1, 1.0):
            raise ValueError(
                f"config.json: expected partial_rotary_factor 1 (rotary over the whole head), got {partial!r}"
            )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in _ROPE_TYPES:
        raise ValueError(f"config.json: expected rope_type to be one of {_ROPE_TYPES}, got {kind!r}")
    values = {name: _positive_number(rope, name) for name in _ROPE_FIELDS[kind]}
    if kind == "llama3":
        lengths = {"original_max_position_embeddings": positions}
        for source in (rope, config):  # like transformers, the outer field wins where both exist
            if source.get("original_max_position_embeddings") is not None:
                lengths = source
        values["original_max_position_embeddings"] = _positive_int(lengths, "original_max_position_embeddings")
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise ValueError(
                f"config.json: expected high_freq_factor above low_freq_factor, got "
                f"{values['high_freq_factor']} and {values['low_freq_factor']}"
            )
    return base, RopeScaling(type=kind, **values)
