"""The Q-target cross-entropy from hidden states: output layer and loss in one, logits of a chunk of tokens at a time.

forward:  for each chunk, logits = hidden @ weight^T -> statistics; one all-gather for all tokens; objective
backward: for each chunk, logits once more -> their gradient in place -> dHidden and dWeight; one reduction of dHidden

The logits of student and teacher never exist as [N, V_local]. The price is one matrix product more (four, not three),
except for the last chunk: its logits lie in the one buffer that both passes use, and backward begins with them.
A divergence other than the reverse KL has a second pass in forward, and with it one product and one all-gather more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, overload

import torch
from torch import Tensor

from qtarget_megatron import collectives, kernels
from qtarget_megatron.kernels.backend import Backend
from qtarget_megatron.loss import second_model
from qtarget_megatron.loss.per_token import (
    CHUNK_SIZE,
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
from qtarget_megatron.loss.sparse_teacher import KeptEntries, SparseTeacher
from qtarget_megatron.objectives import Objective
from qtarget_megatron.objectives.registry import in_range
from qtarget_megatron.statistics import IGNORE_INDEX, TokenStatistics, VocabularyShard

AUTO: Final = "auto"
# Tokens of a chunk by default, where it is not CHUNK_SIZE. On a GPU the gradient of the weight is read and written once
# a chunk, which is to be little beside the matrix products (by their sizes; not measured).
_CHUNK_SIZES = {"cuda": 2048}
# Columns of the weight's gradient that one product of 16-bit matrices makes before it is added up in float32.
COLUMN_TILE = 8192


@overload
def qtarget_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    sparse_teacher: SparseTeacher | None = None,
    token_inputs: Mapping[str, Tensor] | None = None,
    samples: Samples | None = None,
    group: collectives.Group = None,
    vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    sequence_parallel: bool = False,
    num_supervised: int | None = None,
    chunk_size: int | Literal["auto"] = AUTO,
    backend: str = "auto",
    return_statistics: Literal[False] = False,
) -> Tensor: ...


@overload
def qtarget_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    sparse_teacher: SparseTeacher | None = None,
    token_inputs: Mapping[str, Tensor] | None = None,
    samples: Samples | None = None,
    group: collectives.Group = None,
    vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    sequence_parallel: bool = False,
    num_supervised: int | None = None,
    chunk_size: int | Literal["auto"] = AUTO,
    backend: str = "auto",
    return_statistics: Literal[True],
) -> tuple[Tensor, TokenStatistics]: ...


def qtarget_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    sparse_teacher: SparseTeacher | None = None,
    token_inputs: Mapping[str, Tensor] | None = None,
    samples: Samples | None = None,
    group: collectives.Group = None,
    vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    sequence_parallel: bool = False,
    num_supervised: int | None = None,
    chunk_size: int | Literal["auto"] = AUTO,
    backend: str = "auto",
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """qtarget_cross_entropy(logit_scale * hidden @ weight^T, labels, teacher_logits=teacher_hidden @ teacher_weight^T,
    ...).

    Args:
        hidden: ``[..., H]`` float32, bfloat16 or float16, the same on every rank; with sequence_parallel this rank's
            ``[s/T, ..., H]`` of ``[s, ..., H]``.
        weight: ``[V_local, H]``, dtype of hidden: this rank's rows of the output layer (or of the tied embedding).
        labels: ``[...]`` int64, always of the whole sequence. Only supervised tokens get logits at all.
        teacher_hidden, teacher_weight: the same of the second model, of any width; no gradient.
        sparse_teacher: in their place, its largest probabilities, ``[..., K]`` of the whole sequence.
        teacher_vocab_size: columns from it on have no mass under the second model (its true vocabulary, where it is the
            smaller one). Default: all that vocab_size leaves.
        logit_scale: of the first model's logits, not of the teacher's. A finite number above 0.
        sequence_parallel: hidden and teacher_hidden are sharded over group along their first dimension.
        num_supervised: how many labels are not ignore_index, where the host knows it: then it does not wait for a GPU.
        chunk_size: tokens whose logits exist at a time. "auto": 512, on a GPU 2048.
        others: as in qtarget_cross_entropy.

    Returns:
        float32 loss per token (float64 for float64 hidden), shape of labels; bitwise equal on every rank of the group.

    The gradient of the weight is added up in float32 (on the CPU each chunk's product is rounded to the weight's dtype
    before that, on a GPU none is where torch can add it up so). Where the weight has Megatron's main_grad, it is added
    to that, and grad_added_to_main_grad is set, as Megatron's fused accumulation does.

    Memory: the gradients, chunk_size rows of student and teacher logits (from forward to backward), and O(N H).
    Collectives over group: the all-gather of the statistics, as in qtarget_cross_entropy, and in backward one
    all-reduce of dHidden [n, H] for the n supervised tokens; with sequence_parallel instead one all-gather of hidden
    (and of teacher_hidden) in forward and one reduce-scatter of dHidden in backward.

    Raises ValueError as qtarget_cross_entropy does, for a chunk_size below 1, for a logit_scale that is none, and on
    the CPU for a num_supervised that is not theirs.
    """
    if not isinstance(objective, Objective):
        raise ValueError(f"objective must come from qtarget_megatron.objectives, got {type(objective).__name__}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        if objective.needs_teacher and teacher_hidden is not None and teacher_weight is not None:
            teacher_hidden, teacher_weight = teacher_hidden.to(dtype), teacher_weight.to(dtype)
    given = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    second_model.check(objective, labels, given, sparse_teacher)
    chunk_size = tokens_at_a_time(chunk_size, device)
    if not objective.needs_teacher:
        teacher_hidden = teacher_weight = sparse_teacher = None
    _check(hidden, weight, labels, teacher_hidden, teacher_weight, group, sequence_parallel)
    in_range("logit_scale", logit_scale, 0, math.inf, open_low=True)
    if logit_scale != 1:
        hidden = hidden * logit_scale
    local_vocab = weight.shape[0]
    vocab_size = true_vocab_size(vocab_size, local_vocab, collectives.size(group))
    if teacher_hidden is not None and teacher_vocab_size is not None:
        second_model.check_vocabulary(objective, teacher_vocab_size, vocab_size)
    kernel = kernels.select(backend, hidden)
    supervised = supervised_tokens(kernel, labels, vocab_size, ignore_index)
    inputs = flat_inputs(objective, token_inputs, labels, supervised)
    samples = check_samples(objective, samples, labels)
    rows = _kept_rows(supervised.reshape(-1), num_supervised)

    spec = _Spec(
        backend=kernel,
        objective=objective,
        inputs={name: values[rows] for name, values in inputs.items()},
        samples=None if samples is None else samples.rows(rows),
        group=group,
        kept_entries=None if sparse_teacher is None else KeptEntries(sparse_teacher.rows(rows)),
        vocab_size=vocab_size,
        teacher_columns=None
        if teacher_vocab_size is None
        else min(max(teacher_vocab_size - collectives.rank(group) * local_vocab, 0), local_vocab),
        shard=VocabularyShard.of_rank(collectives.rank(group), local_vocab, vocab_size, ignore_index),
        rows=rows,
        num_tokens=labels.numel(),
        sequence_parallel=sequence_parallel,
        chunk_size=chunk_size,
    )
    if teacher_hidden is not None and teacher_weight is not None:
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    loss: Tensor = _QTargetLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]  # in torch
        hidden, weight, teacher_hidden, teacher_weight, labels.reshape(-1)[rows].contiguous(), spec
    )
    loss = loss.reshape(labels.shape)
    if not return_statistics:
        return loss
    assert spec.statistics is not None  # of the forward that has run
    return loss, spec.statistics.scattered(rows, supervised.reshape(-1)).reshaped(labels.shape)


@dataclass
class _Spec:
    """What forward and backward share besides tensors.

    rows: flat positions of the supervised tokens. teacher_columns: of the shard, that the second model knows.
    """

    backend: Backend
    objective: Objective
    inputs: Mapping[str, Tensor]
    samples: Samples | None
    group: collectives.Group
    kept_entries: KeptEntries | None
    vocab_size: int
    teacher_columns: int | None
    shard: VocabularyShard
    rows: Tensor
    num_tokens: int
    sequence_parallel: bool
    chunk_size: int
    statistics: TokenStatistics | None = None

    def select(self, hidden: Tensor) -> Tensor:
        """Hidden states of the supervised tokens, [n, H]."""
        whole = collectives.gather_sequence(hidden, self.group) if self.sequence_parallel else hidden
        return whole.reshape(-1, hidden.shape[-1])[self.rows]

    @property
    def second(self) -> SecondModel:
        """What merges its statistics: the kept entries of all supervised tokens, or nothing."""
        return second_model.NO_SECOND_MODEL if self.kept_entries is None else self.kept_entries

    def chunks(self) -> list[slice]:
        starts = range(0, len(self.rows), self.chunk_size)
        return [slice(start, min(start + self.chunk_size, len(self.rows))) for start in starts]


class _Logits:
    """Logits of both models for a chunk of the supervised tokens, in the same memory for each chunk."""

    def __init__(self, spec: _Spec):
        self._spec = spec
        self._student: Tensor | None = None
        self._teacher: Tensor | None = None
        self._computed: slice | None = None

    def chunk(
        self,
        rows: slice,
        student_hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
    ) -> tuple[Tensor, SecondModel]:
        """Logits of the student, and the second model, at these rows of the supervised tokens' hidden states [n, H]."""
        spec = self._spec
        if self._student is None:
            shape = min(spec.chunk_size, len(student_hidden)), len(weight)
            self._student = student_hidden.new_empty(shape)
            self._teacher = None if teacher_hidden is None else teacher_hidden.new_empty(shape)
        count = slice(rows.stop - rows.start)
        logits, teacher = self._student[count], None if self._teacher is None else self._teacher[count]
        if rows != self._computed:
            torch.mm(student_hidden[rows], weight.t(), out=logits)
            if teacher is not None and teacher_hidden is not None and teacher_weight is not None:
                torch.mm(teacher_hidden[rows], teacher_weight.t(), out=teacher)
                if spec.teacher_columns is not None:
                    teacher[:, spec.teacher_columns :] = -torch.inf
            self._computed = rows
        return logits, TeacherLogits(teacher) if spec.kept_entries is None else spec.kept_entries.rows(rows)

    def invalidate(self) -> None:
        """Mark the buffer as overwritten; the next chunk() recomputes the logits."""
        self._computed = None

    def release(self) -> None:
        """Give the memory back; the next chunk() takes it again."""
        self._student = self._teacher = self._computed = None


class _QTargetLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        labels: Tensor,
        spec: _Spec,
    ) -> Tensor:
        supervised_hidden = spec.select(hidden)
        supervised_teacher = None if teacher_hidden is None else spec.select(teacher_hidden)
        request, whole = spec.objective.request, spec.second
        work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Without a supervised token there is no chunk.
        partials = [torch.empty(0, whole.width(request), dtype=work, device=hidden.device)] if len(labels) == 0 else []
        logits, chunks = _Logits(spec), spec.chunks()
        for chunk in chunks:
            student, second = logits.chunk(
                chunk, supervised_hidden, weight.detach(), supervised_teacher, teacher_weight
            )
            part = second.partial_statistics(
                spec.backend, student, labels[chunk], request=request, shard=spec.shard, scratch=True
            )
            partials.append(part)
            if second.overwrites_logits:
                logits.invalidate()
        spec.statistics, ctx.shift = whole.merge(
            spec.backend,
            collectives.gather_partials(partials[0] if len(partials) == 1 else torch.cat(partials), spec.group),
            labels,
            labels != spec.shard.ignore_index,
            request=request,
            vocab_size=spec.vocab_size,
        )
        ctx.order = chunks
        if request.second_pass:
            # From the chunk whose logits are still there; backward then begins at the other end.
            ctx.order = chunks[::-1]
            of_tokens = DivergencePass.of(spec.statistics, work)
            sums = torch.zeros(len(labels), 2, dtype=work, device=hidden.device)
            for chunk in reversed(chunks):
                student, second = logits.chunk(
                    chunk, supervised_hidden, weight.detach(), supervised_teacher, teacher_weight
                )
                of_chunk = of_tokens.rows(chunk)
                sums[chunk] = second.divergence_sums(
                    spec.backend,
                    student,
                    labels[chunk],
                    request=request,
                    shift=None if ctx.shift is None else ctx.shift[:, chunk],
                    shard=spec.shard,
                    maxima=of_chunk.maxima,
                    scales=of_chunk.scales,
                )
            add_divergence(spec.statistics, collectives.gather_partials(sums, spec.group))
        supervised_loss, ctx.token_gradient = evaluate(
            spec.backend, spec.objective, spec.statistics, spec.inputs, work, spec.samples
        )
        ctx.spec, ctx.hidden_shape = spec, hidden.shape
        # The parameter itself: main_grad is an attribute of that object.
        ctx.weight = weight
        ctx.logits = logits if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(supervised_hidden, supervised_teacher, teacher_weight, labels)
        return supervised_loss.new_zeros(spec.num_tokens).index_copy_(0, spec.rows, supervised_loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("qtarget_linear_cross_entropy")
        spec: _Spec = ctx.spec
        logits: _Logits = ctx.logits
        weight = ctx.weight.detach()
        supervised_hidden, supervised_teacher, teacher_weight, labels = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        upstream = grad_loss[spec.rows]
        student_gradient: Tensor | None = torch.empty_like(supervised_hidden) if wants_hidden else None
        weight_sum = _WeightGradient(ctx.weight) if wants_weight else None
        gradient: Tensor | None = None
        second: SecondModel | None = None
        # From the last one of forward, whose logits are still there.
        for chunk in reversed(ctx.order):
            gradient, second = logits.chunk(chunk, supervised_hidden, weight, supervised_teacher, teacher_weight)
            logits.invalidate()
            second.logit_gradient(
                spec.backend,
                gradient,
                labels[chunk],
                request=spec.objective.request,
                shift=None if ctx.shift is None else ctx.shift[:, chunk],
                shard=spec.shard,
                **ctx.token_gradient.rows(chunk).kernel_arguments(spec.backend, upstream[chunk]),
                out=gradient,
            )
            if student_gradient is not None:
                torch.mm(gradient, weight, out=student_gradient[chunk])
            if weight_sum is not None:
                weight_sum.add(gradient, supervised_hidden[chunk])
        gradient = second = None
        logits.release()
        hidden_gradient = (
            None if student_gradient is None else _whole_gradient(student_gradient, spec, ctx.hidden_shape)
        )
        return hidden_gradient, None if weight_sum is None else weight_sum.finish(), None, None, None, None


class _WeightGradient:
    """Adds up dWeight = sum over chunks of dLogits^T hidden in float32 (float64 for float64), in main_grad if set."""

    def __init__(self, weight: Tensor):
        self._weight = weight
        self._main_grad: Tensor | None = getattr(weight, "main_grad", None)
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        self._sum: Tensor
        if self._main_grad is not None and self._main_grad.dtype == wide:
            self._sum, self._is_empty = self._main_grad, False
        else:
            self._sum, self._is_empty = torch.empty_like(weight, dtype=wide), True

    def add(self, logit_gradient: Tensor, hidden: Tensor) -> None:
        beta = 0 if self._is_empty else 1
        if hidden.dtype == self._sum.dtype:
            torch.addmm(self._sum, logit_gradient.t(), hidden, beta=beta, out=self._sum)
        elif hidden.device.type == "cuda" and _adds_up_wide(hidden.device, hidden.dtype):
            # One product, never rounded to 16 bits, for one pass over the sum.
            torch.addmm(self._sum, logit_gradient.t(), hidden, out_dtype=self._sum.dtype, beta=beta, out=self._sum)
        else:
            for start in range(0, self._sum.shape[0], COLUMN_TILE):
                tile = slice(start, start + COLUMN_TILE)
                product = logit_gradient[:, tile].t() @ hidden
                self._sum[tile].copy_(product) if self._is_empty else self._sum[tile].add_(product)
        self._is_empty = False

    def finish(self) -> Tensor:
        """What autograd gets: the gradient, or in its place, where main_grad has it, a tensor that nobody adds."""
        weight = self._weight
        if self._is_empty:  # not one supervised token
            self._sum.zero_()
        if self._main_grad is None:
            return self._sum.to(weight.dtype)
        if self._sum is not self._main_grad:
            self._main_grad += self._sum
        # An attribute that Megatron's hook looks for.
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # Megatron's hook adds this to main_grad after all where an embedding shares the weight.
        return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


@functools.cache
def _adds_up_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of 16-bit matrices to a float32 one there; it depends on its version."""
    total, matrix = torch.ones(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, matrix, matrix, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def tokens_at_a_time(chunk_size: int | Literal["auto"], device: str) -> int:
    """A chunk's number of tokens on a type of device. ValueError for one that is none."""
    if chunk_size == AUTO:
        return _CHUNK_SIZES.get(device, CHUNK_SIZE)
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size must be 'auto' or a number of tokens, 1 or more, got {chunk_size!r}")
    return chunk_size


def _whole_gradient(student_gradient: Tensor, spec: _Spec, shape: torch.Size) -> Tensor:
    """dHidden in the shape of hidden, summed over the ranks' vocabulary shards; 0 where not supervised."""

    def whole(rows: Tensor) -> Tensor:
        gradient = rows.new_zeros(spec.num_tokens, shape[-1])
        gradient[spec.rows] = rows
        return gradient

    if spec.sequence_parallel:
        sequence = whole(student_gradient).reshape(-1, *shape[1:])
        return collectives.scatter_sequence_sum(sequence, spec.group)
    return whole(collectives.sum_in_place(student_gradient, spec.group)).reshape(shape)


def _kept_rows(supervised: Tensor, count: int | None) -> Tensor:
    """Flat positions of the supervised tokens; of all tokens in a CUDA graph, which cannot depend on the data."""
    if supervised.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return torch.arange(supervised.numel(), device=supervised.device)
        if count is not None:
            return torch.nonzero_static(supervised, size=count).squeeze(1)
    rows = supervised.nonzero().squeeze(1)
    if count is not None and count != len(rows):
        raise ValueError(
            f"num_supervised: expected the number of labels that are not ignore_index, {len(rows)}, got {count}"
        )
    return rows


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    group: collectives.Group,
    sequence_parallel: bool,
) -> None:
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 token ids, got {labels.dtype}")
    _check_pair("hidden", hidden, "weight", weight, labels, group, sequence_parallel)
    if teacher_hidden is None or teacher_weight is None:
        return
    _check_pair("teacher_hidden", teacher_hidden, "teacher_weight", teacher_weight, labels, group, sequence_parallel)
    if teacher_weight.shape[0] != weight.shape[0] or teacher_weight.device != weight.device:
        raise ValueError(
            f"teacher_weight must have the {weight.shape[0]} rows of weight on {weight.device}, got "
            f"{teacher_weight.shape[0]} on {teacher_weight.device}"
        )


def _check_pair(
    hidden_name: str,
    hidden: Tensor,
    weight_name: str,
    weight: Tensor,
    labels: Tensor,
    group: collectives.Group,
    sequence_parallel: bool,
) -> None:
    if weight.dim() != 2 or weight.shape[0] == 0 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} must be [..., H] and {weight_name} [V_local, H], got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{hidden_name} and {weight_name} must have one dtype, got {hidden.dtype} and {weight.dtype}")
    expected = list(labels.shape)
    if sequence_parallel:
        if not expected or expected[0] % collectives.size(group):
            raise ValueError(
                f"sequence_parallel cuts the first dimension of labels into {collectives.size(group)} equal parts, got "
                f"labels {expected}"
            )
        expected[0] //= collectives.size(group)
    if list(hidden.shape[:-1]) != expected:
        raise ValueError(
            f"{hidden_name} must be {expected} and H, as labels {list(labels.shape)} ask, got {list(hidden.shape)}"
        )
