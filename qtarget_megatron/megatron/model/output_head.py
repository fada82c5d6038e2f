"""A model's output head: where its logits come from, for whoever makes them outside of the layer's own forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from torch.distributed.tensor import DTensor

_INSTEAD = "let Megatron's own output layer make the logits (chunk_size=None, --qtarget-materialize-logits)"


@dataclass(frozen=True)
class OutputHead:
    """What a last stage makes logits from: hidden states [s, b, h] (sequence-sharded under sequence parallelism), the
    output layer, and the weight it takes where embeddings are tied (else None).

    layer: Megatron's ColumnParallelLinear, or what stands in its place.
    """

    hidden: Tensor
    layer: Any
    weight: Tensor | None

    def logits(self) -> Tensor:
        """[s, b, V_local], this tensor-parallel rank's vocabulary shard."""
        # A model with parallel_output=False gathers the shards otherwise.
        return self.layer(self.hidden, weight=self.weight, runtime_gather_output=False)[0]

    def matrix(self) -> Tensor:
        """[V_local, h], what hidden states are multiplied by.

        Raises ValueError where that product is not what the layer computes, or where its gradient would not arrive.
        """
        check_layer(self.layer, self.weight)
        return self.layer.weight if self.weight is None else self.weight


def check_layer(layer: Any, weight: Tensor | None) -> None:
    """ValueError for an output layer, or a weight in the place of its own, that others cannot multiply by."""
    is_plain = isinstance(layer, ColumnParallelLinear) and type(layer).forward is ColumnParallelLinear.forward
    if not is_plain or layer.bias is not None:
        raise ValueError(
            "logits in chunks: expected an output layer that is Megatron's ColumnParallelLinear without bias, got "
            f"{type(layer).__name__}: {_INSTEAD}"
        )
    weight = layer.weight if weight is None else weight
    if isinstance(weight, DTensor) or hasattr(weight, "__fsdp_param__"):
        raise ValueError(f"logits in chunks: the output layer's weight is sharded by FSDP: {_INSTEAD}")
    if getattr(layer, "gtp_remat_size", 1) > 1:
        raise ValueError(f"logits in chunks: the output layer's weight is sharded once more (gtp_remat): {_INSTEAD}")
    if layer.config.defer_embedding_wgrad_compute:
        raise ValueError(f"logits in chunks: defer_embedding_wgrad_compute is set: {_INSTEAD}")


def logit_scale(scale_logits: Callable[[Tensor], Tensor]) -> float | None:
    """The number by which a model's own rule multiplies its logits (as MuP's does); None where it does something else
    with them."""
    probe = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    ratios = set((scale_logits(probe.clone()) / probe).tolist())
    scale = ratios.pop()
    return scale if not ratios and 0 < scale < float("inf") else None


def check_scale(scale: float | None) -> float:
    """The scale of logits, see logit_scale. ValueError where it is no number."""
    if scale is None:
        raise ValueError(
            f"logits in chunks: expected a model whose logits are multiplied by one number above 0, got another rule: "
            f"{_INSTEAD}"
        )
    return scale


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, one object has another attribute of this name; its class stays as it is."""
    own = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        vars(owner).update(own)


def handing_on(layer: Any, take: Callable[[OutputHead], Any]) -> contextlib.AbstractContextManager[None]:
    """Within it, an output layer makes no logits: its output is what take makes of the head.

    It is called as the module that it is, so that hooks run, as those that gather its parameters.
    """

    def forward(input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        return take(OutputHead(input_, layer, weight)), None

    return replaced(layer, "forward", forward)


@contextlib.contextmanager
def heads_without_logits(model: Any) -> Iterator[list[OutputHead]]:
    """Within it, a model's forward without labels makes no logits, and returns a tensor of no elements; the list gets
    the head of each forward, whose products are the model's logits, its own scale of them included.

    model: a megatron-core language model; the list stays empty before the last stage. ValueError where it does
    something else with logits than to multiply them.
    """
    heads: list[OutputHead] = []
    scale = logit_scale(model._scale_logits) if model.post_process else 1.0
    if scale is None:
        raise ValueError("expected a model whose logits are multiplied by one number above 0, got another rule")

    def take(head: OutputHead) -> Tensor:
        heads.append(head if scale == 1 else OutputHead(head.hidden * scale, head.layer, head.weight))
        return head.hidden.new_empty((0, 0, 0))

    with handing_on(model.output_layer, take) if model.post_process else contextlib.nullcontext():
        yield heads
