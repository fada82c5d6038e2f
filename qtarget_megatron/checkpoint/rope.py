"""Rotary position embeddings: what config.json says of them, and the frequencies that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qtarget_megatron.checkpoint.config_file import positive_int, positive_number

_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling, normalised: ``type`` "linear" (factor only) or "llama3" (all fields)."""

    type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


def read_rope(config: Mapping[str, Any], positions: int) -> tuple[float, RopeScaling | None]:
    """(base, scaling) from rope_theta + rope_scaling or from rope_parameters; scaling None for the default.

    positions: max_position_embeddings. Precedence is transformers': rope_scaling over rope_parameters, an inner
    rope_theta over the outer.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"config.json: expected one flat set of rotary parameters for all layers, got {rope!r}")
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | rope
    base = positive_number(rope, "rope_theta")
    for partial in (rope.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
        if partial not in (None, 1, 1.0):
            raise ValueError(
                f"config.json: expected partial_rotary_factor 1 (rotary over the whole head), got {partial!r}"
            )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in tuple(_FIELDS):
        raise ValueError(f"config.json: expected rope_type to be one of {tuple(_FIELDS)}, got {kind!r}")
    if kind == "default":
        return base, None
    values = {name: positive_number(rope, name) for name in _FIELDS[kind]}
    if kind == "llama3":
        lengths = {"original_max_position_embeddings": positions}
        for source in (rope, config):  # like transformers, the outer field wins where both exist
            if source.get("original_max_position_embeddings") is not None:
                lengths = source
        values["original_max_position_embeddings"] = positive_int(lengths, "original_max_position_embeddings")
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise ValueError(
                f"config.json: expected high_freq_factor above low_freq_factor, got "
                f"{values['high_freq_factor']} and {values['low_freq_factor']}"
            )
    return base, RopeScaling(type=kind, **values)


def inverse_frequencies(dim: int, base: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Rotary inverse frequencies of heads of ``dim``, float32 ``[dim / 2]``.

    With f_j = base^(-2j/dim): "default" is f; "linear" is f / factor; "llama3" divides by factor the wavelengths
    2 pi / f above L / low_freq_factor, keeps those below L / high_freq_factor, and blends in between with
    s = (L f / 2 pi - low) / (high - low): (1 - s) f / factor + s f; L is original_max_position_embeddings. The order of
    operations is that of transformers, so that the float32 results are the same bits.
    """
    inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
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
