"""The Q-target cross-entropy over vocabulary-sharded logits. All tensor-parallel collectives of the loss are here.

statistics (one pass over the shard) -> one all-gather -> merge -> objective (O(N)) -> gradient (one pass, in place).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from qtarget_megatron import kernels
from qtarget_megatron.objectives import Objective
from qtarget_megatron.statistics import TokenStatistics, merge


def qtarget_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    teacher_logits: Tensor | None = None,
    token_inputs: Mapping[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: str = "auto",
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """Per-token loss of an objective, for logits sharded over the vocabulary.

        loss_t = CE(Q_t, p_t) for target objectives, in nats;  d loss_t / d z_k = M p_k - c_y [k = y] - sum_i c_i r_ik

    Args:
        logits: ``[..., V_local]`` float32, bfloat16 or float16 (float64 with the reference backend), this rank's shard:
            columns ``rank * V_local`` onwards of the padded vocabulary.
        labels: ``[...]`` int64 global token ids; ignore_index marks tokens without supervision.
        objective: from qtarget_megatron.objectives.
        teacher_logits: ``[..., V_local]``, sharded like logits; never receives a gradient.
        token_inputs: per-token side inputs of the objective, each ``[...]``.
        group: tensor-parallel process group; None where the vocabulary is not sharded.
        vocab_size: true vocabulary; columns from it on are padding: no mass, zero gradient. Default: all columns.
        ignore_index: label without supervision: loss 0 and gradient exactly 0, whatever the logits hold (NaN too).
        inplace: True lets backward overwrite the logits with their gradient (saves one logits-sized tensor).
        backend: "auto", "reference" (PyTorch), "cpp" (native, CPU) or "cuda" (native, GPU).
        return_statistics: also return the merged TokenStatistics, each field shaped like labels.

    Returns:
        float32 loss per token (float64 for float64 logits), shape of labels; bitwise equal on every rank of the group.

    Collectives: one all-gather over ``group`` per call, 4 + 4R float32 per token and rank (R residuals: 16, 32 or 48
    bytes; 8 each for float64); none in backward.

    Raises ValueError for a label outside of the vocabulary (checked on CPU tensors; a NaN loss on the GPU, where the
    check would wait for the device), a missing or superfluous teacher, or mismatched shapes. A NaN or +inf logit makes
    that token's loss NaN; so does a teacher row that is -inf throughout.
    """
    world_size = dist.get_world_size(group) if group is not None else 1
    rank = dist.get_rank(group) if group is not None else 0
    local_vocab = _check_shapes(logits, labels, teacher_logits, objective)
    padded_vocab = local_vocab * world_size
    vocab_size = padded_vocab if vocab_size is None else vocab_size
    if not 0 < vocab_size <= padded_vocab:
        raise ValueError(
            f"vocab_size must be in 1..{padded_vocab} ({local_vocab} columns on {world_size} rank(s)), got {vocab_size}"
        )
    flat_labels = labels.reshape(-1)
    if labels.device.type == "cpu":
        _check_labels(flat_labels, vocab_size, ignore_index)
    inputs = _flat_inputs(objective, token_inputs, labels)

    flat_logits = logits.reshape(-1, local_vocab)
    flat_teacher = None
    if teacher_logits is not None:
        flat_teacher = teacher_logits.detach().reshape(-1, local_vocab)
    spec = _Spec(
        backend=kernels.select(backend, logits),
        objective=objective,
        inputs=inputs,
        group=group,
        shard=dict(
            residuals=objective.residuals,
            vocab_start=rank * local_vocab,
            valid_columns=min(max(vocab_size - rank * local_vocab, 0), local_vocab),
            ignore_index=ignore_index,
        ),
        inplace=inplace,
    )
    loss = _QTargetCrossEntropy.apply(flat_logits, flat_teacher, flat_labels, spec)
    loss = loss.reshape(labels.shape)
    if not return_statistics:
        return loss
    return loss, _reshaped(spec.statistics, labels.shape)


@dataclass
class _Spec:
    """What forward and backward share besides tensors."""

    backend: ModuleType
    objective: Objective
    inputs: Mapping[str, Tensor]
    group: dist.ProcessGroup | None
    shard: dict
    inplace: bool
    statistics: TokenStatistics | None = None


class _QTargetCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, teacher_logits, labels, spec):
        logits = _unit_stride(logits)
        if teacher_logits is not None:
            teacher_logits = _unit_stride(teacher_logits)
        labels = labels.contiguous()
        partials = spec.backend.partial_statistics(logits, teacher_logits, labels, **spec.shard)
        supervised = labels != spec.shard["ignore_index"]
        num_residuals = len(spec.objective.residuals)
        stats = merge(_gather_partials(partials, spec.group), supervised, num_residuals)
        loss, residual_masses = _evaluate(spec.objective, stats, spec.inputs)
        spec.statistics = stats

        ctx.spec, ctx.consumed = spec, False
        ctx.save_for_backward(logits, teacher_logits, labels)
        # exp(z - max) * (mass / sum_exp), not exp(z - lse): an order of magnitude less rounding error.
        ctx.max, ctx.scale = stats.max, stats.total_mass / stats.sum_exp
        ctx.label_scale = stats.label_mass
        ctx.residual_max = _stack([r.max for r in stats.residuals], like=stats.max)
        ctx.residual_scale = _stack(
            [mass / r.sum_exp for mass, r in zip(residual_masses, stats.residuals, strict=True)],
            like=stats.max,
        )
        return loss.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx, grad_loss):
        # once_differentiable would not do: it lets create_graph=True pass where grad_loss is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "qtarget_cross_entropy has no second derivative, its targets are detached: run backward without "
                "create_graph=True"
            )
        spec = ctx.spec
        if spec.inplace:
            if ctx.consumed:
                raise RuntimeError(
                    "backward ran twice through qtarget_cross_entropy(inplace=True), whose logits the first run has "
                    "overwritten: use inplace=False with retain_graph=True"
                )
            ctx.consumed = True
        logits, teacher_logits, labels = ctx.saved_tensors
        out = logits if spec.inplace else torch.empty_like(logits)
        upstream = grad_loss.double()
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32

        def scaled(mass):
            # A token masked out downstream has upstream exactly 0: its NaN must not leak.
            return torch.where(upstream == 0, torch.zeros_like(mass), mass * upstream).to(work)

        spec.backend.logit_gradient(
            logits.detach(),
            teacher_logits,
            labels,
            **spec.shard,
            max_=ctx.max.to(work),
            scale=scaled(ctx.scale),
            label_scale=scaled(ctx.label_scale),
            residual_max=ctx.residual_max.to(work),
            residual_scale=scaled(ctx.residual_scale),
            out=out.detach(),
        )
        if spec.inplace:
            # The native kernels write behind autograd's back: whoever saved the logits too must hear of it.
            torch.autograd.graph.increment_version(out)
        return out, None, None, None


def _evaluate(
    objective: Objective, stats: TokenStatistics, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Loss and residual masses, 0 where not supervised; the masses are recorded in the statistics."""
    loss, label_mass, residual_masses = objective.evaluate(stats, inputs)
    zero = torch.zeros_like(stats.p)

    def per_token(value) -> Tensor:
        value = torch.as_tensor(value, dtype=zero.dtype, device=zero.device).expand_as(zero)
        return torch.where(stats.supervised, value, zero)

    if len(residual_masses) != len(objective.residuals):
        raise ValueError(
            f"objective {objective.name!r} has {len(objective.residuals)} residual(s) but returned "
            f"{len(residual_masses)} residual mass(es): return one for each"
        )
    residual_masses = [per_token(mass) for mass in residual_masses]
    stats.label_mass = per_token(label_mass)
    stats.residual_mass = sum(residual_masses, zero)
    stats.trust = per_token(stats.label_mass / stats.total_mass)
    # A NaN statistic must reach the loss even where an objective's own guards would hide it.
    for statistic in (stats.log_p, *(residual.mean_logit for residual in stats.residuals)):
        loss = torch.where(statistic.isnan(), statistic, loss)
    return per_token(loss), residual_masses


def _gather_partials(partials: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[N, K] on every rank -> [T, N, K] in rank order: the one collective of the loss."""
    if group is None or dist.get_world_size(group) == 1:
        return partials[None]
    gathered = partials.new_empty(dist.get_world_size(group), *partials.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), partials.contiguous(), group=group)
    return gathered


def _check_shapes(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, objective: Objective) -> int:
    if not isinstance(objective, Objective):
        raise ValueError(f"objective must come from qtarget_megatron.objectives, got {type(objective).__name__}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 token ids, got {labels.dtype}")
    if logits.shape[:-1] != labels.shape or logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be [..., V_local] with labels [...], got logits {list(logits.shape)} and labels "
            f"{list(labels.shape)}"
        )
    if objective.needs_teacher and teacher_logits is None:
        raise ValueError(f"objective {objective} needs a second model: pass teacher_logits")
    if teacher_logits is not None:
        if not objective.needs_teacher:
            raise ValueError(f"objective {objective} reads no second model: drop teacher_logits")
        if teacher_logits.shape != logits.shape:
            raise ValueError(
                f"teacher_logits must be sharded like logits {list(logits.shape)}, got {list(teacher_logits.shape)}"
            )
        if teacher_logits.device != logits.device:
            raise ValueError(f"teacher_logits must be on {logits.device} like the logits, got {teacher_logits.device}")
    return logits.shape[-1]


def _check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must be in 0..{vocab_size - 1} or ignore_index={ignore_index}, got {int(labels[first])} at flat "
            f"position {first}: check the tokenizer and the padding"
        )


def _flat_inputs(
    objective: Objective, token_inputs: Mapping[str, Tensor] | None, labels: Tensor
) -> Mapping[str, Tensor]:
    given = dict(token_inputs or {})
    if set(given) != set(objective.token_inputs):
        raise ValueError(
            f"objective {objective} takes the token_inputs {sorted(objective.token_inputs)}, got {sorted(given)}"
        )
    for name, value in given.items():
        if value.shape != labels.shape:
            raise ValueError(
                f"token_inputs[{name!r}] must be {list(labels.shape)} like labels, got {list(value.shape)}"
            )
    return {name: value.detach().reshape(-1).double() for name, value in given.items()}


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


def _stack(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like.new_empty(0, like.shape[0])


def _reshaped(stats: TokenStatistics, shape: torch.Size) -> TokenStatistics:
    def convert(value):
        return value.reshape(shape) if isinstance(value, Tensor) else value

    residuals = tuple(
        dataclasses.replace(r, **{f.name: convert(getattr(r, f.name)) for f in dataclasses.fields(r)})
        for r in stats.residuals
    )
    values = {f.name: convert(getattr(stats, f.name)) for f in dataclasses.fields(stats)}
    return dataclasses.replace(stats, **{**values, "residuals": residuals})
