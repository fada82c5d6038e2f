"""Norms."""

from __future__ import annotations

import torch


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Statistics, product and sum in float32, rounded once."""
    exact = hidden.float()
    scale = (exact.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (exact * scale * weight.float()).to(hidden.dtype)


class RMSNorm(torch.nn.Module):
    """A norm whose weight is marked as sequence-parallel whenever sequence parallelism is on, at one rank too."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        *,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if zero_centered_gamma:
            raise NotImplementedError("the stand-in for Transformer Engine has no zero-centered norms")
        self.eps, self.zero_centered_gamma, self.sequence_parallel = eps, zero_centered_gamma, sequence_parallel
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.weight, self.eps)

    def get_extra_state(self) -> torch.Tensor:
        """An operation of Transformer Engine's has a state as its layers have."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        pass


class LayerNorm(torch.nn.Module):
    """A name for Megatron's import: no served model has one."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("the stand-in for Transformer Engine has no LayerNorm")
