"""What happens per token between the statistics and the gradient, whichever way the logits are made."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget_megatron.kernels.backend import Backend
from qtarget_megatron.loss.samples import Samples
from qtarget_megatron.objectives import Objective, check_token_input
from qtarget_megatron.statistics import Residuals, StatisticsRequest, TokenStatistics, kernel_coefficients

# Tokens whose logits exist at a time by default, on the CPU.
CHUNK_SIZE = 512
_REAL_DTYPES = {
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


@dataclass(frozen=True)
class TokenGradient:
    """What the gradient kernel needs of each token besides its logits: maxima, and masses over sums; see
    Backend.weigh.

    maxima: [1 + R, N], of z and of each residual's u. scales: [2 + R, N], of exp(z - max), of the label, and of each
    residual's exp(u - max). With a divergence there are two and one more.
    """

    maxima: Tensor
    scales: Tensor

    def kernel_arguments(self, kernel: Backend, upstream: Tensor) -> dict[str, Tensor]:
        """Keywords of logit_gradient, for the upstream gradient [N] of each token's loss, in its dtype."""
        return dict(maxima=self.maxima.contiguous(), scales=kernel.chain(self.scales, upstream))

    def rows(self, chunk: slice) -> TokenGradient:
        """The numbers of a run of tokens."""
        return TokenGradient(self.maxima[:, chunk], self.scales[:, chunk])


def merge(
    kernel: Backend,
    partials: Tensor,
    supervised: Tensor,
    request: StatisticsRequest,
    coefficients: Residuals | None = None,
) -> TokenStatistics:
    """Merge the partials of all ranks into statistics over the whole vocabulary.

    Args:
        partials: ``[T, N, request.width]``, one slice per tensor-parallel rank, in rank order.
        supervised: ``[N]`` bool; the partials of the other tokens are 0, as the kernels write them, and so are their
            statistics.
        request: what the partials hold.
        coefficients: of the residuals as the kernels read them; by default those of the partials' dtype.

    A shard without any finite column has m = -inf and contributes nothing. A NaN anywhere stays NaN.
    """
    coefficients = coefficients or kernel_coefficients(request.residuals, partials.dtype)
    rows = torch.empty(request.evaluated_rows, partials.shape[1], dtype=torch.float64, device=partials.device)
    kernel.merge(partials, supervised, request=request, residuals=_rounded(request.residuals, coefficients), out=rows)
    top_logits = None
    if request.top_k:
        top_logits = partials[..., request.columns.top].double().transpose(0, 1).flatten(1)
        if len(partials) > 1:
            top_logits = top_logits.topk(request.top_k, dim=-1).values
    return TokenStatistics(rows, supervised, request, top_logits)


@dataclass(frozen=True)
class DivergencePass:
    """What the second pass over the logits needs of each token: see Backend.divergence_sums.

    maxima: [3, N]. scales: [2, N]. Both in the work dtype.
    """

    maxima: Tensor
    scales: Tensor

    @classmethod
    def of(cls, stats: TokenStatistics, dtype: torch.dtype) -> DivergencePass:
        """From statistics over the whole vocabulary."""
        first = stats.residuals[0]
        offset = stats.sum_exp.log() - first.sum_exp.log()
        maxima = torch.stack([stats.max, first.max, offset]).to(dtype)
        return cls(maxima, torch.stack([stats.sum_exp, first.sum_exp]).reciprocal().to(dtype))

    def rows(self, chunk: slice) -> DivergencePass:
        """The numbers of a run of tokens."""
        return DivergencePass(self.maxima[:, chunk].contiguous(), self.scales[:, chunk].contiguous())


def add_divergence(stats: TokenStatistics, sums: Tensor) -> None:
    """Write the divergence and its slope into the statistics. sums: [T, N, 2], one slice per rank, in rank order."""
    slope, divergence = stats.slope, stats.divergence
    assert slope is not None and divergence is not None  # requested
    total = sums.double().sum(0)
    slope.copy_(total[:, 0])
    divergence.copy_(total[:, 1])


@functools.lru_cache
def _rounded(exact: Residuals, rounded: Residuals) -> tuple[tuple[float, float, float], ...]:
    """(a, b) of each residual as the kernels read them, and what turns the maximum of u into that of the exact ones,
    where u has one operand."""

    def factor(exact: tuple[float, float], rounded: tuple[float, float]) -> float:
        operands = [(c, r) for c, r in zip(exact, rounded, strict=True) if r != 0]
        return operands[0][0] / operands[0][1] if len(operands) == 1 else 1.0

    return tuple((*pair, factor(given, pair)) for given, pair in zip(exact, rounded, strict=True))


def evaluate(
    kernel: Backend,
    objective: Objective,
    stats: TokenStatistics,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    samples: Samples | None = None,
) -> tuple[Tensor, TokenGradient]:
    """Loss [N] in dtype, 0 where not supervised, and what the gradient needs; masses and trust enter stats.

    stats:   from merge.
    samples: of the tokens, where the objective asks for what is of a sample; see check_samples. Its collectives are
             theirs.
    """
    if objective.sample_mean is not None and samples is not None:
        values = objective.sample_mean(stats, inputs)
        stats.sample_mean, stats.sample_size = samples.means(_aligned(values, stats), stats.supervised)
    if objective.sample_after is not None and samples is not None:
        values = _aligned(objective.sample_after(stats, inputs), stats)
        stats.sample_after, stats.tokens_after = samples.after(values, stats.supervised, objective.sample_block)
    loss, label_mass, residual_masses = objective.evaluate(stats, inputs)
    divergences = 0 if objective.divergence is None else 1
    if len(residual_masses) != len(objective.residuals) + divergences:
        raise ValueError(
            f"objective {objective.name!r} has {len(objective.residuals)} residual(s) and {divergences} divergence(s) "
            f"but returned {len(residual_masses)} residual mass(es): return one for each"
        )

    if isinstance(loss, int | float):
        loss = torch.full_like(stats.p, loss)
    token_loss, maxima, scales = kernel.weigh(
        stats.rows,
        stats.supervised,
        request=objective.request,
        loss=None if loss is None else _aligned(loss, stats),
        label_mass=_mass(label_mass, stats),
        residual_masses=[_mass(mass, stats) for mass in residual_masses],
        guards=[value.contiguous() for value in inputs.values()],
        dtype=dtype,
    )
    stats.evaluated = True
    return token_loss, TokenGradient(maxima, scales)


def _mass(value: Tensor | float, stats: TokenStatistics) -> Tensor | float:
    return _aligned(value, stats) if isinstance(value, Tensor) else value


def _aligned(value: Tensor, stats: TokenStatistics) -> Tensor:
    """In the dtype and the shape of a statistic, contiguous."""
    if value.dtype != stats.p.dtype or value.shape != stats.p.shape:
        value = value.to(stats.p).expand_as(stats.p)
    return value.contiguous()


def supervised_tokens(kernel: Backend, labels: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    """[...] bool, which labels are not ignore_index. ValueError on the CPU for one outside of the vocabulary; elsewhere
    the check would wait."""
    found, wrong = kernel.supervised(labels.contiguous(), vocab_size=vocab_size, ignore_index=ignore_index)
    if wrong >= 0:
        raise ValueError(
            f"labels must be in 0..{vocab_size - 1} or ignore_index={ignore_index}, got "
            f"{int(labels.reshape(-1)[wrong])} at flat position {wrong}: check the tokenizer and the padding"
        )
    return found


def true_vocab_size(vocab_size: int | None, local_vocab: int, world_size: int) -> int:
    """vocab_size, by default all columns of all ranks; ValueError where it is not in 1 to that."""
    padded_vocab = local_vocab * world_size
    vocab_size = padded_vocab if vocab_size is None else vocab_size
    if not 0 < vocab_size <= padded_vocab:
        raise ValueError(
            f"vocab_size must be in 1..{padded_vocab} ({local_vocab} columns on {world_size} rank(s)), got {vocab_size}"
        )
    return vocab_size


def flat_inputs(
    objective: Objective, token_inputs: Mapping[str, Tensor] | None, labels: Tensor, supervised: Tensor
) -> dict[str, Tensor]:
    """The objective's token inputs as float64 [N]; ValueError where one is missing, misshapen or out of range."""
    given = token_inputs or {}
    inputs = {}
    for name in objective.token_inputs:
        if name not in given:
            raise ValueError(f"objective {objective} needs token_inputs[{name!r}], got {sorted(given) or 'none'}")
        value = given[name]
        if value.shape != labels.shape or value.device != labels.device:
            raise ValueError(
                f"token_inputs[{name!r}] must be {list(labels.shape)} on {labels.device} like labels, got "
                f"{list(value.shape)} on {value.device}"
            )
        if value.dtype not in _REAL_DTYPES:
            raise ValueError(f"token_inputs[{name!r}] must hold real numbers, got {value.dtype}: convert it to float32")
        value = value.detach()
        if value.device.type == "cpu":
            check_token_input(name, value[supervised])
        inputs[name] = value.reshape(-1).double()
    return inputs


def check_samples(objective: Objective, samples: Samples | None, labels: Tensor) -> Samples | None:
    """The samples, where the objective asks for them. ValueError where they are missing or of other tokens."""
    if not objective.needs_samples:
        return None
    if samples is None:
        raise ValueError(f"objective {objective} takes means over samples: pass samples, the sample of each token")
    samples.check_fits(labels)
    return samples


def refuse_second_derivative(name: str) -> None:
    """Raise RuntimeError in a backward that is recorded itself."""
    # once_differentiable would not do: it lets create_graph=True pass where the upstream gradient is a constant.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative, its targets are detached: run backward without create_graph=True"
        )
