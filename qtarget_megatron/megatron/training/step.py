"""One training step in Megatron's terms: batch, forward of a model with an attached objective, loss, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from qtarget_megatron.data import IGNORE_INDEX, Batch
from qtarget_megatron.loss.samples import Samples
from qtarget_megatron.loss.sparse_teacher import SparseTeacher
from qtarget_megatron.megatron.attach import AttachedObjective, HeadResult
from qtarget_megatron.megatron.faults.loss_check import LossCheck
from qtarget_megatron.megatron.model.output_head import OutputHead
from qtarget_megatron.megatron.model.teacher_cost import TeacherCost
from qtarget_megatron.megatron.training.batches import Batches
from qtarget_megatron.objectives import Objective
from qtarget_megatron.statistics import TokenStatistics


@dataclass(frozen=True)
class StepSettings:
    """What a step needs besides the model, to which the objective is attached.

    teacher_tail: the rule for the mass that a cached teacher does not keep.
    teacher_cost: of a live teacher.
    loss_check: of NaN.
    batches: where micro-batches come from.
    packed: rows hold several samples, whose places every stage has to know.
    held_out: names of the held-out sets, where there are several.
    scheduled: the objective of the current step and the values of its scheduled parameters by name, where it has some;
               objective stands for all of them.
    renew: called with each model chunk before its forward, see OldPolicy.
    """

    objective: Objective
    teacher_tail: str = "uniform"
    teacher_cost: TeacherCost = field(default_factory=TeacherCost)
    loss_check: LossCheck = field(default_factory=LossCheck)
    batches: Batches = field(default_factory=Batches)
    packed: bool = False
    held_out: tuple[str, ...] = ()
    scheduled: Callable[[], tuple[Objective, dict[str, float]]] | None = None
    renew: Callable[[Any], None] = lambda model: None

    def now(self) -> tuple[Objective, dict[str, float]]:
        """The objective of the current step, and its scheduled parameters."""
        return (self.objective, {}) if self.scheduled is None else self.scheduled()


@dataclass
class LossContext:
    """What the loss function of a last stage knows of a micro-batch besides the losses.

    objective:      of this step.
    parameters:     those of the objective that follow a schedule.
    heads:          what the objective made of each head, see AttachedObjective.
    sparse_teacher: a cached second model, of [b, s] tokens.
    teacher:        the output head of a live one.
    """

    settings: StepSettings
    batch: Batch
    objective: Objective
    parameters: Mapping[str, float] = field(default_factory=dict)
    heads: tuple[HeadResult, ...] = ()
    sparse_teacher: SparseTeacher | None = None
    teacher: OutputHead | None = None

    @property
    def statistics(self) -> TokenStatistics:
        """Those of the next token."""
        return self.heads[0].statistics


def forward_step(settings: StepSettings, on_nan: str | None, data_iterator: Iterator, model):
    """Megatron's forward_step_func, once its first two arguments are bound: (output tensor, loss function).

    on_nan: see LossCheck.
    """
    settings.renew(model)
    is_last, routers = get_attr_wrapped_model(model, "post_process"), get_attr_wrapped_model(model, "routers")
    batch = packed = None  # of a stage that reads nothing but its input
    if is_last or routers or settings.packed or get_attr_wrapped_model(model, "pre_process"):
        own = settings.batches.take(data_iterator, model, routers, settings.objective, is_last=is_last)
        batch, packed = own.batch, own.packed
    arguments = dict(padding_mask=batch.padding if routers else None, packed_seq_params=packed)
    if not is_last:
        tokens, position_ids = (None, None) if batch is None else (batch.tokens, batch.position_ids)
        return model(tokens, position_ids, None, **arguments), None
    bare = get_attr_wrapped_model(model, "attached_objective", return_model_obj=True)
    attached: AttachedObjective = bare.attached_objective
    objective, parameters = settings.now()
    attached.set_objective(objective)
    context = LossContext(settings, batch, objective, parameters)
    if (kept := batch.teacher) is not None:
        context.sparse_teacher = SparseTeacher(kept.ids, kept.log_p, kept.tail, settings.teacher_tail)
    with attached.inputs(
        batch.inputs,
        sparse_teacher=context.sparse_teacher,
        teacher=lambda: bare.taught,
        samples=_samples(batch),
        num_supervised=batch.num_supervised,
    ):
        # Megatron asks its heads of multi-token prediction for losses of all tokens where there is no mask.
        mask = (batch.labels != IGNORE_INDEX).float() if bare.mtp_process else None
        output = model(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=mask, **arguments)
    context.heads, context.teacher = attached.heads, bare.take_taught()
    return output, partial(sum_loss, context, on_nan, in_training=model.training)


def _samples(batch: Batch) -> Samples | None:
    """The samples of a micro-batch's tokens, where the objective asks for them."""
    if batch.segments is None:
        return None
    group = parallel_state.get_context_parallel_group()
    return Samples(batch.segments, batch.num_segments, group, batch.position_ids)


def sum_loss(context: LossContext, on_nan: str | None, token_losses: Tensor, *, in_training: bool = False):
    """Megatron's loss function: (loss sum, number of tokens it is divided by, report).

    The sum is divided once, by the number of supervised tokens of the global batch (or of those that the objective
    counts). Each entry of the report is a pair (sum, count) that Megatron adds up over micro-batches and data-parallel
    ranks before it divides. in_training: report what belongs to a training step as well, see step_report.
    """
    loss_sum, batch = token_losses.sum(), context.batch
    sums = [loss_sum.detach(), *(head.losses.sum() for head in context.heads[1:])]
    if on_nan is not None:
        context.settings.loss_check.look(sum(sums[1:], sums[0]), batch.records, on_nan, in_training=in_training)
    counts = [_num_tokens(context.objective, head) for head in context.heads]
    num_tokens, entries = counts[0], dict[str, Tensor]()
    for ahead, (head, total, count) in enumerate(zip(context.heads, sums, counts, strict=True)):
        entries |= _named(ahead, report(head.statistics, total, count))
    if in_training:
        entries |= step_report(context)
    elif batch.held_out is not None:
        entries |= held_out_report(context, token_losses.detach())
    return loss_sum, num_tokens.to(torch.int), entries


def _num_tokens(objective: Objective, head: HeadResult) -> Tensor:
    return objective.num_tokens(head.labels != IGNORE_INDEX, head.token_inputs, head.statistics.label_mass)


def _named(ahead: int, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """A head's entries by their names in the log; of multi-token prediction those that tell most."""
    if ahead == 0:
        return entries
    names = {"lm loss": "loss", "trust": "trust", "p(y)": "p(y)", "entropy": "entropy"}
    return {f"mtp {ahead} {short}": entries[name] for name, short in names.items()}


def step_report(context: LossContext) -> dict[str, Tensor]:
    """Totals of a training step, as report() gives them: supervised tokens of the global batch, the share of the rows'
    tokens that are a sample's and, with a second model, its time and its memory on a rank of the last stage, as the
    mean over data-parallel ranks."""
    micro_batches = get_num_microbatches()
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    supervised = context.statistics.supervised.sum()

    def total(value: Tensor | float, parts: int) -> Tensor:
        pair = torch.full((2,), 1 / parts, device=supervised.device)
        pair[0] = value
        return pair

    # Filled on the device: a copy to it would wait. Megatron divides by the sum of the counts.
    filled, tokens = context.batch.filled
    rows = torch.full((2,), float(tokens), device=supervised.device)
    rows[0] = filled
    entries = {"supervised tokens": total(supervised, micro_batches * ranks), "row fill": rows}
    entries |= {f"objective {name}": total(value, 1) for name, value in context.parameters.items()}
    cost, kept = context.settings.teacher_cost, context.sparse_teacher
    if context.teacher is not None:
        entries["teacher ms"] = total(cost.take_milliseconds(), micro_batches)
        entries["teacher MiB"] = total(cost.bytes_with(context.teacher.hidden) / 2**20, 1)
    elif kept is not None:
        entries["teacher ms"] = total(context.batch.teacher.reading_ms.sum(), micro_batches)
        entries["teacher MiB"] = total(cost.bytes_with(kept.ids, kept.log_p, kept.tail) / 2**20, 1)
    return entries


def held_out_report(context: LossContext, token_losses: Tensor) -> dict[str, Tensor]:
    """(sum, count) of the loss of each held-out set, by its name in the log: its tokens alone."""
    entries, batch = {}, context.batch
    for number, name in enumerate(context.settings.held_out):
        own = batch.held_out == number
        count = context.objective.num_tokens(
            (batch.labels != IGNORE_INDEX) & own, batch.inputs, context.statistics.label_mass.t() * own
        )
        entries[f"lm loss {name}"] = torch.stack([(token_losses * own).sum(), count.float()])
    return entries


def report(stats: TokenStatistics, loss_sum: Tensor, num_tokens: Tensor) -> dict[str, Tensor]:
    """(sum, count) of the loss over num_tokens and of each statistic over the supervised tokens, by their log names."""
    supervised = stats.supervised
    # Undefined where the total mass is 0, so it has a count of its own.
    undefined = stats.trust.isnan()
    columns = {
        "trust": (stats.trust.masked_fill(undefined, 0.0), supervised & ~undefined),
        "p(y)": (stats.p, supervised),
        "entropy": (stats.entropy, supervised),
        "label mass": (stats.label_mass, supervised),
        "residual mass": (stats.residual_mass, supervised),
        "total mass": (stats.total_mass, supervised),
    }
    # In one sum: on a GPU each operation is a launch.
    sums = torch.stack([part for pair in columns.values() for part in pair]).flatten(1).sum(1).float()
    entries = {"lm loss": torch.stack([loss_sum.float(), num_tokens.float()])}
    return entries | dict(zip(columns, sums.view(-1, 2), strict=True))
