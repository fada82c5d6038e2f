"""What the parts of a decoder return in one forward pass, by places that mean the same in every implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PARTS = ("attention", "MLP", "output")


@dataclass(frozen=True, order=True)
class Place:
    """Where in a decoder, in the order of its computation: the embedding, each layer's attention, MLP and output, the
    final norm, the logits. layer: -1 before the layers, as many as there are behind them."""

    layer: int
    number: int
    part: str

    @classmethod
    def embedding(cls) -> Place:
        return cls(-1, 0, "embedding")

    @classmethod
    def of_layer(cls, layer: int, part: str) -> Place:
        """part: "attention" or "MLP", what is added to the hidden states, or "output"."""
        return cls(layer, _PARTS.index(part), part)

    @classmethod
    def final_norm(cls, num_layers: int) -> Place:
        return cls(num_layers, 0, "final norm")

    @classmethod
    def logits(cls, num_layers: int) -> Place:
        return cls(num_layers, 1, "logits")

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.part}" if self.part in _PARTS else self.part


@contextmanager
def recorded(modules: Mapping[Place, torch.nn.Module]) -> Iterator[dict[Place, Tensor]]:
    """Place -> what its module returned the first time within the context, detached.

    Of a module that returns a tuple: the first element, plus the second where that is a tensor of one dimension (a bias
    that is yet to be added).
    """
    found: dict[Place, Tensor] = {}

    def keep(place: Place):
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if place not in found:
                # A copy: Megatron adds the residual in place.
                found[place] = _value(output).detach().clone()

        return hook

    handles = [module.register_forward_hook(keep(place)) for place, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _value(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    value, *others = output
    if others and isinstance(others[0], Tensor) and others[0].dim() == 1:
        return value + others[0]
    return value
