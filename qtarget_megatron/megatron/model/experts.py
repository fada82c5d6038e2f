"""Experts of local layers that can have biases."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import RowParallelLinear


class ExpertOutput(RowParallelLinear):
    """The second linear layer of a local expert.

    What the ranks of an expert have is added up behind it, by the dispatcher. Megatron's does it over a single rank
    itself, and a bias cannot be added in place to what comes from there.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = True
