"""The trained model as it was some steps ago, as the frozen second model: see Objective.refresh."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from qtarget_megatron.megatron.model.stacked_teacher import StackedModel

_HEAD = "output_layer.weight"


@dataclass
class OldPolicy:
    """Gives the second model the trained one's weights, at the steps that refresh divides.

    step: the number of the current step, from 0 on.
    """

    refresh: int
    step: Callable[[], int]
    # The step of each chunk's last forward in training.
    _last_step: dict[int, int] = field(default_factory=dict)

    def renew(self, model: Any) -> None:
        """Before a forward of a model chunk, with its wrappers: nothing but in the first one of a step to renew in."""
        wrappers = []
        while not isinstance(model, StackedModel):
            wrappers.append(model)
            model = model.module
        step, last = self.step(), self._last_step.get(id(model))
        is_due = not model.teacher_is_known or (model.training and step % self.refresh == 0 and step != last)
        if model.training:
            self._last_step[id(model)] = step
        if last is None or is_due:
            _share_weights(model, model.teacher)
        if is_due:
            for wrapper in wrappers:
                # Weights that are still on their way from the ranks that have updated them.
                if model.training and getattr(getattr(wrapper, "ddp_config", None), "overlap_param_gather", False):
                    wrapper.start_param_sync(force_sync=True)
            _copy_weights(model, model.teacher)
            model.teacher_is_known = True


def _share_weights(model: StackedModel, old: LanguageModule) -> None:
    """Those that are not trained, which are the model's beside its adapters."""
    known = dict(model.named_parameters())
    for name, parameter in old.named_parameters():
        if name in known and not known[name].requires_grad:
            parameter.data = known[name].data


@torch.no_grad()
def _copy_weights(model: StackedModel, old: LanguageModule) -> None:
    """Parameters and buffers of a chunk."""
    known: dict[str, Tensor] = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    if known.get(_HEAD) is None and model.post_process:
        # Tied, where multi-token prediction brings the embedding to a last stage.
        known[_HEAD] = model.shared_embedding_or_output_weight()
    for name, tensor in itertools.chain(old.named_parameters(), old.named_buffers()):
        source = known[name]
        if source.data_ptr() == tensor.data_ptr():
            continue
        if tensor.dtype != source.dtype:
            tensor.data = tensor.data.to(source.dtype)
        tensor.copy_(source)
