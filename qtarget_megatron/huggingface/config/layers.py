"""What differs from layer to layer in attention: rotary embedding and sliding windows, as config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtarget_megatron.huggingface.config.config_file import boolean, positive_int, shown
from qtarget_megatron.huggingface.config.family import Family, WindowRules

_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_unrotated_layers(config: Mapping[str, Any], family: Family, num_layers: int) -> tuple[bool, ...]:
    """For each layer, whether it has no rotary embedding; empty where all have one."""
    if not family.unrotated_layers:
        return ()
    rotated = config.get("no_rope_layers")
    if rotated is None:
        interval = positive_int(config, "no_rope_layer_interval")
        rotated = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(rotated, list) or len(rotated) < num_layers or any(value not in (0, 1) for value in rotated):
        raise ValueError(
            f"config.json: expected no_rope_layers to be 1 (rotary) or 0 (none) for each of {num_layers} layers, got "
            f"{shown(rotated)}"
        )
    unrotated = tuple(value == 0 for value in rotated[:num_layers])
    return unrotated if any(unrotated) else ()


def read_windows(
    config: Mapping[str, Any], rules: WindowRules | None, num_layers: int, unrotated: tuple[bool, ...]
) -> tuple[int | None, tuple[bool, ...]]:
    """(window, for each layer whether it has it); (None, ()) where no layer has one. unrotated: see above."""
    if rules is None or config.get("sliding_window") is None or (rules.switch and not boolean(config, rules.switch)):
        return None, ()
    window = positive_int(config, "sliding_window")
    layers = _window_layers(config, rules, num_layers, unrotated)
    return (window, layers) if any(layers) else (None, ())


def _window_layers(
    config: Mapping[str, Any], rules: WindowRules, num_layers: int, unrotated: tuple[bool, ...]
) -> tuple[bool, ...]:
    kinds = config.get("layer_types") if rules.listed else None
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ValueError(f"config.json: expected layer_types to list {num_layers} layers, got {shown(kinds)}")
        if unknown := [kind for kind in kinds if kind not in (_FULL, _SLIDING)]:
            raise ValueError(
                f"config.json: expected layer_types of {_FULL} and {_SLIDING}, got {shown(unknown[0])}: not supported"
            )
        return tuple(kind == _SLIDING for kind in kinds)
    if rules.unrotated:
        return unrotated
    if rules.alternate:
        end = num_layers if rules.before is None else _layer_number(config, rules.before)
        return tuple(layer % 2 == 0 and layer < end for layer in range(num_layers))
    first = 0 if rules.first is None else _layer_number(config, rules.first)
    return tuple(layer >= first for layer in range(num_layers))


def _layer_number(config: Mapping[str, Any], key: str) -> int:
    return 0 if config.get(key) == 0 else positive_int(config, key)
