"""Mixtures of experts: what config.json says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtarget_megatron.huggingface.config.config_file import positive_int, positive_number, rule, shown
from qtarget_megatron.huggingface.config.family import ExpertRules

# Experts of all layers together: ten times what the largest models have.
_MOST_EXPERTS = 250_000


@dataclass(frozen=True)
class Groups:
    """Experts are chosen from the top of count groups: those with the largest sum of their two best scores."""

    count: int
    top: int


@dataclass(frozen=True)
class Experts:
    """The experts that replace the MLP of some layers.

    count:                  experts of a layer.
    per_token:              of them chosen for each token, those with the largest score.
    score:                  of the router's logits, "softmax" or "sigmoid".
    has_correction:         a learnt number was added to each score before that.
    groups:                 None where all are chosen from.
    ffn_hidden_size:        width of one expert.
    normalized:             the chosen weights are divided by their sum.
    scaling:                what they are multiplied by then.
    shared_ffn_hidden_size: width of an MLP that every token goes through as well, None where there is none.
    shared_weight:          a learnt function of the token, between 0 and 1, weights what that MLP adds.
    float32_router:         the router's logits are float32 in models of any dtype.
    bias:                   linear layers of experts and routers have biases.
    fused:                  in a checkpoint one tensor holds those of all experts of a layer.
    clamp:                  see ExpertRules; None: experts are SiLU-gated MLPs.
    layers:                 for each layer of the model, whether it has experts.
    """

    count: int
    per_token: int
    ffn_hidden_size: int
    normalized: bool
    layers: tuple[bool, ...]
    score: str = "softmax"
    has_correction: bool = False
    groups: Groups | None = None
    scaling: float = 1.0
    shared_ffn_hidden_size: int | None = None
    shared_weight: bool = False
    float32_router: bool = False
    bias: bool = False
    fused: bool = False
    clamp: float | None = None


def read_experts(config: Mapping[str, Any], rules: ExpertRules | None, num_layers: int) -> Experts | None:
    """The experts of a config; None where no layer has any. ValueError for values that fit no model."""
    if rules is None:
        return None
    layers = _layers(config, rules, num_layers)
    if not any(layers):
        return None
    most = max(_MOST_EXPERTS // sum(layers), 1)
    count, per_token = positive_int(config, rules.count, most), positive_int(config, rules.per_token)
    if per_token > count:
        raise ValueError(f"config.json: expected {rules.per_token} of at most {rules.count} ({count}), got {per_token}")
    width = positive_int(config, rules.width)
    return Experts(
        count=count,
        per_token=per_token,
        ffn_hidden_size=width,
        normalized=rule(config, rules.normalized),
        layers=layers,
        score=rules.score,
        has_correction=rules.correction,
        groups=_groups(config, rules, count, per_token),
        scaling=1.0 if rules.scaling is None else positive_number(config, rules.scaling),
        shared_ffn_hidden_size=_shared_width(config, rules, width),
        shared_weight=rules.shared_weight,
        float32_router=rules.float32_router,
        bias=rules.bias,
        fused=rules.fused,
        clamp=None if rules.clamp is None else positive_number(config, rules.clamp),
    )


def _shared_width(config: Mapping[str, Any], rules: ExpertRules, width: int) -> int | None:
    if rules.shared_width is not None:
        return positive_int(config, rules.shared_width)
    return None if rules.shared is None else width * positive_int(config, rules.shared)


def _groups(config: Mapping[str, Any], rules: ExpertRules, count: int, per_token: int) -> Groups | None:
    if rules.groups is None or config.get(rules.groups) is None:
        return None
    groups, top = positive_int(config, rules.groups), positive_int(config, rules.top_groups)
    if count % groups or count // groups < 2 or top > groups or per_token > top * (count // groups):
        raise ValueError(
            f"config.json: expected {rules.groups} groups of {count} experts, {rules.top_groups} of which hold "
            f"{per_token} experts or more, got {groups} and {top}"
        )
    # Where all groups are chosen there is no limit.
    return None if top == groups else Groups(groups, top)


def _layers(config: Mapping[str, Any], rules: ExpertRules, num_layers: int) -> tuple[bool, ...]:
    dense = config.get(rules.dense_layers) or []
    if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise ValueError(f"config.json: expected {rules.dense_layers} to be a list of layers, got {shown(dense)}")
    step = 1 if rules.sparse_step is None else positive_int(config, rules.sparse_step)
    first = 0
    if rules.first_sparse is not None and config.get(rules.first_sparse) != 0:
        first = positive_int(config, rules.first_sparse)
    dense = set(dense)
    return tuple(i >= first and i not in dense and (i + 1) % step == 0 for i in range(num_layers))
