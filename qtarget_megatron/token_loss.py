"""What happens per token between the statistics and the gradient, whichever way the logits are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

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
    """What the gradient kernel needs of each token besides its logits, float64: maxima, and masses over sums.

    exp(z - max) * (mass / sum_exp), not exp(z - lse): an order of magnitude less rounding error.

    maxima: [1 + R, N], of z and of each residual's u. scales: [2 + R, N], of exp(z - max), of the label, and of each
    residual's exp(u - max).
    """

    maxima: Tensor
    scales: Tensor

    @classmethod
    def of(cls, stats: TokenStatistics, residual_masses: list[Tensor]) -> TokenGradient:
        of_residuals = [mass / r.sum_exp for mass, r in zip(residual_masses, stats.residuals, strict=True)]
        return cls(
            maxima=torch.stack([stats.max, *(r.max for r in stats.residuals)]),
            scales=torch.stack([stats.total_mass / stats.sum_exp, stats.label_mass, *of_residuals]),
        )

    def kernel_arguments(self, upstream: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Keywords of logit_gradient in dtype, for the upstream gradient [N] of each token's loss."""
        upstream = upstream.double()
        # A token masked out downstream has upstream exactly 0: its NaN must not leak.
        scales = (self.scales * upstream).masked_fill(upstream == 0, 0.0).to(dtype).contiguous()
        maxima = self.maxima.to(dtype).contiguous()
        return dict(
            max_=maxima[0],
            scale=scales[0],
            label_scale=scales[1],
            residual_max=maxima[1:],
            residual_scale=scales[2:],
        )

    def rows(self, chunk: slice) -> TokenGradient:
        """Of a run of tokens."""
        return TokenGradient(self.maxima[:, chunk], self.scales[:, chunk])


def evaluate(
    objective: Objective, stats: TokenStatistics, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, TokenGradient]:
    """Loss [N] in float64, 0 where not supervised, and what the gradient needs; masses and trust enter stats."""
    loss, label_mass, residual_masses = objective.evaluate(stats, inputs)
    ignored = ~stats.supervised

    def per_token(value) -> Tensor:
        if not isinstance(value, Tensor):
            value = torch.full_like(stats.p, value)
        return value.to(stats.p).expand_as(ignored).masked_fill(ignored, 0.0)

    if len(residual_masses) != len(objective.residuals):
        raise ValueError(
            f"objective {objective.name!r} has {len(objective.residuals)} residual(s) but returned "
            f"{len(residual_masses)} residual mass(es): return one for each"
        )
    residual_masses = [per_token(mass) for mass in residual_masses]
    stats.label_mass = per_token(label_mass)
    stats.residual_mass = sum(residual_masses[1:], residual_masses[0]) if residual_masses else per_token(0.0)
    stats.trust = per_token(stats.label_mass / stats.total_mass)
    # A NaN statistic must reach the loss even where an objective's own guards would hide it.
    for statistic in (stats.log_p, *(residual.mean_logit for residual in stats.residuals), *inputs.values()):
        loss = torch.where(statistic == statistic, loss, statistic)
    return per_token(loss), TokenGradient.of(stats, residual_masses)


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """ValueError for a label outside of the vocabulary; on the CPU only, elsewhere the check would wait."""
    if labels.device.type != "cpu":
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if wrong.any():
        first = int(wrong.reshape(-1).nonzero()[0])
        raise ValueError(
            f"labels must be in 0..{vocab_size - 1} or ignore_index={ignore_index}, got "
            f"{int(labels.reshape(-1)[first])} at flat position {first}: check the tokenizer and the padding"
        )


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


def reshaped(stats: TokenStatistics, shape: torch.Size) -> TokenStatistics:
    """The statistics with every [N, ...] tensor as [*shape, ...]."""
    return _mapped(stats, lambda name, value: value.reshape(*shape, *value.shape[1:]))


def scattered(stats: TokenStatistics, rows: Tensor, num_tokens: int) -> TokenStatistics:
    """Statistics of the tokens at rows, as those of num_tokens tokens of which the others are not supervised."""

    def scatter(name: str, value: Tensor) -> Tensor:
        fill = 1 if name == "sum_exp" else 0
        whole = value.new_full((num_tokens, *value.shape[1:]), fill)
        whole[rows] = value
        return whole

    return _mapped(stats, scatter)


def _mapped(stats: TokenStatistics, function) -> TokenStatistics:
    """The statistics with function(name, tensor) in place of every tensor."""

    def convert(record):
        values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        tensors = {name: function(name, value) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(record, **tensors)

    return dataclasses.replace(convert(stats), residuals=tuple(convert(residual) for residual in stats.residuals))
