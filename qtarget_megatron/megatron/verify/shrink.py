"""A config.json made small: the family and the structure of a model, at sizes that train in a second.

What differs from layer to layer stays (windows, rotary embedding, experts), as do tied embeddings, biases, norms,
shared key/value heads, latent attention and the rules of the router. Nothing but config.json is read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtarget_megatron.huggingface import Architecture, hf_tensor_shapes
from qtarget_megatron.huggingface.config import families
from qtarget_megatron.huggingface.config.family import ExpertRules, Family

# Every size is a multiple of 16 on each rank: kernels of fp8 ask for that.
_UNIT = 16
_LAYERS, _HIDDEN, _FFN, _EXPERT_FFN, _EXPERTS, _WINDOW = 4, 96, 160, 32, 8, 6
_HEAD_DIM, _ROTARY_DIM, _QUERY_RANK, _KEY_VALUE_RANK = 16, 8, 48, 32
# They describe the weights of the model, or code that is never run.
_LEFT_OUT = ("auto_map", "pad_token_id", "quantization_config", "torch_dtype", "qk_head_dim")


@dataclass(frozen=True)
class Cuts:
    """What a small model has to divide into.

    tensor, expert, expert_tensor: sizes of tensor, expert and expert tensor parallelism.
    stages:                        model chunks of a pipeline: its ranks times the virtual stages of each.
    """

    tensor: int = 1
    stages: int = 1
    expert: int = 1
    expert_tensor: int = 1


def shrunk_config(raw: Mapping[str, Any], cuts: Cuts, *, vocab_size: int, positions: int) -> dict[str, Any]:
    """The entries of a small config.json of the same family, whose weights are bfloat16.

    raw:        entries of a config.json, of a model that the layout divides.
    vocab_size: the small model's.
    positions:  max_position_embeddings is at least that.

    The hidden size is the size of nothing else: whoever finds it in a tensor's shape has found a hidden dimension.
    Raises ValueError where a config.json cannot be read, and where its structure would not survive.
    """
    arch = Architecture.from_config(raw)
    family = families.by_name(arch.family)
    config = {family.aliases.get(key, key): value for key, value in raw.items() if key not in _LEFT_OUT}
    config |= {"dtype": "bfloat16", "vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2}
    config["max_position_embeddings"] = max(arch.max_position_embeddings, positions)
    config["intermediate_size"] = _multiple(_FFN, _UNIT * cuts.tensor)
    if arch.window_layers:
        config["sliding_window"] = _WINDOW
    config |= _heads(arch, cuts.tensor)
    if arch.experts is not None and family.experts is not None:
        config |= _experts(arch, family.experts, cuts)
    chosen = _chosen_layers(arch, cuts.stages)
    config |= _layers(arch, family, config, chosen)
    config["hidden_size"] = _hidden_size(Architecture.from_config(config | {"hidden_size": _HIDDEN}), cuts.tensor)
    small = Architecture.from_config(config)
    kinds = _kinds(arch)
    if _kinds(small) != [kinds[layer] for layer in chosen] or small.tied != arch.tied:
        raise ValueError(f"a small model of family {arch.family} does not keep its structure: layers {chosen} differ")
    return config


def _multiple(least: int, unit: int) -> int:
    """The first multiple from least on."""
    return -(-least // unit) * unit


def _heads(arch: Architecture, tensor: int) -> dict[str, Any]:
    """Heads that share keys and values as those of the model, and are cut likewise."""
    groups, ratio = arch.num_query_groups, arch.num_attention_heads // arch.num_query_groups
    if groups % tensor == 0:
        groups, least = _multiple(min(groups, 4 if ratio == 1 else 2), tensor), 1
    else:
        # Several ranks share a group.
        least = tensor // groups
    ratio = _multiple(min(ratio, 2), least)
    if arch.latent is None:
        return {"num_attention_heads": groups * ratio, "num_key_value_heads": groups, "head_dim": _HEAD_DIM}
    return {
        "num_attention_heads": groups,
        "num_key_value_heads": groups,
        "q_lora_rank": _multiple(_QUERY_RANK, _UNIT * tensor),
        "kv_lora_rank": _multiple(_KEY_VALUE_RANK, _UNIT * tensor),
        "qk_nope_head_dim": _HEAD_DIM,
        "qk_rope_head_dim": _ROTARY_DIM,
        "v_head_dim": _HEAD_DIM,
    }


def _experts(arch: Architecture, rules: ExpertRules, cuts: Cuts) -> dict[str, Any]:
    """As many experts for each rank, and groups of them that are chosen as those of the model."""
    experts = arch.experts
    groups, top = (1, 1) if experts.groups is None else (min(experts.groups.count, 4), min(experts.groups.top, 2))
    per_token = min(experts.per_token, 2) * top
    count = _multiple(max(min(experts.count, _EXPERTS), 2 * groups, per_token), math.lcm(cuts.expert, groups))
    found = {rules.count: count, rules.per_token: per_token}
    found[rules.width] = _multiple(_EXPERT_FFN, _UNIT * math.lcm(cuts.tensor, cuts.expert_tensor))
    if rules.shared_width is not None:
        found[rules.shared_width] = _multiple(2 * _EXPERT_FFN, _UNIT * cuts.tensor)
    if rules.groups is not None and rules.top_groups is not None:
        found |= {rules.groups: groups, rules.top_groups: top}
    return found


def _hidden_size(arch: Architecture, tensor: int) -> int:
    """One that no other dimension of a tensor has."""
    stand_in = 10**6 + 3
    shapes = hf_tensor_shapes(dataclasses.replace(arch, hidden_size=stand_in))
    taken = {size for shape in shapes.values() for size in shape}
    first = _multiple(_HIDDEN, _UNIT * tensor)
    return next(size for size in itertools.count(first, _UNIT * tensor) if size not in taken)


# ---- layers


def _kinds(arch: Architecture) -> list[tuple[bool, bool, bool]]:
    """Whether each layer has a window, no rotary embedding, experts."""
    nothing = (False,) * arch.num_layers
    experts = nothing if arch.experts is None else arch.experts.layers
    return list(zip(arch.window_layers or nothing, arch.unrotated_layers or nothing, experts, strict=True))


def _chosen_layers(arch: Architecture, stages: int) -> list[int]:
    """Which layers of the model the small one has, in order: of each kind, in turn, the first ones."""
    kinds = _kinds(arch)
    of_kind = {kind: [layer for layer, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
    count = _multiple(max(_LAYERS, len(of_kind)), stages)
    turns = (layers[turn % len(layers)] for turn in itertools.count() for layers in of_kind.values())
    return sorted(itertools.islice(turns, count))


def _layers(arch: Architecture, family: Family, config: Mapping[str, Any], chosen: list[int]) -> dict[str, Any]:
    """The entries that say of which kind each layer is."""
    kinds = [_kinds(arch)[layer] for layer in chosen]
    found: dict[str, Any] = {
        key: [value[layer] for layer in chosen]
        for key, value in config.items()
        if isinstance(value, list) and len(value) == arch.num_layers
    }
    found["num_hidden_layers"] = len(chosen)
    if arch.unrotated_layers:
        found["no_rope_layers"] = [int(not unrotated) for _, unrotated, _ in kinds]
    if arch.window_layers and family.window is not None and family.window.first is not None:
        # A list of layers goes before it where there is one.
        found[family.window.first] = [window for window, _, _ in kinds].index(True)
    if arch.experts is not None and family.experts is not None:
        found |= _dense_layers(family.experts, [layer for layer, (_, _, sparse) in enumerate(kinds) if not sparse])
    return found


def _dense_layers(rules: ExpertRules, dense: list[int]) -> dict[str, Any]:
    if rules.dense_layers is not None:
        return {rules.dense_layers: dense} | ({} if rules.sparse_step is None else {rules.sparse_step: 1})
    return {} if rules.first_sparse is None else {rules.first_sparse: len(dense)}
