"""HybridModel in the place of GPTModel: the same layers, each as two of the stack, attention and what follows it.

Pipeline stages, flags, and the names and shapes in checkpoints are those of a GPTModel: what one class has saved the
other loads, the optimizer's state included.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default

from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.megatron.model.stages import layers_of_stages

# Counts of layers, and lists with an entry for each, which double.
_COUNTS = (
    *("num_layers", "recompute_num_layers"),
    *("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
)
_BY_LAYER = ("window_attn_skip_freq", "no_rope_freq", "cp_comm_type")


def hybrid_config(config: TransformerConfig) -> TransformerConfig:
    """A GPTModel's config for the HybridModel of the same layers."""
    hybrid = copy.copy(config)
    for name in _COUNTS:
        count = getattr(config, name)
        setattr(hybrid, name, None if count is None else 2 * count)
    for name in _BY_LAYER:
        values = getattr(config, name)
        if isinstance(values, list):
            setattr(hybrid, name, [value for value in values for _ in range(2)])
    # The pattern says where stages begin.
    hybrid.num_layers_in_first_pipeline_stage = hybrid.num_layers_in_last_pipeline_stage = None
    hybrid.is_hybrid_model = True
    return hybrid


def layer_pattern(config: TransformerConfig, arch: Architecture) -> str:
    """Megatron's pattern of the model's layers on its pipeline stages. config: a GPTModel's."""
    sparse = (False,) * arch.num_layers if arch.experts is None else arch.experts.layers
    attention = Symbols.ATTENTION if arch.latent is None else Symbols.MLA
    layers = [attention + (Symbols.MOE if has_experts else Symbols.MLP) for has_experts in sparse]
    stages, first = [], 0
    for count in layers_of_stages(config):
        stages.append("".join(layers[first : first + count]))
        first += count
    return Symbols.PIPE.join(stages)


def stack_spec(specs: Sequence[ModuleSpec], sparse: Sequence[bool], norm: type | None) -> ModuleSpec:
    """The stack of a HybridModel from the layers of a GPTModel.

    specs:  of each of the stage's layers.
    sparse: which of them have experts; the others are alike, and so are these.
    norm:   behind the last layer; None for Transformer Engine's.
    """
    parts: dict[str, ModuleSpec] = {}
    for spec, has_experts in zip(specs, sparse, strict=True):
        layer = spec.submodules
        attention = dataclasses.replace(layer, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
        mlp = dataclasses.replace(
            layer, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp
        )
        parts["attention_layer"] = parts["mla_layer"] = ModuleSpec(TransformerLayer, submodules=attention)
        if has_experts:
            parts["moe_layer"] = ModuleSpec(spec.module, submodules=mlp)
        else:
            parts["mlp_layer"] = ModuleSpec(MLPLayer, submodules=mlp)
    return ModuleSpec(Stack, submodules=HybridStackSubmodules(**parts), params=dict(norm=norm))


class Stack(HybridStack):
    """Megatron's stack, saved as a GPTModel's block is.

    norm: behind the last layer, where it is not Transformer Engine's, the only one that Megatron's stack knows.
    """

    def __init__(self, config: TransformerConfig, submodules, *, norm: type | None, post_process: bool, **keywords):
        super().__init__(config, submodules, post_process=post_process, post_layer_norm=norm is None, **keywords)
        if norm is not None:
            self.post_layer_norm = True
            if post_process:
                self.final_norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As TransformerBlock.sharded_state_dict has it: layers of one kind are one tensor, cut along a first dimension
        of layers; others have their index in their names."""
        metadata = metadata or {}
        by_index = metadata.get("non_homogeneous_layers", False) or metadata.get("singleton_local_shards", False)
        by_index = by_index or self.config.moe_layer_freq != 1
        found: ShardedStateDict = {}
        for place, layer in enumerate(self.layers):
            number, own = (layer.layer_number - 1) // 2, f"{prefix}layers.{place}."
            offsets = [] if by_index else [(0, number, self.config.num_layers // 2)]
            state = layer.sharded_state_dict(own, offsets, metadata)
            replace_prefix_for_sharding(state, own, f"{prefix}layers.{number}." if by_index else f"{prefix}layers.")
            found |= state
        if self.post_process:
            own = f"{prefix}final_norm."
            state = sharded_state_dict_default(self.final_norm, own, sharded_offsets, metadata, tp_group=self.tp_group)
            replace_prefix_for_sharding(state, own, f"{prefix}final_layernorm.")
            found |= state
        return found
