"""A model's output head: where its logits come from, for whoever makes them outside of the layer's own forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from torch.distributed.tensor import DTensor

_INSTEAD = "let Megatron's own output layer make the logits (chunk_size=None, --qtarget-materialize-logits)"


@dataclass
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
        """[V_local, h], what hidden states are multiplied by, ready for use outside of the layer's own forward.

        Raises ValueError where that product is not what the layer computes, or where its gradient would not arrive.
        """
        self._check()
        # Megatron gathers overlapped parameters in a hook before the forward of the module that owns them.
        for hook in self.layer._forward_pre_hooks.values():
            hook(self.layer, (self.hidden,))
        return self.layer.weight if self.weight is None else self.weight

    def _check(self) -> None:
        layer, weight = self.layer, self.weight
        is_plain = isinstance(layer, ColumnParallelLinear) and type(layer).forward is ColumnParallelLinear.forward
        if not is_plain or layer.bias is not None:
            raise ValueError(
                "logits in chunks: expected an output layer that is Megatron's ColumnParallelLinear without bias, got "
                f"{type(layer).__name__}: {_INSTEAD}"
            )
        weight = layer.weight if weight is None else weight
        if isinstance(weight, DTensor) or hasattr(weight, "__fsdp_param__"):
            raise ValueError(f"logits in chunks: the output layer's weight is sharded by FSDP: {_INSTEAD}")
        if layer.config.defer_embedding_wgrad_compute:
            raise ValueError(f"logits in chunks: defer_embedding_wgrad_compute is set: {_INSTEAD}")


def scaled_head(
    hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, scale_logits: Callable[[Tensor], Tensor]
) -> OutputHead:
    """An output processor's arguments as the head whose products are the model's logits.

    ValueError where scale_logits does something else than to multiply them.
    """
    scale = logit_scale(scale_logits)
    if scale is None:
        raise ValueError("expected a model whose logits are multiplied by one number above 0, got another rule")
    return OutputHead(hidden_states if scale == 1 else hidden_states * scale, output_layer, output_weight)


def logit_scale(scale_logits: Callable[[Tensor], Tensor]) -> float | None:
    """The number by which a model's own rule multiplies its logits (as MuP's does); None where it does something else
    with them."""
    probe = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    ratios = set((scale_logits(probe.clone()) / probe).tolist())
    scale = ratios.pop()
    return scale if not ratios and 0 < scale < float("inf") else None


def check_head(config, scale: float | None, chunk_size: int | Literal["auto"] | None) -> None:
    """Refuse what an objective in the place of the cross-entropy would silently change. Raises ValueError.

    config: the model's. scale: see logit_scale.
    """
    if getattr(config, "mtp_num_layers", None):
        raise ValueError(
            f"mtp_num_layers {config.mtp_num_layers}: Megatron trains these heads with its own cross-entropy, whatever "
            "the objective: set mtp_num_layers to None"
        )
    if chunk_size is not None and scale is None:
        raise ValueError(
            f"logits in chunks: expected a model whose logits are multiplied by one number above 0, got another rule: "
            f"{_INSTEAD}"
        )
