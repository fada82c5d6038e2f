"""Objectives through the package's loss, against their definitions."""

from __future__ import annotations

import torch
from loss_definitions import assert_close_to_truth, truth

from qtarget_megatron import qtarget_cross_entropy


def draw(rows=24, columns=211, scale=3.0, dtype=torch.float32):
    """Logits, labels, teacher, upstream gradient; the teacher agrees with the student in part."""
    logits = scale * torch.randn(rows, columns)
    teacher = 0.5 * logits + scale * torch.randn(rows, columns)
    labels = torch.randint(columns, (rows,))
    # Half of the labels are likely tokens, as in fine-tuning.
    labels[::2] = logits[::2].argmax(-1)
    return logits.to(dtype), labels, teacher.to(dtype), torch.randn(rows)


def run(case, logits, labels, teacher, upstream=None, inputs=None, **keywords):
    """Loss and logit gradient of the package. inputs: the case's, of whole logits where these are a shard."""
    leaf = logits.clone().requires_grad_()
    loss = qtarget_cross_entropy(
        leaf,
        labels,
        objective=case.objective,
        teacher_logits=case.teacher(teacher),
        token_inputs=case.inputs(logits, labels) if inputs is None else inputs,
        samples=case.samples(labels),
        **keywords,
    )
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), gradient


def check(case, logits, labels, teacher, upstream, backend, exponent_rounding=0.0):
    """Loss and logit gradient of the package, which are the definition."""
    loss, gradient = run(case, logits, labels, teacher, upstream, backend=backend)
    assert gradient.dtype == logits.dtype
    expected = truth(case, logits, labels, teacher, upstream)
    assert_close_to_truth(loss, gradient, expected, exponent_rounding)
    return loss, gradient
