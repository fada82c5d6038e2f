"""Which layers of a model are on which pipeline stage."""

from __future__ import annotations

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build


def layers_of_stages(config: TransformerConfig) -> list[int]:
    """The number of layers of each stage, in the order of the layers: of virtual stages those of the first ones on all
    ranks, then of the second ones, ..."""
    stated, ranks = config.pipeline_model_parallel_layout, config.pipeline_model_parallel_size
    places = [
        (chunk, rank) for chunk in range(config.virtual_pipeline_model_parallel_size or 1) for rank in range(ranks)
    ]
    if stated is not None:
        return [stated.layout[rank][chunk].count(LayerType.decoder) for chunk, rank in places]
    return [get_num_layers_to_build(config, chunk, rank) for chunk, rank in places]


def even_stages(num_layers: int, stages: int) -> list[list[str]]:
    """Megatron's layout of num_layers over stages, in order; where they do not divide, earlier stages have one more."""
    share, more = divmod(num_layers, stages)
    layout = [["decoder"] * (share + (index < more)) for index in range(stages)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
