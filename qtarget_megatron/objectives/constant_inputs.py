"""What is left of an objective when its token inputs are the same for every token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qtarget_megatron.objectives.registry import Objective
from qtarget_megatron.statistics import StatisticsRequest, TokenStatistics


def multiple_of_sft(objective: Objective, inputs: Mapping[str, float]) -> float | None:
    """The factor c where the objective trains as c times sft does, with one value for each token input; else None.

    It does where every token has the label mass c and no residual, whatever the model says; of an objective with
    residuals, or without token inputs, nothing is said.
    """
    if objective.residuals or not objective.token_inputs:
        return None
    stats = _drawn(max(objective.top_k, 1))
    values = {name: torch.full_like(stats.p, inputs[name]) for name in objective.token_inputs}
    _, mass, _ = objective.evaluate(stats, values)
    mass = torch.as_tensor(mass, dtype=torch.float64).expand_as(stats.p)
    return mass[0].item() if bool((mass == mass[0]).all()) else None


def _drawn(top_k: int) -> TokenStatistics:
    """Statistics of tokens from all but impossible to all but certain, over a vocabulary of top_k + 5."""
    generator = torch.Generator().manual_seed(1)
    z = 3 * torch.randn(64, top_k + 5, generator=generator, dtype=torch.float64)
    log_p = z.log_softmax(-1)
    maximum = z.amax(-1)
    rows = (
        *(maximum, (z - maximum[:, None]).exp().sum(-1)),
        *(log_p[:, 0], log_p[:, 0].exp(), -(log_p.exp() * log_p).sum(-1)),
        log_p.exp().square().sum(-1),
        *torch.zeros(3, len(z), dtype=torch.float64),
    )
    request = StatisticsRequest(collision=True, top_k=top_k)
    return TokenStatistics(torch.stack(rows), torch.ones(len(z), dtype=torch.bool), request, z.topk(top_k).values)
