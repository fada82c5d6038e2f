"""The norm of local layers, and of what Megatron's own layers have no norm for."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with sequence parallelism.

    y = x / sqrt(mean(x^2) + eps) * weight, the mean in float32. Megatron's wrapper around torch's norm refuses sequence
    parallelism, which needs no more than the mark on the weight: its gradient is then summed over the group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (hidden.float() * scale).to(hidden.dtype) * self.weight
