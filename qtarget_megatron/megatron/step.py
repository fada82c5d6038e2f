"""One training step in Megatron's terms: batch, forward with the objective in the output processor, loss, report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from torch import Tensor

from qtarget_megatron.data import IGNORE_INDEX
from qtarget_megatron.loss import qtarget_cross_entropy
from qtarget_megatron.megatron.teacher import OutputHead
from qtarget_megatron.objectives import Objective
from qtarget_megatron.statistics import TokenStatistics


@dataclass(frozen=True)
class LossSettings:
    """What the loss needs besides the model: the objective, the true vocabulary and the kernels' backend."""

    objective: Objective
    vocab_size: int
    backend: str = "auto"


@dataclass
class LossContext:
    """Travels through GPTModel.forward to the output processor and brings the statistics back."""

    settings: LossSettings
    teacher: OutputHead | None = None
    statistics: TokenStatistics | None = None


def output_processor(
    *,
    hidden_states,
    output_layer,
    output_weight,
    labels,
    context: LossContext,
    scale_logits,
    **unused,
) -> Tensor:
    """Replaces Megatron's cross-entropy on the last stage: hidden states to per-token loss ``[b, s]`` float32.

    labels: ``[b, s]``. Megatron's own output layer makes the logits (and its backward the tensor- and
    sequence-parallel reductions), the gradient overwrites them.
    """
    settings = context.settings
    logits = scale_logits(OutputHead(hidden_states, output_layer, output_weight).logits())
    teacher_logits = None
    if settings.objective.needs_teacher and context.teacher is not None:
        with torch.no_grad():
            teacher_logits = context.teacher.logits()
    loss, context.statistics = qtarget_cross_entropy(
        logits,
        labels.t().contiguous(),
        objective=settings.objective,
        teacher_logits=teacher_logits,
        group=output_layer.tp_group,
        vocab_size=settings.vocab_size,
        ignore_index=IGNORE_INDEX,
        inplace=logits.requires_grad,
        backend=settings.backend,
        return_statistics=True,
    )
    return loss.t().contiguous()


def forward_step(settings: LossSettings, check_for_nan: bool, data_iterator: Iterator, model):
    """Megatron's forward_step_func, once its first two arguments are bound: (output tensor, loss function)."""
    is_first, is_last = (get_attr_wrapped_model(model, key) for key in ("pre_process", "post_process"))
    batch = next_batch(data_iterator) if is_first or is_last else dict.fromkeys(("tokens", "labels", "position_ids"))
    context = LossContext(settings)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"] if is_last else None,
        output_processor=output_processor if is_last else None,
        output_processor_context=context if is_last else None,
    )
    return output, partial(sum_loss, context, batch["labels"], check_for_nan)


def next_batch(data_iterator: Iterator) -> dict[str, Tensor]:
    """The next micro-batch of this data-parallel rank, cut for context parallelism.

    Every rank that needs it reads it by sample index, so there is nothing to broadcast.
    """
    batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items() if key != "sample"}
    cp_group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group) if cp_group.size() > 1 else batch


def sum_loss(context: LossContext, labels: Tensor, check_for_nan: bool, token_losses: Tensor):
    """Megatron's loss function: (loss sum, number of supervised tokens, report).

    The sum is divided once, by the number of supervised tokens of the global batch. Each entry of the report is a pair
    (sum, count) that Megatron adds up over micro-batches and data-parallel ranks before it divides.
    """
    loss_sum = token_losses.sum()
    if check_for_nan:
        get_rerun_state_machine().validate_result(
            result=loss_sum,
            rejection_func=lambda value: not torch.isfinite(value).item(),
            message="finite loss",
            tolerance=0.0,
            fatal=True,
        )
    num_tokens = (labels != IGNORE_INDEX).sum()
    return (
        loss_sum,
        num_tokens.to(torch.int),
        report(context.statistics, loss_sum.detach(), num_tokens),
    )


def report(stats: TokenStatistics, loss_sum: Tensor, num_tokens: Tensor) -> dict[str, Tensor]:
    """(sum, count) of the loss and of each statistic over supervised tokens, by the name it is logged under."""
    trusted = stats.supervised & ~stats.trust.isnan()

    def pair(total: Tensor, count: Tensor = num_tokens) -> Tensor:
        return torch.stack([total.float(), count.float()])

    return {
        "lm loss": pair(loss_sum),
        # Undefined where the total mass is 0, so it has a count of its own.
        "trust": pair(stats.trust[trusted].sum(), trusted.sum()),
        "p(y)": pair(stats.p.sum()),
        "entropy": pair(stats.entropy.sum()),
        "label mass": pair(stats.label_mass.sum()),
        "residual mass": pair(stats.residual_mass.sum()),
    }
