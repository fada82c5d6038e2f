"""Megatron's multi-token prediction (--mtp-num-layers) with our layers: heads that predict tokens further on."""

from __future__ import annotations

import dataclasses

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


class MTPLayer(MultiTokenPredictionLayer):
    """Megatron's, in which padding stays where it is in the data.

    Megatron rolls the padding mask as it rolls tokens, but a rank of sequence parallelism has a part of it, which is
    rolled as if it were a whole sequence: the balance of experts would depend on the layout.
    """

    def _get_embeddings(self, *args, padding_mask=None, **kwargs):
        input_ids, position_ids, _, decoder_input, hidden_states = super()._get_embeddings(*args, **kwargs)
        return input_ids, position_ids, padding_mask, decoder_input, hidden_states


def mtp_block_spec(
    config: TransformerConfig, block: TransformerBlockSubmodules, norm: type | None, vp_stage: int | None, pp_rank: int
) -> MultiTokenPredictionBlockSubmodules | None:
    """The heads of this stage, each with a layer like the stage's last one; None where there are none.

    norm: of Megatron's local layers; None for Transformer Engine's. ValueError for a stage without such a layer, and
    for heads that are not where the loss is.
    """
    if not config.mtp_num_layers:
        return None
    if config.mtp_standalone:
        raise ValueError(
            "--pipeline-model-parallel-layout: expected the heads of --mtp-num-layers (m) on the last pipeline stage, "
            "where the loss is"
        )
    if get_mtp_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank) == 0:
        return None
    if not block.layer_specs:
        raise ValueError(
            "--mtp-num-layers: its heads have layers like the last one of their pipeline stage, which has none: give "
            "it one of the model's"
        )
    spec = get_gpt_mtp_block_spec(
        config, block, use_transformer_engine=norm is None, vp_stage=vp_stage, pp_rank=pp_rank
    )
    norms = {} if norm is None else dict(enorm=norm, hnorm=norm, layer_norm=norm)
    layers = [
        dataclasses.replace(layer, module=MTPLayer, submodules=dataclasses.replace(layer.submodules, **norms))
        for layer in spec.layer_specs
    ]
    return MultiTokenPredictionBlockSubmodules(layer_specs=layers)
