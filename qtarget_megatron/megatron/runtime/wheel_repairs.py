"""Faults of the megatron-core 0.19 wheel that are mended here, on every platform, and where this package is called in
between: beside ``cpu_platform`` the only code that replaces anything in torch or Megatron."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch


def repair_megatron_wheel() -> None:
    """Mend the megatron-core 0.19 wheel, on every platform; idempotent, call it before pretrain().

    compile_helpers runs make on a Makefile that the wheel does not ship, then exits. The compiled helper is in the
    wheel, and this package's data set does not use it.

    Without Transformer Engine and Apex, the distributed optimizer takes torch's Adam but cannot load a checkpoint of
    it: it expects the step in the parameter group, as their FusedAdam has it. It gets an Adam that keeps it there.

    The fully reshardable state of the distributed optimizer is wrong from the second gradient bucket on, see
    _keeping_padding. The other one, of a training in float32, is copied into views of parameters, which autograd
    refuses: loading it is no computation to differentiate.
    """
    import megatron.core.datasets.utils as dataset_utils

    makefile = os.path.join(os.path.dirname(dataset_utils.__file__), "Makefile")
    if not os.path.exists(makefile):
        dataset_utils.compile_helpers = lambda: None

    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = GroupStepAdam, False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True

    distributed = distrib_optimizer.DistributedOptimizer
    sharded = distributed.sharded_param_state_fully_reshardable
    if not hasattr(sharded, "__wrapped__"):
        distributed.sharded_param_state_fully_reshardable = _keeping_padding(sharded)
    load = distributed.load_parameter_state_from_dp_reshardable
    if not hasattr(load, "__wrapped__"):
        distributed.load_parameter_state_from_dp_reshardable = torch.no_grad()(load)


def _keeping_padding(sharded_state):
    """The fully reshardable state, right with any number of buckets.

    Megatron gathers the state of a buffer without the padding at the end of each bucket, and takes each parameter from
    it at its place in the buffer with the padding: behind the first padded bucket every parameter gets what belongs to
    another, or zeros. Here it gathers with the padding (buckets count as full). Where Megatron subtracts the padding
    before a bucket itself, as releases after 0.19.2 do, it finds none to subtract: then this changes nothing.
    """

    @functools.wraps(sharded_state)
    def replacement(self, *args, **kwargs):
        lengths: dict[Any, int] = {}
        for buffer in self.buffers:
            padded = [bucket.grad_data.numel() for bucket in buffer.buckets]
            lengths |= dict(zip(buffer.buckets, padded, strict=True)) | {buffer: sum(padded)}
        before = {owner: owner.numel_unpadded for owner in lengths}
        try:
            for owner, length in lengths.items():
                owner.numel_unpadded = length
            return sharded_state(self, *args, **kwargs)
        finally:
            for owner, length in before.items():
                owner.numel_unpadded = length

    return replacement


def around_checkpoints(save: Callable, load: Callable) -> None:
    """Have Megatron's loop save and load checkpoints through this package, until the next call.

    save(proceed, optimizer) and load(proceed, optimizer, scheduler) call proceed() for Megatron's own function and
    return what it returns.
    """
    from megatron.training import checkpointing, training

    def save_checkpoint(iteration, model, optimizer, *args, **kwargs):
        return save(lambda: checkpointing.save_checkpoint(iteration, model, optimizer, *args, **kwargs), optimizer)

    def load_checkpoint(model, optimizer, scheduler, *args, **kwargs):
        def proceed():
            with _as_it_is_saved(checkpointing):
                return checkpointing.load_checkpoint(model, optimizer, scheduler, *args, **kwargs)

        return load(proceed, optimizer, scheduler)

    training.save_checkpoint, training.load_checkpoint = save_checkpoint, load_checkpoint


@contextlib.contextmanager
def _as_it_is_saved(checkpointing):
    """Have Megatron load what it is given by the names that the model asks for. It takes what a GPTModel has saved for
    something that a HybridModel has other names for; ours has the same."""
    translation = "_maybe_setup_gpt_to_hybrid_load"
    before = getattr(checkpointing, translation, None)
    if before is None:
        yield
        return
    setattr(checkpointing, translation, lambda args, saved, model: (None, False))
    try:
        yield
    finally:
        setattr(checkpointing, translation, before)


class GroupStepAdam(torch.optim.Adam):
    """torch's Adam with the interface of FusedAdam: one step count per parameter group, none per parameter.

    adam_w_mode: decoupled weight decay (AdamW) instead of L2.
    """

    def __init__(self, params, *args, adam_w_mode: bool = True, **kwargs):
        super().__init__(params, *args, decoupled_weight_decay=adam_w_mode, **kwargs)

    @torch.no_grad()
    def step(self, closure=None):
        with self._step_per_parameter():
            loss = super().step(closure)
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
        return loss

    def __setstate__(self, state):
        self.__dict__.update(state)
        with self._step_per_parameter():
            super().__setstate__({})

    @contextlib.contextmanager
    def _step_per_parameter(self):
        """Torch's layout for as long as torch's code runs: a step tensor for each parameter, counted up in place."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state.get(parameter):
                    self.state[parameter]["step"] = torch.tensor(float(group.get("step", 0)))
        yield
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state.get(parameter, {}).pop("step", None)


def replace_tensorboard_writer(replacement: Callable[[Any], Any]) -> None:
    """Have Megatron log to what replacement() makes of its TensorBoard writer, None where it has none."""
    from megatron.training import global_vars

    global_vars._GLOBAL_TENSORBOARD_WRITER = replacement(global_vars._GLOBAL_TENSORBOARD_WRITER)


def set_write_results_queue(queue) -> None:
    """Give Megatron the queue that it would make at the first save: the outcome of a write comes through it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue
