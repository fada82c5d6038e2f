"""Linear layers of a tensor-parallel group, alone and behind a norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from ..distributed import AllGather, AllReduce, Copy, ReduceScatter, divide
from .base import TransformerEngineBaseModule, refuse_fused_gradients
from .norm import rms_norm


class Linear(TransformerEngineBaseModule):
    """y = x A^T + b. Column-parallel layers gather what sequence parallelism scattered and keep their own columns of
    the output; row-parallel ones sum over the group, and scatter the sum again under sequence parallelism."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group=None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
    ):
        super().__init__()
        refuse_fused_gradients(fuse_wgrad_accumulation)
        self.rng_tracker_name = rng_tracker_name
        self._build(
            in_features,
            out_features,
            (tp_group, tp_size, parallel_mode, sequence_parallel),
            (params_dtype, device),
            (init_method, get_rng_state_tracker, rng_tracker_name),
            bias,
            return_bias,
        )

    def _build(self, in_features, out_features, parallel, kind, init, bias, return_bias) -> None:
        """parallel, kind, init: what _join takes, dtype and device, and what _add_weight takes besides."""
        self._join(*parallel)
        self.in_features = divide(in_features, self.tp_size) if self.parallel_mode == "row" else in_features
        self.out_features = divide(out_features, self.tp_size) if self.parallel_mode == "column" else out_features
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self._add_weight("weight", *kind, *init)
        self._add_bias("bias", *kind, wanted=bias)

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None):
        out = self._multiply(inp)
        return (out, self.bias) if self.return_bias else out

    def _multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        group, bias = self.tp_group, self.bias if self.apply_bias else None
        if self.parallel_mode is None or self.tp_size == 1:
            return linear(hidden, self.weight, bias)
        if self.parallel_mode == "column":
            hidden = AllGather.apply(hidden, group) if self.sequence_parallel else Copy.apply(hidden, group)
            return linear(hidden, self.weight, bias)
        out = linear(hidden, self.weight)
        out = ReduceScatter.apply(out, group) if self.sequence_parallel else AllReduce.apply(out, group)
        return out if bias is None else out + bias


class LayerNormLinear(Linear):
    """A linear layer of an RMSNorm's output, whose weight is a parameter of this layer. Column-parallel or alone."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group=None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
    ):
        TransformerEngineBaseModule.__init__(self)
        refuse_fused_gradients(fuse_wgrad_accumulation)
        if normalization != "RMSNorm" or zero_centered_gamma or return_layernorm_output or parallel_mode == "row":
            raise NotImplementedError("the stand-in for Transformer Engine has a plain RMSNorm before a linear layer")
        self.normalization, self.zero_centered_gamma, self.eps = normalization, zero_centered_gamma, eps
        norm = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        self.register_parameter("layer_norm_weight", norm)
        self.layer_norm_bias = None
        self._build(
            in_features,
            out_features,
            (tp_group, tp_size, parallel_mode, sequence_parallel),
            (params_dtype, device),
            (init_method, get_rng_state_tracker),
            bias,
            return_bias,
        )
        # Unlike a norm's own: not at one rank.
        norm.sequence_parallel = self.sequence_parallel

    def _multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        return super()._multiply(rms_norm(hidden, self.layer_norm_weight, self.eps))
