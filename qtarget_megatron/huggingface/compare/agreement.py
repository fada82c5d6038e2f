"""How far the logits and hidden states of two implementations of a model are from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget_megatron.huggingface.compare.hidden_states import Place

# Positions that are shown.
_WORST = 5
# A difference that is no rounding of float32: so much at once, and so many times what it was before.
_STEP, _FLOOR = 10.0, 1e-5


@dataclass(frozen=True)
class TokenAgreement:
    """How two models agree at one position: the token that was read, the next one of the text (None behind the last),
    what each model ranks first, the largest difference of two logits, and KL in nats."""

    position: int
    token: int
    label: int | None
    expected: int
    actual: int
    difference: float
    kl: float


@dataclass(frozen=True)
class StateAgreement:
    """How the hidden states [s, h] at one place agree, a by transformers and b by Megatron: the largest
    |b_t - a_t| / |a_t| over tokens t, and that of the first token. NaN where a model has one."""

    place: Place
    difference: float
    at_first: float


@dataclass(frozen=True)
class Agreement:
    """Two models' logits over the same tokens: p from transformers, q from Megatron.

    max_difference:   largest absolute difference of two logits; NaN where either model has one.
    argmax_agreement: share of the positions where both rank the same token first.
    kl_mean, kl_max:  sum_v p_v log(p_v / q_v) in nats, over positions.
    worst:            the positions that differ most.
    states:           hidden states, in the order of their computation, where both models have them, and the logits
                      last.
    """

    num_tokens: int
    max_difference: float
    argmax_agreement: float
    kl_mean: float
    kl_max: float
    worst: tuple[TokenAgreement, ...] = ()
    states: tuple[StateAgreement, ...] = ()

    @classmethod
    def of(
        cls,
        expected: Tensor,
        actual: Tensor,
        tokens: Sequence[int] = (),
        states: tuple[Mapping[Place, Tensor], Mapping[Place, Tensor]] = ({}, {}),
    ) -> Agreement:
        """The agreement of logits [s, vocab_size], expected by transformers, actual by Megatron.

        tokens: [s], for the worst.
        states: hidden states [s, h] of both, in this order.

        ValueError for different shapes.
        """
        if expected.shape != actual.shape:
            raise ValueError(
                f"expected logits of one shape, got {list(expected.shape)} from transformers and "
                f"{list(actual.shape)} from Megatron: the directories hold different vocabularies"
            )
        p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        difference = (expected.double() - actual.double()).abs().amax(-1)
        tops = expected.argmax(-1), actual.argmax(-1)
        order = difference.nan_to_num(nan=torch.inf).argsort(descending=True, stable=True)[:_WORST].tolist()
        return cls(
            num_tokens=expected.shape[0],
            max_difference=difference.max().item(),
            argmax_agreement=(tops[0] == tops[1]).double().mean().item(),
            kl_mean=kl.mean().item(),
            kl_max=kl.max().item(),
            worst=tuple(
                TokenAgreement(
                    at,
                    tokens[at],
                    tokens[at + 1] if at + 1 < len(tokens) else None,
                    int(tops[0][at]),
                    int(tops[1][at]),
                    difference[at].item(),
                    kl[at].item(),
                )
                for at in order
                if at < len(tokens)
            ),
            states=_compare_states(*states, expected, actual),
        )

    def first_divergence(self) -> StateAgreement | None:
        """Where hidden states differ for the first time by much more than before; None where they never do.

        Rounding grows slowly from place to place, a mistake shows at once.
        """
        before = 0.0
        for state in self.states:
            # Written so that NaN counts.
            if not state.difference <= max(_FLOOR, _STEP * before):
                return state
            before = max(before, state.difference)
        return None


def _compare_states(
    expected: Mapping[Place, Tensor],
    actual: Mapping[Place, Tensor],
    expected_logits: Tensor,
    actual_logits: Tensor,
) -> tuple[StateAgreement, ...]:
    """Where both have states of one shape; behind them the logits. Nothing where there are none."""
    places = [p for p in sorted(expected.keys() & actual.keys()) if expected[p].shape == actual[p].shape]
    pairs = [(place, expected[place], actual[place]) for place in places]
    if places:
        pairs.append((Place.logits(max(places[-1].layer, 0)), expected_logits, actual_logits))
    found = []
    for place, a, b in pairs:
        norm = a.double().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        relative = (b.double() - a.double()).norm(dim=-1) / norm
        found.append(StateAgreement(place, relative.max().item(), relative[0].item()))
    return tuple(found)
