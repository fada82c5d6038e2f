"""Is a training sound? Its weights are finite when it starts, and it takes steps.

Looked at from the forward step, before Megatron's loop can take a model of NaNs for a success.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qtarget_megatron.huggingface import is_finite
from qtarget_megatron.megatron.faults.explained import NotFinite


class Soundness:
    """Counts the steps of one training that Megatron's optimizer skips, as it does where gradients are not finite.

    models:          the model chunks of this rank; the list may be filled later.
    from_checkpoint: the weights come from --load, and are looked at before the first step; those of a Hugging Face
                     directory are as they are read.
    named:           a chunk's parameters by the names that messages shall have.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        models: list[Any],
        *,
        from_checkpoint: bool,
        named: Callable[[Any], Iterable[tuple[str, Tensor]]] = torch.nn.Module.named_parameters,
    ):
        self._args, self._models, self._named = args, models, named
        self._unseen = from_checkpoint
        self._step: int | None = None
        self._taken = self._in_a_row = 0

    def watched(self, forward_step: Callable) -> Callable:
        """The forward step, before which the training is looked at. NotFinite on every rank where --qtarget-max-skips
        steps in a row were skipped; ValueError where a weight is not finite."""

        def looked_at(data_iterator: Any, model: Any) -> Any:
            self._check_loaded()
            step = getattr(self._args, "curr_iteration", 0)
            if model.training and step != self._step:
                self._count()
                self._step = step
            return forward_step(data_iterator, model)

        return looked_at

    def finish(self) -> None:
        """The training has ended: NotFinite where it has taken none of its steps, ValueError where a weight is not
        finite."""
        self._check_loaded()
        if self._step is not None:
            self._count()
            if self._taken == 0:
                raise NotFinite("every step was skipped, so the model is as it was, and is not exported")

    def _check_loaded(self) -> None:
        """The weights of this rank, once, where they come from a checkpoint."""
        unseen, self._unseen = self._unseen, False
        for model in self._models if unseen else ():
            for name, parameter in self._named(model):
                if not is_finite(parameter.detach()):
                    raise ValueError(
                        f"--load {self._args.load}: expected finite weights, got NaN or infinity in {name} of rank "
                        f"{dist.get_rank()}: take an earlier iteration (--ckpt-step)"
                    )

    def _count(self) -> None:
        """Whether the step before this one was taken."""
        if self._step is None:
            return
        if not was_skipped(self._models[0]):
            self._taken, self._in_a_row = self._taken + 1, 0
            return
        self._in_a_row += 1
        if self._in_a_row >= most_skips(self._args):
            raise NotFinite(
                f"{self._in_a_row} steps in a row were skipped, as loss or gradient was not finite: look at the data, "
                "the learning rate and the precision (--qtarget-max-skips is the limit)"
            )


def most_skips(args: argparse.Namespace) -> int:
    """--qtarget-max-skips, and under --fp16 as many as the loss scale needs from its first value to its last."""
    if not args.fp16 or args.loss_scale:
        return args.qtarget_max_skips
    halvings = math.log2(max(args.initial_loss_scale / args.min_loss_scale, 1.0))
    return args.qtarget_max_skips + math.ceil(halvings) + args.hysteresis


def was_skipped(model: Any) -> bool:
    """Whether Megatron's optimizer skipped its last step, by what it found in the gradients of all ranks."""
    from megatron.core.utils import get_model_config

    # train() binds the optimizer's method: nothing else leads from the model to it.
    optimizer = getattr(get_model_config(model).grad_scale_func, "__self__", None)
    return any(found.item() > 0 for found in _found(optimizer))


def _found(optimizer: Any) -> Iterable[Any]:
    for part in getattr(optimizer, "chained_optimizers", ()):
        yield from _found(part)
    if (found := getattr(optimizer, "found_inf", None)) is not None:
        yield found
