"""One training step in Megatron's terms: batch, forward with the objective in the output processor, loss, report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from qtarget_megatron.data import IGNORE_INDEX
from qtarget_megatron.loss.cross_entropy import qtarget_cross_entropy
from qtarget_megatron.loss.linear_cross_entropy import AUTO, qtarget_linear_cross_entropy
from qtarget_megatron.loss.sparse_teacher import SparseTeacher
from qtarget_megatron.megatron.faults.loss_check import LossCheck
from qtarget_megatron.megatron.model.output_context import OutputContext
from qtarget_megatron.megatron.model.output_head import OutputHead, check_head, logit_scale
from qtarget_megatron.megatron.model.teacher_cost import TeacherCost
from qtarget_megatron.megatron.training.batches import Batches
from qtarget_megatron.objectives import Objective
from qtarget_megatron.statistics import TokenStatistics


@dataclass(frozen=True)
class LossSettings:
    """What the loss needs besides the model.

    vocab_size, teacher_vocab_size: of the true vocabularies (the teacher's only where it is the smaller one).
    backend: of the kernels.
    chunk_size: tokens whose logits exist at a time, see qtarget_linear_cross_entropy; None makes those of a whole
        micro-batch.
    teacher_tail: the rule for the mass that a cached teacher does not keep.
    teacher_cost: of a live teacher.
    loss_check: of NaN.
    batches: where micro-batches come from.
    packed: rows hold several samples, whose places every stage has to know.
    held_out: names of the held-out sets, where there are several.
    """

    objective: Objective
    vocab_size: int
    backend: str = "auto"
    chunk_size: int | Literal["auto"] | None = AUTO
    teacher_vocab_size: int | None = None
    teacher_tail: str = "uniform"
    teacher_cost: TeacherCost = field(default_factory=TeacherCost)
    loss_check: LossCheck = field(default_factory=LossCheck)
    batches: Batches = field(default_factory=Batches)
    packed: bool = False
    held_out: tuple[str, ...] = ()


@dataclass
class LossContext(OutputContext):
    """Travels through GPTModel.forward to the output processor and brings the statistics back.

    token_inputs:   the objective's side inputs by name, each [b, s] like the labels.
    sparse_teacher: a cached second model, of [b, s] tokens; reading_ms: what reading it took, of each sample [b].
    samples:        their records in the data, counted from 0, [b] on the CPU.
    num_supervised: of the labels, where the host knows it.
    filled:         tokens of samples in the micro-batch, and tokens in all.
    held_out:       of which held-out set a token is, [b, s], where there are several.
    """

    settings: LossSettings
    token_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    sparse_teacher: SparseTeacher | None = None
    reading_ms: Tensor | None = None
    samples: Tensor | None = None
    num_supervised: int | None = None
    filled: tuple[int, int] | None = None
    held_out: Tensor | None = None
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
    config,
    **unused,
) -> Tensor:
    """Replaces Megatron's output layer and cross-entropy on the last stage: hidden states to per-token loss
    ``[b, s]`` float32.

    labels: ``[b, s]``. By default logits exist a chunk at a time. With chunk_size None Megatron's own output layer
    makes all of them (its backward makes the tensor- and sequence-parallel reductions), and the gradient overwrites
    them. scale_logits, config: the model's own rule for its logits (MuP), which both follow, and its config.

    Raises ValueError for a model whose head cannot be served, see check_head and OutputHead.matrix.
    """
    settings, scale = context.settings, logit_scale(scale_logits)
    check_head(config, scale, settings.chunk_size)
    student = OutputHead(hidden_states, output_layer, output_weight)
    matrix = None if settings.chunk_size is None else student.matrix()
    teacher = context.teacher if settings.objective.needs_teacher else None

    def like_hidden(values: Tensor) -> Tensor:
        return values.transpose(0, 1).contiguous()

    cached = context.sparse_teacher
    if cached is not None:
        cached = SparseTeacher(
            like_hidden(cached.ids), like_hidden(cached.log_p), like_hidden(cached.tail), cached.rule
        )
    shared = dict(
        objective=settings.objective,
        sparse_teacher=cached,
        token_inputs={name: like_hidden(values) for name, values in context.token_inputs.items()},
        group=output_layer.tp_group,
        vocab_size=settings.vocab_size,
        ignore_index=IGNORE_INDEX,
        backend=settings.backend,
        return_statistics=True,
    )
    if settings.chunk_size is None:
        logits = scale_logits(student.logits())
        # Another rule than a factor may need its result once more in backward.
        inplace = logits.requires_grad and scale is not None
        with torch.no_grad():
            teacher_logits = (
                None if teacher is None else _known_logits(teacher.logits(), settings, output_layer.tp_group)
            )
        loss, context.statistics = qtarget_cross_entropy(
            logits, like_hidden(labels), teacher_logits=teacher_logits, inplace=inplace, **shared
        )
    else:
        loss, context.statistics = qtarget_linear_cross_entropy(
            student.hidden,
            matrix,
            like_hidden(labels),
            teacher_hidden=None if teacher is None else teacher.hidden,
            teacher_weight=None if teacher is None else teacher.matrix(),
            teacher_vocab_size=settings.teacher_vocab_size,
            logit_scale=scale,
            sequence_parallel=output_layer.sequence_parallel,
            num_supervised=context.num_supervised,
            chunk_size=settings.chunk_size,
            **shared,
        )
    return loss.t().contiguous()


def _known_logits(logits: Tensor, settings: LossSettings, group) -> Tensor:
    """The teacher's logits, -inf where its vocabulary has no such token."""
    if settings.teacher_vocab_size is not None:
        known = max(settings.teacher_vocab_size - group.rank() * logits.shape[-1], 0)
        logits[..., known:] = -torch.inf
    return logits


def forward_step(settings: LossSettings, on_nan: str | None, data_iterator: Iterator, model):
    """Megatron's forward_step_func, once its first two arguments are bound: (output tensor, loss function).

    on_nan: see LossCheck.
    """
    is_last, routers = get_attr_wrapped_model(model, "post_process"), get_attr_wrapped_model(model, "routers")
    batch = packed = None  # of a stage that reads nothing but its input
    if is_last or routers or settings.packed or get_attr_wrapped_model(model, "pre_process"):
        own = settings.batches.take(data_iterator, model, routers, settings.objective, is_last=is_last)
        batch, packed = own.batch, own.packed
    context = LossContext(settings)
    if is_last:
        context.samples, context.num_supervised, context.filled = batch.records, batch.num_supervised, batch.filled
        context.token_inputs, context.held_out = batch.inputs, batch.held_out
        if (kept := batch.teacher) is not None:
            context.sparse_teacher = SparseTeacher(kept.ids, kept.log_p, kept.tail, settings.teacher_tail)
            context.reading_ms = kept.reading_ms
    output = model(
        None if batch is None else batch.tokens,
        None if batch is None else batch.position_ids,
        None,
        labels=batch.labels if is_last else None,
        padding_mask=batch.padding if routers else None,
        packed_seq_params=packed,
        output_processor=output_processor if is_last else None,
        output_processor_context=context if is_last else None,
    )
    # Megatron calls it on the last stage.
    labels = None if batch is None else batch.labels
    return output, partial(sum_loss, context, labels, on_nan, in_training=model.training)


def sum_loss(
    context: LossContext, labels: Tensor, on_nan: str | None, token_losses: Tensor, *, in_training: bool = False
):
    """Megatron's loss function: (loss sum, number of tokens it is divided by, report).

    The sum is divided once, by the number of supervised tokens of the global batch (or of those that the objective
    counts). Each entry of the report is a pair (sum, count) that Megatron adds up over micro-batches and data-parallel
    ranks before it divides. in_training: report what belongs to a training step as well, see step_report.
    """
    loss_sum = token_losses.sum()
    if on_nan is not None:
        context.settings.loss_check.look(loss_sum.detach(), context.samples, on_nan, in_training=in_training)
    statistics = context.statistics
    num_tokens = context.settings.objective.num_tokens(
        labels != IGNORE_INDEX, context.token_inputs, statistics.label_mass
    )
    entries = report(statistics, loss_sum.detach(), num_tokens)
    if in_training:
        entries |= step_report(context)
    elif context.held_out is not None:
        entries |= held_out_report(context, labels, token_losses.detach())
    return loss_sum, num_tokens.to(torch.int), entries


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
    rows = torch.full((2,), float(context.filled[1]), device=supervised.device)
    rows[0] = context.filled[0]
    entries = {"supervised tokens": total(supervised, micro_batches * ranks), "row fill": rows}
    cost, kept = context.settings.teacher_cost, context.sparse_teacher
    if context.teacher is not None:
        entries["teacher ms"] = total(cost.take_milliseconds(), micro_batches)
        entries["teacher MiB"] = total(cost.bytes_with(context.teacher.hidden) / 2**20, 1)
    elif kept is not None:
        entries["teacher ms"] = total(context.reading_ms.sum(), micro_batches)
        entries["teacher MiB"] = total(cost.bytes_with(kept.ids, kept.log_p, kept.tail) / 2**20, 1)
    return entries


def held_out_report(context: LossContext, labels: Tensor, token_losses: Tensor) -> dict[str, Tensor]:
    """(sum, count) of the loss of each held-out set, by its name in the log: its tokens alone."""
    entries = {}
    for number, name in enumerate(context.settings.held_out):
        own = context.held_out == number
        count = context.settings.objective.num_tokens(
            (labels != IGNORE_INDEX) & own, context.token_inputs, context.statistics.label_mass.t() * own
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
