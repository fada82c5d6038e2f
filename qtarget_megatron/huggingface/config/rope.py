"""Rotary position embeddings: what config.json says of them, and the frequencies that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qtarget_megatron.huggingface.config.config_file import positive_int, positive_number, shown

_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": (),
}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling, normalised: ``type`` "linear" (factor only), "llama3", "yarn" or "longrope".

    attention_factor: of cosine and sine.
    score_scale:      latent attention multiplies its scores by yarn_scale(factor, score_scale)^2 besides; 0: it does
                      not.
    scale:            mscale; 0: absent.
    truncate:         yarn's ramp begins and ends at whole dimensions.
    short_factor:     of longrope, what each wavelength is multiplied by in sequences of at most
                      original_max_position_embeddings tokens.
    long_factor:      the same in longer ones.
    """

    type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    attention_factor: float = 1.0
    scale: float = 0.0
    score_scale: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def read_rope(
    config: Mapping[str, Any], positions: int, types: Mapping[str, str] | None = None
) -> tuple[float, RopeScaling | None]:
    """(base, scaling) from rope_theta + rope_scaling or from rope_parameters; scaling None for the default.

    positions: max_position_embeddings. types: see Family.rope_types. Precedence is transformers': rope_scaling over
    rope_parameters, an inner rope_theta over the outer.
    """
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | _parameters(config)
    base = positive_number(rope, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    types = types or dict(zip(_FIELDS, _FIELDS, strict=True))
    if kind not in tuple(types):
        raise ValueError(f"config.json: expected rope_type to be one of {tuple(types)}, got {shown(kind)}")
    kind = types[kind]
    if kind == "default":
        return base, None
    values: dict[str, Any] = {name: positive_number(rope, name) for name in _FIELDS[kind]}
    if kind in ("llama3", "yarn", "longrope"):
        lengths: Mapping[str, Any] = {"original_max_position_embeddings": positions}
        for source in (rope, config):  # like transformers, the outer field wins where both exist
            if source.get("original_max_position_embeddings") is not None:
                lengths = source
        values["original_max_position_embeddings"] = positive_int(lengths, "original_max_position_embeddings")
    if kind == "yarn":
        values |= _yarn(rope, positions / values["original_max_position_embeddings"])
    if kind == "longrope":
        values |= _longrope(rope, positions, values["original_max_position_embeddings"])
    if kind == "llama3":
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise ValueError(
                f"config.json: expected high_freq_factor above low_freq_factor, got "
                f"{values['high_freq_factor']} and {values['low_freq_factor']}"
            )
    return base, RopeScaling(type=kind, **values)


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"config.json: expected one flat set of rotary parameters for all layers, got {shown(rope)}")
    return rope


def read_partial_rotary(config: Mapping[str, Any], rule: bool | str, head_dim: int) -> float:
    """The share of a head's numbers that has the rotary embedding. rule: see Family.partial_rotary.

    An inner partial_rotary_factor wins over the outer, as in transformers.
    """
    rope = _parameters(config)
    given = [values.get("partial_rotary_factor") for values in (rope, config)]
    if rule is False:
        for factor in given:
            if factor not in (None, 1, 1.0):
                raise ValueError(
                    f"config.json: expected partial_rotary_factor 1 (rotary over the whole head), got {shown(factor)}"
                )
        return 1.0
    if isinstance(rule, str) and config.get(rule) is not None:
        given.append(positive_int(config, rule, most=head_dim) / head_dim)
    factor = next((factor for factor in given if factor is not None), 1.0)
    factor = positive_number({"partial_rotary_factor": factor}, "partial_rotary_factor")
    width = int(head_dim * factor)
    if factor > 1 or width < 2 or width % 2:
        raise ValueError(
            f"config.json: expected a partial_rotary_factor of at most 1 that gives an even number of a head's "
            f"{head_dim} numbers, got {shown(factor)}"
        )
    return factor


def _yarn(rope: Mapping[str, Any], default_factor: float) -> dict[str, Any]:
    factor = positive_number(rope, "factor") if rope.get("factor") is not None else default_factor
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"config.json: expected truncate to be true or false, got {shown(truncate)}")
    # As in transformers, null and 0 are absent; the two scales count only together.
    scale, score_scale = (positive_number(rope, k) if rope.get(k) else 0.0 for k in ("mscale", "mscale_all_dim"))
    if rope.get("attention_factor") is not None:
        attention_factor = positive_number(rope, "attention_factor")
    elif scale and score_scale:
        attention_factor = yarn_scale(factor, scale) / yarn_scale(factor, score_scale)
    else:
        attention_factor = yarn_scale(factor)
    return {
        "factor": factor,
        "beta_fast": positive_number(rope, "beta_fast") if rope.get("beta_fast") else 32.0,
        "beta_slow": positive_number(rope, "beta_slow") if rope.get("beta_slow") else 1.0,
        "truncate": truncate,
        "attention_factor": attention_factor,
        "scale": scale,
        "score_scale": score_scale,
    }


def _longrope(rope: Mapping[str, Any], positions: int, original: int) -> dict[str, Any]:
    factor = positive_number(rope, "factor") if rope.get("factor") is not None else positions / original
    if rope.get("attention_factor") is not None:
        attention_factor = positive_number(rope, "attention_factor")
    elif factor <= 1:
        attention_factor = 1.0
    elif original == 1:
        raise ValueError("config.json: expected original_max_position_embeddings above 1 for longrope, got 1")
    else:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    lists = {}
    for name in ("short_factor", "long_factor"):
        if not isinstance(rope.get(name), list):
            raise ValueError(f"config.json: expected {name} to be a list of numbers, got {shown(rope.get(name))}")
        lists[name] = tuple(positive_number({name: value}, name) for value in rope[name])
    return {"factor": factor, "attention_factor": attention_factor, **lists}


def yarn_scale(factor: float, scale: float = 1.0) -> float:
    """1 + scale / 10 * ln(factor), for contexts that are longer than the original one."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def check_frequencies(dim: int, base: float, scaling: RopeScaling | None) -> None:
    """ValueError where the parameters of the rotary embedding give frequencies that are not finite numbers."""
    for factors in (scaling.short_factor, scaling.long_factor) if scaling and scaling.type == "longrope" else ():
        if len(factors) != dim // 2:
            raise ValueError(
                f"config.json: expected a short_factor and a long_factor for each of {dim // 2} rotary pairs, got "
                f"{len(factors)}"
            )
    try:
        finite = bool(torch.isfinite(inverse_frequencies(dim, base, scaling)).all())
    except (ArithmeticError, ValueError):
        finite = False
    if not finite:
        given = f"rope_theta {base:g}" + ("" if scaling is None else f" with {scaling}")
        raise ValueError(f"config.json: expected rotary frequencies that are finite numbers, got none from {given}")


def inverse_frequencies(dim: int, base: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Rotary inverse frequencies of heads of ``dim``, float32 ``[dim / 2]``.

    With f_j = base^(-2j/dim): "default" is f; "linear" is f / factor; "llama3" divides by factor the wavelengths
    2 pi / f above L / low_freq_factor, keeps those below L / high_freq_factor, and blends in between with
    s = (L f / 2 pi - low) / (high - low): (1 - s) f / factor + s f; L is original_max_position_embeddings. "yarn" keeps
    f below the dimension j that turns beta_fast times within L, divides by factor above the one that turns beta_slow
    times, and blends linearly in j in between (arXiv 2309.00071). "longrope" is f_j / short_factor_j (arXiv
    2402.13753), right for sequences of at most original_max_position_embeddings tokens. The order of operations is that
    of transformers, so that the float32 results are the same bits.
    """
    if scaling is not None and scaling.type == "yarn":
        return _yarn_frequencies(dim, base, scaling)
    powers = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is not None and scaling.type == "longrope":
        return 1.0 / (torch.tensor(scaling.short_factor, dtype=torch.float32) * powers)
    inv_freq = 1.0 / powers
    if scaling is None:
        return inv_freq
    if scaling.type == "linear":
        return inv_freq / scaling.factor
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    share = (length / wavelength - low) / (high - low)
    blended = (1 - share) * inv_freq / scaling.factor + share * inv_freq
    return torch.where(
        wavelength > length / low,
        inv_freq / scaling.factor,
        torch.where(wavelength < length / high, inv_freq, blended),
    )


def _yarn_frequencies(dim: int, base: float, scaling: RopeScaling) -> torch.Tensor:
    def turns(count: float) -> float:
        """The dimension, as a real number, that turns count times within the original length."""
        length = scaling.original_max_position_embeddings
        return (dim * math.log(length / (count * 2 * math.pi))) / (2 * math.log(base))

    low, high = turns(scaling.beta_fast), turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    powers = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kept, divided = 1.0 / powers, 1.0 / (scaling.factor * powers)
    keep = 1 - ramp
    return divided * (1 - keep) + kept * keep
