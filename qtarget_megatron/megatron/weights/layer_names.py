"""One set of names for the parameters of either class of models, those of a GPTModel.

A HybridModel has two layers where a GPTModel has one: attention, and the MLP or experts behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")


def named_parameters(model: LanguageModule) -> Iterator[tuple[str, Tensor]]:
    """A model chunk's parameters by the names that a GPTModel gives them; layers are counted on this rank."""
    yield from ((layer_name(model, name), parameter) for name, parameter in model.named_parameters())


def layer_name(model: LanguageModule, name: str) -> str:
    """The name that a GPTModel gives to what a model chunk has by a name."""
    if not isinstance(model, HybridModel):
        return name
    name = re.sub(r"^decoder\.final_norm\.", "decoder.final_layernorm.", name)
    return _LAYER.sub(lambda found: str(int(found[0]) // 2), name)


def first_layer(model: LanguageModule) -> int:
    """Index in the whole model of a chunk's first layer, as a GPTModel counts them; 0 where the chunk has none."""
    layers = model.decoder.layers
    if not len(layers):
        return 0
    first = layers[0].layer_number - 1
    return first // 2 if isinstance(model, HybridModel) else first
