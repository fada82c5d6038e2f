"""Linear layers of several experts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import linear

from ..distributed import divide
from .base import TransformerEngineBaseModule, refuse_fused_gradients


class GroupedLinear(TransformerEngineBaseModule):
    """One weight for each expert: weight0, weight1, ..., and biases that are added, or
    returned. It does not communicate: the token dispatcher does."""

    def __init__(
        self,
        num_gemms: int,
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
        ub_name: str | None = None,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
    ):
        super().__init__()
        refuse_fused_gradients(fuse_wgrad_accumulation)
        if single_grouped_weight or single_grouped_bias:
            raise NotImplementedError("the stand-in for Transformer Engine has a weight and a bias for each expert")
        self._join(tp_group, tp_size, parallel_mode, sequence_parallel)
        self.in_features = divide(in_features, self.tp_size) if parallel_mode == "row" else in_features
        self.out_features = divide(out_features, self.tp_size) if parallel_mode == "column" else out_features
        self.num_gemms, self.use_bias, self.return_bias, self.ub_name = num_gemms, bias, return_bias, ub_name
        self.rng_tracker_name = rng_tracker_name
        for index in range(num_gemms):
            init = init_method, get_rng_state_tracker, rng_tracker_name
            self._add_weight(f"weight{index}", params_dtype, device, *init)
            self._add_bias(f"bias{index}", params_dtype, device, wanted=bias)

    def forward(
        self,
        inp: torch.Tensor,
        m_splits: Sequence[int] | torch.Tensor,
        is_first_microbatch: bool | None = None,
    ):
        """m_splits: tokens of each expert, in their order in inp."""
        splits = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else list(m_splits)
        if len(splits) != self.num_gemms:
            raise ValueError(f"expected {self.num_gemms} numbers of tokens, got {splits}")
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)] if self.use_bias else []
        added = biases if biases and not self.return_bias else [None] * self.num_gemms
        out = torch.cat(list(map(linear, inp.split(splits), weights, added)))
        return (out, biases) if self.return_bias else out
