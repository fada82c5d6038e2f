"""Mixtures of experts: what config.json says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtarget_megatron.checkpoint.config_file import positive_int, rule
from qtarget_megatron.checkpoint.family import ExpertRules


@dataclass(frozen=True)
class Experts:
    """The experts that replace the MLP of some layers.

    count: experts of a layer. per_token: of them chosen for each token, those with the largest softmax of the router's
    logits. ffn_hidden_size: width of one expert. normalized: the chosen weights are divided by their sum. layers: for
    each layer of the model, whether it has experts.
    """

    count: int
    per_token: int
    ffn_hidden_size: int
    normalized: bool
    layers: tuple[bool, ...]


def read_experts(config: Mapping[str, Any], rules: ExpertRules | None, num_layers: int) -> Experts | None:
    """The experts of a config; None where no layer has any. ValueError for values that fit no model."""
    if rules is None:
        return None
    layers = _layers(config, rules, num_layers)
    if not any(layers):
        return None
    count, per_token = positive_int(config, rules.count), positive_int(config, rules.per_token)
    if per_token > count:
        raise ValueError(f"config.json: expected {rules.per_token} of at most {rules.count} ({count}), got {per_token}")
    return Experts(
        count=count,
        per_token=per_token,
        ffn_hidden_size=positive_int(config, rules.width),
        normalized=rule(config, rules.normalized),
        layers=layers,
    )


def _layers(config: Mapping[str, Any], rules: ExpertRules, num_layers: int) -> tuple[bool, ...]:
    dense = config.get(rules.dense_layers) or []
    if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise ValueError(f"config.json: expected {rules.dense_layers} to be a list of layers, got {dense!r}")
    step = 1 if rules.sparse_step is None else positive_int(config, rules.sparse_step)
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
