"""An objective in ms-swift (4.6): an external plugin that registers a loss.

    QTARGET_OBJECTIVE="beyond-log alpha=0.5" swift sft --model DIR --dataset train.jsonl \\
        --external_plugins examples/plugging_in/ms_swift_plugin.py --loss_type qtarget ...

Objectives of labels alone: a plugin is given logits and labels, no second model and no fields of the data.
"""

from __future__ import annotations

import os

import torch
from swift.loss import BaseLoss, loss_map

from qtarget_megatron import objectives, qtarget_cross_entropy


class TargetLoss(BaseLoss):
    def __init__(self, args, trainer):
        super().__init__(args, trainer)
        name, *arguments = os.environ.get("QTARGET_OBJECTIVE", "dft").split()
        self.objective = objectives.from_arguments(name, arguments)
        if self.objective.needs_teacher or self.objective.token_inputs or self.objective.needs_samples:
            raise ValueError(f"objective {self.objective} reads more than logits and labels")
        if self.is_megatron or trainer.template.sequence_parallel_size > 1:
            raise ValueError("the plugin is for whole rows of whole logits: for Megatron-SWIFT see attach()")

    def __call__(self, outputs, labels, *, num_items_in_batch=None, loss_scale=None, **others):
        following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        losses = qtarget_cross_entropy(outputs.logits, following, objective=self.objective)
        if loss_scale is not None:
            losses = losses * torch.nn.functional.pad(loss_scale, (0, 1))[:, 1:].view_as(losses)
        return losses.sum() / ((following != -100).sum() if num_items_in_batch is None else num_items_in_batch)


loss_map["qtarget"] = TargetLoss
