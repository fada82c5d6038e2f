"""What a family of Hugging Face decoders is: the declaration that each file in ``families/`` makes.

A declaration is data. It says what distinguishes the family from a Llama: values that transformers assumes where
config.json is silent, which layers have biases, how experts are chosen, and under which names tensors are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LAYER = "model.layers.{layer}."

# Role of a tensor -> its name in a checkpoint, without ".weight" and ".bias", or "" and "_bias" of _BARE roles. Layers
# and experts are counted from 0.
_TENSORS = {
    "embedding": "model.embed_tokens",
    "head": "lm_head",
    "final_norm": "model.norm",
    "input_norm": _LAYER + "input_layernorm",
    "query": _LAYER + "self_attn.q_proj",
    "key": _LAYER + "self_attn.k_proj",
    "value": _LAYER + "self_attn.v_proj",
    "attention_output": _LAYER + "self_attn.o_proj",
    "query_norm": _LAYER + "self_attn.q_norm",
    "key_norm": _LAYER + "self_attn.k_norm",
    "mlp_norm": _LAYER + "post_attention_layernorm",
    "attention_output_norm": _LAYER + "post_self_attn_layernorm",
    "mlp_output_norm": _LAYER + "post_mlp_layernorm",
    "gate": _LAYER + "mlp.gate_proj",
    "up": _LAYER + "mlp.up_proj",
    "down": _LAYER + "mlp.down_proj",
    "router": _LAYER + "mlp.gate",
    "expert_gate": _LAYER + "mlp.experts.{expert}.gate_proj",
    "expert_up": _LAYER + "mlp.experts.{expert}.up_proj",
    "expert_down": _LAYER + "mlp.experts.{expert}.down_proj",
    "shared_gate": _LAYER + "mlp.shared_experts.gate_proj",
    "shared_up": _LAYER + "mlp.shared_experts.up_proj",
    "shared_down": _LAYER + "mlp.shared_experts.down_proj",
    "shared_weight": _LAYER + "mlp.shared_expert_gate",
    # A layer that predicts further tokens: norms of the token's embedding and of the hidden state, what makes one of
    # both, the last norm, and copies of the embedding and of the head.
    "further_token_norm": _LAYER + "enorm",
    "further_hidden_norm": _LAYER + "hnorm",
    "further_projection": _LAYER + "eh_proj",
    "further_norm": _LAYER + "shared_head.norm",
    "further_embedding": _LAYER + "embed_tokens",
    "further_head": _LAYER + "shared_head.head",
    # Those of all experts of a layer in one.
    "experts_gate_up": _LAYER + "mlp.experts.gate_up_proj",
    "experts_down": _LAYER + "mlp.experts.down_proj",
    "sinks": _LAYER + "self_attn.sinks",
    # Latent attention: hidden states to a latent, its norm, the latent to heads.
    "query_down": _LAYER + "self_attn.q_a_proj",
    "query_latent_norm": _LAYER + "self_attn.q_a_layernorm",
    "query_up": _LAYER + "self_attn.q_b_proj",
    "key_value_down": _LAYER + "self_attn.kv_a_proj_with_mqa",
    "key_value_norm": _LAYER + "self_attn.kv_a_layernorm",
    "key_value_up": _LAYER + "self_attn.kv_b_proj",
}
_BARE = ("experts_gate_up", "experts_down", "sinks")
# The part of a router that is added to scores where experts are chosen, float32 in every checkpoint.
CORRECTION = "e_score_correction_bias"


@dataclass(frozen=True)
class ExpertRules:
    """Where config.json says how a mixture of experts is built; a str is the name of a field.

    width:              of one expert's MLP.
    score:              of the router's logits, "softmax" or "sigmoid".
    normalized:         the weights of the chosen experts are divided by their sum.
    correction:         a learnt number is added to each expert's score where experts are chosen.
    scaling:            factor of the weights.
    groups, top_groups: experts lie in so many groups, of which so many are chosen first, by the sum of the two best
                        scores in each.
    shared:             number of experts that every token goes through.
    shared_width:       of an MLP that every token goes through, in place of that number.
    shared_weight:      what that MLP adds is multiplied by the sigmoid of a learnt function of the token.
    float32_router:     the router's logits are float32 in models of any dtype.
    bias:               linear layers of experts and routers have biases.
    fused:              a tensor holds those of all experts of a layer: [E, h, 2 f] with gate and up in turns, and
                        [E, f, h].
    clamp:              an expert is not down(silu(gate) up), but down(gate' sigmoid(1.702 gate') (up' + 1)) with gate'
                        and up' limited by that field: gate' to at most it, up' between its negative and it.
    dense_layers:       a list of layers that have one MLP instead.
    sparse_step:        layer i has experts where (i + 1) is a multiple of it.
    first_sparse:       layers before this one have one MLP.

    None: there is no such field.
    """

    count: str = "num_experts"
    per_token: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    score: str = "softmax"
    normalized: bool | str = True
    correction: bool = False
    scaling: str | None = None
    groups: str | None = None
    top_groups: str | None = None
    shared: str | None = None
    shared_width: str | None = None
    shared_weight: bool = False
    float32_router: bool = False
    bias: bool = False
    fused: bool = False
    clamp: str | None = None
    dense_layers: str | None = None
    sparse_step: str | None = None
    first_sparse: str | None = None


@dataclass(frozen=True)
class WindowRules:
    """Which layers attend within ``sliding_window`` tokens; a str is the name of a field.

    switch:    must be true for any of them to do so.
    listed:    layer_types says which.
    first:     without that list, those from this layer on.
    alternate: without that list, every second one, from the first on.
    before:    of those that alternate, those before this layer.
    unrotated: without that list, those without rotary embedding.

    With none of these, all of them. None: there is no such field.
    """

    switch: str | None = None
    listed: bool = False
    first: str | None = None
    alternate: bool = False
    before: str | None = None
    unrotated: bool = False


@dataclass(frozen=True)
class Family:
    """How one Hugging Face architecture differs from a Llama.

    The rules for biases and qk_norm are either a constant or the name of the config field that decides.

    name:             of the family, in messages.
    architecture:     its entry in config.json's ``architectures``.
    refused:          why it is not supported; nothing else counts then.
    qkv_bias, output_bias, mlp_bias: whether linear layers of attention and MLP have biases.
    qk_norm:          whether each query and key head has an RMS norm.
    partial_rotary:   the rotary embedding is that of the first partial_rotary_factor of a head's numbers; a str names
                      the field with their number, which counts where that factor is absent.
    rotary_interleaved: the rotary embedding pairs neighbouring numbers, not those half its width apart.
    rope_types:       the rope_type of a config -> what the family means by it; None: what the name says.
    output_norms:     further RMS norms behind attention and MLP, before their output is added to the hidden states.
    multipliers:      embedding_multiplier, residual_multiplier, attention_multiplier and logits_scaling count.
    sinks:            the softmax of each head has a learnt score more, whose value is 0.
    latent:           queries, keys and values are made from small latents (multi-head latent attention).
    window:           None where sliding_window has no meaning.
    unrotated_layers: some layers have no rotary embedding, those that are 0 in no_rope_layers, else every
                      no_rope_layer_interval-th.
    experts:          None where every layer has one MLP.
    further_layers:   the field with the number of layers that predict further tokens.
    fixed:            fields that have no other value than this one, where the file has them.
    defaults:         the values that transformers assumes for fields the file leaves out.
    aliases:          other spelling of a field -> the one used here.
    tensors:          names that differ from a Llama's, by role. Queries, keys and values may share one, as may gate and
                      up: their rows lie one behind the other.
    """

    name: str
    architecture: str
    refused: str | None = None
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    partial_rotary: bool | str = False
    rotary_interleaved: bool = False
    rope_types: Mapping[str, str] | None = None
    output_norms: bool = False
    multipliers: bool = False
    sinks: bool = False
    latent: bool = False
    window: WindowRules | None = None
    unrotated_layers: bool = False
    experts: ExpertRules | None = None
    further_layers: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if unknown := sorted(self.tensors.keys() - _TENSORS.keys()):
            raise ValueError(f"family {self.name}: expected roles of {sorted(_TENSORS)}, got {unknown}")

    def tensor(self, role: str, part: str = "weight", **place: int) -> str:
        """The name of a tensor in the checkpoint; place: layer and expert, counted from 0, where the role has them."""
        name = self.tensors.get(role, _TENSORS[role]).format(**place)
        return f"{name}.{part}" if role not in _BARE else name if part == "weight" else f"{name}_{part}"

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return _LAYER.format(layer=layer)
