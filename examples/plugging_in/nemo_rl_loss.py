"""An objective in NeMo-RL (as of 2026-11): a loss function of logits, in the place of NLLLossFn.

    from examples.plugging_in.nemo_rl_loss import TargetLossFn
    loss_fn = TargetLossFn("dft")          # what nemo_rl.algorithms.sft.setup() makes an NLLLossFn of

On its Megatron worker logits are sharded over the vocabulary, and stay so; on DTensor workers they are whole.
Objectives of labels alone.
"""

from __future__ import annotations

import torch
from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType

from qtarget_megatron import objectives, qtarget_cross_entropy


class TargetLossFn:
    loss_type, input_type = LossType.TOKEN_LEVEL, LossInputType.LOGIT

    def __init__(self, name: str, *arguments: str, group=None):
        """group: of the tensor-parallel ranks, where logits are sharded; None: Megatron's, if it is initialised."""
        self.objective, self.group = objectives.from_arguments(name, list(arguments)), group
        if self.objective.needs_teacher or self.objective.token_inputs or self.objective.needs_samples:
            raise ValueError(f"objective {self.objective} reads more than logits and labels")

    def __call__(self, data, global_valid_seqs, global_valid_toks, logits, **others):
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        labels = data["input_ids"][:, 1:].masked_fill(mask == 0, -100)
        losses = qtarget_cross_entropy(
            logits[:, : labels.shape[1]].contiguous(),
            labels.contiguous(),
            objective=self.objective,
            group=self._group(),
        )
        loss = (losses * mask).sum() / global_valid_toks
        metrics = {"loss": loss.item(), "num_unmasked_tokens": int((mask != 0).sum()), "num_valid_samples": len(mask)}
        return loss, metrics

    def _group(self):
        if self.group is not None or not torch.distributed.is_initialized():
            return self.group
        try:
            from megatron.core import parallel_state
        except ImportError:
            return None
        return parallel_state.get_tensor_model_parallel_group() if parallel_state.is_initialized() else None
