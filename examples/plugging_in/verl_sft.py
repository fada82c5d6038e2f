"""An objective in verl's SFT trainer (0.9.1), on its FSDP and Megatron engines.

    QTARGET_OBJECTIVE="dft" torchrun --nproc-per-node 8 -m examples.plugging_in.verl_sft ...

The arguments are those of verl.trainer.sft_trainer.

verl's loss is the mean of -log p over the answer's tokens, and its engines compute log p from logits. Here they compute
minus the objective's loss in its place, so that verl's mask, its mean and its numbers of tokens stay. On the Megatron
engine logits are sharded over the vocabulary, and stay so.

Objectives of labels alone: the engines hand on logits and labels. Fused kernels make no logits: leave them off.
"""

from __future__ import annotations

import os

from qtarget_megatron import objectives, qtarget_cross_entropy


def minus_loss(objective, *, sharded: bool):
    """What stands in the place of the engines' log-probabilities: of logits [..., V_local] and labels [...]."""
    if objective.needs_teacher or objective.token_inputs or objective.needs_samples:
        raise ValueError(f"objective {objective} reads more than logits and labels")

    def log_probs(logits, labels, inplace_backward=False):
        group = None
        if sharded:
            from megatron.core import parallel_state

            group = parallel_state.get_tensor_model_parallel_group()
        return -qtarget_cross_entropy(logits.contiguous(), labels.contiguous(), objective=objective, group=group)

    return log_probs


def install(name: str, *arguments: str) -> None:
    """Into the engines that are installed."""
    from verl.workers.engine.fsdp import transformer_impl as fsdp

    objective = objectives.from_arguments(name, list(arguments))
    fsdp.logprobs_from_logits = minus_loss(objective, sharded=False)
    try:
        from verl.workers.engine.megatron import transformer_impl as megatron
    except ImportError:
        return
    megatron.vocab_parallel_log_probs_from_logits = minus_loss(objective, sharded=True)


if __name__ == "__main__":
    from verl.trainer.sft_trainer import main

    install(*os.environ.get("QTARGET_OBJECTIVE", "dft").split())
    main()
