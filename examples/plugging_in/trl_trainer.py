"""An objective in transformers' Trainer and in TRL's SFTTrainer (1.16), one process or data parallel.

    from examples.plugging_in.trl_trainer import loss_func
    SFTTrainer(..., compute_loss_func=loss_func("dft"))                      # transformers' Trainer takes it as well
    SFTTrainer(model, compute_loss_func=loss_func("target-sft", "eta=0.5", teacher=teacher, model=model))

The trainer counts the tokens and divides; the loss of each token is ours. teacher: a model of the same tokens, frozen.
It is run on what the model was last called with, which a hook keeps: give the trainer's model as model. TRL 2 takes no
compute_loss_func: there, compute_loss of a class of one's own calls it.
"""

from __future__ import annotations

import torch

from qtarget_megatron import objectives, qtarget_cross_entropy


def loss_func(name: str, *arguments: str, teacher=None, model=None):
    """A compute_loss_func."""
    objective = objectives.from_arguments(name, list(arguments))
    if objective.token_inputs or objective.needs_samples or objective.refresh:
        raise ValueError(f"objective {objective} reads more of a batch than a compute_loss_func is given")
    if objective.needs_teacher and (teacher is None or model is None):
        raise ValueError(f"objective {objective} reads a second model: give teacher and model")
    last = {}
    if objective.needs_teacher:
        teacher.requires_grad_(False).eval()
        model.register_forward_pre_hook(lambda module, args, kwargs: last.update(kwargs), with_kwargs=True)

    def loss(outputs, labels, num_items_in_batch=None):
        logits, following = outputs.logits, torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        teacher_logits = None
        if objective.needs_teacher:
            read = {
                key: last[key] for key in ("input_ids", "attention_mask", "position_ids") if last.get(key) is not None
            }
            with torch.no_grad():
                teacher_logits = teacher(**read).logits.to(logits)
        losses = qtarget_cross_entropy(
            logits, following.contiguous(), objective=objective, teacher_logits=teacher_logits
        )
        return losses.sum() / ((following != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    return loss
