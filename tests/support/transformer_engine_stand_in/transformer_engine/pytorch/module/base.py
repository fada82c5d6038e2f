"""What all layers with weights share."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..distributed import set_tensor_model_parallel_attributes


class TransformerEngineBaseModule(torch.nn.Module):
    """A layer of a tensor-parallel group: an extra state, and parameters that are initialized with their own seeds."""

    def __init__(self):
        super().__init__()
        self.fp8 = self.fp8_calibration = self.primary_weights_in_fp8 = False
        self.fp8_meta = {"fp8_checkpoint": False}
        self.tp_group, self.tp_size, self.sequence_parallel = None, 1, False

    def set_tensor_parallel_group(self, tp_group) -> None:
        self.tp_group = tp_group

    def get_extra_state(self) -> torch.Tensor:
        """Without quantization an empty state, which is in every checkpoint all the same."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None and state.numel():
            raise NotImplementedError("the stand-in for Transformer Engine has no quantization")

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def _join(self, tp_group, tp_size: int, parallel_mode: str | None, sequence_parallel: bool) -> None:
        if parallel_mode not in ("row", "column", None):
            raise ValueError(f"parallel_mode {parallel_mode!r}")
        if tp_group is not None:
            tp_size = dist.get_world_size(tp_group)
            self.set_tensor_parallel_group(tp_group)
        elif tp_size > 1:
            raise NotImplementedError("the stand-in for Transformer Engine takes its group when it is built")
        self.tp_size, self.parallel_mode = tp_size, parallel_mode
        self.sequence_parallel = tp_size > 1 and sequence_parallel

    def _add_weight(self, name: str, dtype, device, init_method, get_rng_state_tracker, rng_tracker_name=None) -> None:
        """Every mode marks a weight as sharded, a replicated one as well: Megatron takes that mark off where it knows
        better."""
        weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=dtype, device=device))
        if get_rng_state_tracker is None:
            init_method(weight)
        else:
            with get_rng_state_tracker().fork(*([rng_tracker_name] if rng_tracker_name else [])):
                init_method(weight)
        self.register_parameter(name, weight)
        set_tensor_model_parallel_attributes(weight, True, 1 if self.parallel_mode == "row" else 0, 1)

    def _add_bias(self, name: str, dtype, device, *, wanted: bool) -> None:
        """Where none is wanted, an empty tensor that is no parameter."""
        if not wanted:
            setattr(self, name, torch.empty(0, dtype=dtype, device=device))
            return
        bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device))
        self.register_parameter(name, bias)
        if self.parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel
        elif self.parallel_mode == "column":
            set_tensor_model_parallel_attributes(bias, True, 0, 1)


def refuse_fused_gradients(fuse_wgrad_accumulation: bool) -> None:
    if fuse_wgrad_accumulation:
        raise NotImplementedError("the stand-in for Transformer Engine does not fuse gradients into their accumulation")


def get_dummy_wgrad(shape: list, dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    raise NotImplementedError("the stand-in for Transformer Engine does not fuse gradients into their accumulation")
