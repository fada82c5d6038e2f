"""What happens per token between the statistics and the gradient, whichever way the logits are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from qtarget_megatron.objectives import Objective, check_token_input
from qtarget_megatron.statistics import TokenStatistics

_REAL_DTYPES = {
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


@dataclass(frozen=True)
class TokenGradient:
    """What the gradient kernel needs of each token besides its logits: maxima, and masses over sums; as of
    kernels.reference.weigh.

    maxima: [1 + R, N], of z and of each residual's u. scales: [2 + R, N], of exp(z - max), of the label, and of each
    residual's exp(u - max).
    """

    maxima: Tensor
    scales: Tensor

    def kernel_arguments(self, kernel: ModuleType, upstream: Tensor) -> dict[str, Tensor]:
        """Keywords of logit_gradient, for the upstream gradient [N] of each token's loss, in its dtype.

        kernel: a backend's module.
        """
        return dict(maxima=self.maxima.contiguous(), scales=kernel.chain(self.scales, upstream))

    def rows(self, chunk: slice) -> TokenGradient:
        """The numbers of a run of tokens."""
        return TokenGradient(self.maxima[:, chunk], self.scales[:, chunk])


def evaluate(
    kernel: ModuleType,
    objective: Objective,
    stats: TokenStatistics,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, TokenGradient]:
    """Loss [N] in dtype, 0 where not supervised, and what the gradient needs; masses and trust enter stats.

    kernel: a backend's module. stats: from statistics.merge.
    """
    loss, label_mass, residual_masses = objective.evaluate(stats, inputs)
    if len(residual_masses) != len(objective.residuals):
        raise ValueError(
            f"objective {objective.name!r} has {len(objective.residuals)} residual(s) but returned "
            f"{len(residual_masses)} residual mass(es): return one for each"
        )

    def per_token(value) -> Tensor | float | None:
        if not isinstance(value, Tensor):
            return value
        if value.dtype != stats.p.dtype or value.shape != stats.p.shape:
            value = value.to(stats.p).expand_as(stats.p)
        return value.contiguous()

    loss, maxima, scales = kernel.weigh(
        stats.rows,
        stats.supervised,
        request=objective.request,
        loss=per_token(torch.full_like(stats.p, loss) if isinstance(loss, int | float) else loss),
        label_mass=per_token(label_mass),
        residual_masses=[per_token(mass) for mass in residual_masses],
        guards=[value.contiguous() for value in inputs.values()],
        dtype=dtype,
    )
    stats.evaluated = True
    return loss, TokenGradient(maxima, scales)


def supervised_tokens(kernel: ModuleType, labels: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    """[...] bool, which labels are not ignore_index. ValueError on the CPU for one outside of the vocabulary; elsewhere
    the check would wait.

    kernel: a backend's module.
    """
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


def vocabulary_shard(rank: int, local_vocab: int, vocab_size: int, ignore_index: int) -> dict[str, int]:
    """Keywords of both kernels that say which columns of the vocabulary a rank has."""
    start = rank * local_vocab
    return dict(
        vocab_start=start, valid_columns=min(max(vocab_size - start, 0), local_vocab), ignore_index=ignore_index
    )


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


def refuse_second_derivative(name: str) -> None:
    """Raise RuntimeError in a backward that is recorded itself."""
    # once_differentiable would not do: it lets create_graph=True pass where the upstream gradient is a constant.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative, its targets are detached: run backward without create_graph=True"
        )
