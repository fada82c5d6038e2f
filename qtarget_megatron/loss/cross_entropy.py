"""The Q-target cross-entropy over vocabulary-sharded logits.

statistics (one pass over the shard) -> one all-gather -> merge -> objective (O(N)) -> gradient (one pass, in place).
A divergence other than the reverse KL has one pass and one all-gather more before the objective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from qtarget_megatron import collectives, kernels
from qtarget_megatron.kernels.backend import Backend
from qtarget_megatron.loss import second_model
from qtarget_megatron.loss.per_token import (
    DivergencePass,
    add_divergence,
    check_samples,
    evaluate,
    flat_inputs,
    refuse_second_derivative,
    supervised_tokens,
    true_vocab_size,
)
from qtarget_megatron.loss.samples import Samples
from qtarget_megatron.loss.second_model import SecondModel, TeacherLogits
from qtarget_megatron.loss.sparse_teacher import SparseTeacher
from qtarget_megatron.objectives import Objective
from qtarget_megatron.statistics import IGNORE_INDEX, TokenStatistics, VocabularyShard


@overload
def qtarget_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    teacher_logits: Tensor | None = None,
    sparse_teacher: SparseTeacher | None = None,
    token_inputs: Mapping[str, Tensor] | None = None,
    samples: Samples | None = None,
    group: collectives.Group = None,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    inplace: bool = False,
    backend: str = "auto",
    return_statistics: Literal[False] = False,
) -> Tensor: ...


@overload
def qtarget_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    teacher_logits: Tensor | None = None,
    sparse_teacher: SparseTeacher | None = None,
    token_inputs: Mapping[str, Tensor] | None = None,
    samples: Samples | None = None,
    group: collectives.Group = None,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    inplace: bool = False,
    backend: str = "auto",
    return_statistics: Literal[True],
) -> tuple[Tensor, TokenStatistics]: ...


def qtarget_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    teacher_logits: Tensor | None = None,
    sparse_teacher: SparseTeacher | None = None,
    token_inputs: Mapping[str, Tensor] | None = None,
    samples: Samples | None = None,
    group: collectives.Group = None,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    inplace: bool = False,
    backend: str = "auto",
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """Per-token loss of an objective, for logits sharded over the vocabulary.

        loss_t = CE(Q_t, p_t) for target objectives, in nats;  d loss_t / d z_k = M p_k - c_y [k = y] - sum_i c_i r_ik,
        and with a divergence of mass d from r_1:  + d p_k (h_k - sum_j p_j h_j)

    Args:
        logits: ``[..., V_local]`` float32, bfloat16 or float16 (float64 with the reference backend), this rank's shard:
            columns ``rank * V_local`` onwards of the padded vocabulary.
        labels: ``[...]`` int64 global token ids; ignore_index marks tokens without supervision.
        objective: from qtarget_megatron.objectives.
        teacher_logits: ``[..., V_local]``, sharded like logits; never receives a gradient. Read only by objectives with
            a residual b != 0.
        sparse_teacher: in its place, the largest probabilities of the second model, ``[..., K]``: see SparseTeacher.
        token_inputs: per-token side inputs, each ``[...]`` and the same on every rank; those that the objective does
            not name are not read.
        samples: which tokens belong to one sample, see Samples; read only by objectives with a sample_mean.
        group: tensor-parallel process group; None where the vocabulary is not sharded.
        vocab_size: true vocabulary; columns from it on are padding: no mass, zero gradient. Default: all columns.
        ignore_index: label without supervision: loss 0 and gradient exactly 0, whatever the logits hold (NaN too).
        inplace: True lets backward overwrite the logits with their gradient (saves one logits-sized tensor).
        backend: "auto", "reference" (PyTorch), "cpp" (native, CPU) or "cuda" (native, GPU).
        return_statistics: also return the merged TokenStatistics, each field shaped like labels.

    Returns:
        float32 loss per token (float64 for float64 logits), shape of labels; bitwise equal on every rank of the group.

    Collectives: one all-gather over ``group`` per call, none in backward. Its payload is objective.request.width
    float32 per token and rank (float64 for float64 logits): 4, and 3 or 4 for each residual, which is 16 to 48 bytes,
    and what the objective requests besides (k for the k largest logits); twice that with a sparse teacher. A divergence
    other than the reverse KL has a second one, of 2 numbers, after a second pass over the logits. A sample_mean has one
    over the group of samples.

    Raises ValueError for a missing teacher or token input and for mismatched shapes; on CPU tensors also for a label
    outside of the vocabulary and for a token input that is not finite or out of its range (on the GPU, where the check
    would wait for the device, the loss is NaN or follows the value). A NaN or +inf logit makes that token's loss NaN;
    so does a teacher row that is -inf throughout.

    Limits: its checks read values and its kernels are native, so that torch.func (grad, vjp, vmap) does not go through
    it, nor torch.compile(fullgraph=True). Use torch.autograd; torch.compile without fullgraph runs it as it is, between
    what is compiled.
    """
    local_vocab = _check_shapes(logits, labels, teacher_logits, sparse_teacher, objective)
    vocab_size = true_vocab_size(vocab_size, local_vocab, collectives.size(group))
    kernel = kernels.select(backend, logits)
    supervised = supervised_tokens(kernel, labels, vocab_size, ignore_index)
    inputs = flat_inputs(objective, token_inputs, labels, supervised)
    samples = check_samples(objective, samples, labels)

    spec = _Spec(
        backend=kernel,
        objective=objective,
        inputs=inputs,
        samples=None if samples is None else samples.rows(slice(None)),
        supervised=supervised.reshape(-1),
        second=second_model.of_rows(objective, teacher_logits, sparse_teacher),
        vocab_size=vocab_size,
        group=group,
        shard=VocabularyShard.of_rank(collectives.rank(group), local_vocab, vocab_size, ignore_index),
        inplace=inplace,
    )
    rows, row_labels = logits, labels
    if logits.dim() != 2:  # else autograd's nodes of the two views would be for nothing
        rows, row_labels = logits.reshape(-1, local_vocab), labels.reshape(-1)
    loss: Tensor = _QTargetCrossEntropy.apply(rows, row_labels, spec)  # type: ignore[no-untyped-call]  # in torch
    if logits.dim() != 2:
        loss = loss.reshape(labels.shape)
    if not return_statistics:
        return loss
    assert spec.statistics is not None  # of the forward that has run
    return loss, spec.statistics.reshaped(labels.shape)


@dataclass(slots=True)
class _Spec:
    """What forward and backward share besides tensors."""

    backend: Backend
    objective: Objective
    inputs: Mapping[str, Tensor]
    samples: Samples | None
    supervised: Tensor
    second: SecondModel
    vocab_size: int
    group: collectives.Group
    shard: VocabularyShard
    inplace: bool
    statistics: TokenStatistics | None = None


class _QTargetCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, spec: _Spec) -> Tensor:
        logits = second_model.unit_stride(logits)
        labels = labels.contiguous()
        request, second = spec.objective.request, spec.second
        partials = second.partial_statistics(spec.backend, logits, labels, request=request, shard=spec.shard)
        spec.statistics, ctx.shift = second.merge(
            spec.backend,
            collectives.gather_partials(partials, spec.group),
            labels,
            spec.supervised,
            request=request,
            vocab_size=spec.vocab_size,
        )
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if request.second_pass:
            of_tokens = DivergencePass.of(spec.statistics, work)
            sums = second.divergence_sums(
                spec.backend,
                logits,
                labels,
                request=request,
                shift=ctx.shift,
                shard=spec.shard,
                maxima=of_tokens.maxima,
                scales=of_tokens.scales,
            )
            add_divergence(spec.statistics, collectives.gather_partials(sums, spec.group))
        loss, ctx.token_gradient = evaluate(
            spec.backend, spec.objective, spec.statistics, spec.inputs, work, spec.samples
        )
        ctx.spec, ctx.consumed = spec, False
        # Saved, so that autograd notices a teacher that was overwritten in between.
        ctx.save_for_backward(logits, labels, second.logits if isinstance(second, TeacherLogits) else None)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("qtarget_cross_entropy")
        spec: _Spec = ctx.spec
        if spec.inplace:
            if ctx.consumed:
                raise RuntimeError(
                    "backward ran twice through qtarget_cross_entropy(inplace=True), whose logits the first run has "
                    "overwritten: use inplace=False with retain_graph=True"
                )
            ctx.consumed = True
        logits, labels, teacher_logits = ctx.saved_tensors
        second = spec.second if teacher_logits is None else TeacherLogits(teacher_logits)
        out = logits if spec.inplace else torch.empty_like(logits)
        second.logit_gradient(
            spec.backend,
            logits,
            labels,
            request=spec.objective.request,
            shift=ctx.shift,
            shard=spec.shard,
            **ctx.token_gradient.kernel_arguments(spec.backend, grad_loss),
            out=out,
        )
        if spec.inplace:
            # The native kernels write behind autograd's back: whoever saved the logits too must hear of it.
            torch.autograd.graph.increment_version(out)
        return out, None, None


def _check_shapes(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    sparse_teacher: SparseTeacher | None,
    objective: Objective,
) -> int:
    if not isinstance(objective, Objective):
        raise ValueError(f"objective must come from qtarget_megatron.objectives, got {type(objective).__name__}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 token ids, got {labels.dtype}")
    if logits.shape[:-1] != labels.shape or logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be [..., V_local] with labels [...], got logits {list(logits.shape)} and labels "
            f"{list(labels.shape)}"
        )
    second_model.check(objective, labels, {"teacher_logits": teacher_logits}, sparse_teacher)
    second_model.check_logits(teacher_logits, logits)
    return logits.shape[-1]
