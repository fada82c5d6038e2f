"""What some families do to the output of attention and MLP before it is added to the hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from qtarget_megatron.megatron.model.norm import RMSNorm


class ResidualAdd(torch.nn.Module):
    """hidden + dropout(multiplier * norm(output + bias)), in the place of Megatron's bias, dropout and addition.

    has_norm: whether there is that norm.
    """

    def __init__(self, config: TransformerConfig, multiplier: float, has_norm: bool):
        super().__init__()
        self._multiplier = multiplier
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if has_norm else None

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """A function of (output, bias), the hidden states and dropout's probability, as Megatron's layers ask for."""
        add = get_bias_dropout_add(training, fused)

        def scale_and_add(output_with_bias: tuple[Tensor, Tensor | None], hidden: Tensor, probability: float) -> Tensor:
            output, bias = output_with_bias
            output = output if bias is None else output + bias
            output = output if self.norm is None else self.norm(output)
            output = output if self._multiplier == 1 else output * self._multiplier
            return add((output, None), hidden, probability)

        return scale_and_add
