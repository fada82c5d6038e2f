"""Megatron's router where sequences have padding and losses are divided by supervised tokens.

Everything that it computes over tokens is over the real ones, padding left out, and a coefficient c of a balance loss
or of the z-loss adds c times its mean over the micro-batches of the global batch to the mean loss of a supervised
token. With E experts, k of them for each token, n the number of real tokens of a set, f_i = (how many of the set's
tokens chose expert i) / (k n) and P_i = (sum of their scores of expert i) / n:

aux_loss         E sum_i f_i P_i, the set being a micro-batch
seq_aux_loss     the mean over its sequences, each one a set
global_aux_loss  P of a micro-batch of all data-parallel ranks, f of those and of the ones before them in the step
z-loss           the mean over a micro-batch of logsumexp(logits)^2

Megatron's own masks and scales (0.19.2) differ: it multiplies by real tokens where gradients are divided by supervised
ones, takes the sequences of seq_aux_loss to be of equal length, divides global_aux_loss by the number of data-parallel
ranks, averages the z-loss over shards of a sequence whatever real tokens they hold, cannot leave padding out of the
counts for the correction of scores, and lets padding take the capacity of experts.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """The router of every layer with experts; its correction of the scores stays float32 in a 16-bit model.

    supervised_share: what the gradients of a step are divided by (its supervised tokens), per micro-batch of the global
    batch, a float32 []; whoever trains sets it before the forward of the step's first micro-batch. padding_mask: as
    Megatron's layers hand it on, bool [s, b] of this rank's tokens, True where there is padding.

    Collectives: Megatron's own, of the counts of tokens.
    """

    expert_bias: Tensor | None

    def __init__(self, config: TransformerConfig, *args, **kwargs):
        self._capacity_factor = config.moe_expert_capacity_factor
        if self._capacity_factor is not None:
            # Megatron's routing knows no padding where it drops tokens: routing() does it in its place.
            config = copy.copy(config)
            config.moe_expert_capacity_factor = None
        super().__init__(config, *args, **kwargs)
        self.supervised_share: Tensor | None = None

    def _apply(self, fn, recurse=True):
        correction = self.expert_bias
        super()._apply(fn, recurse)
        if correction is not None:
            self.expert_bias = correction.to(self.expert_bias.device)
        return self

    @property
    def has_loss(self) -> bool:
        """Whether it adds to the loss of a training."""
        return self.is_aux_loss_enabled() or bool(self.config.moe_z_loss_coeff)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        moves = self.enable_expert_bias and self.config.moe_router_bias_update_rate
        if padding_mask is None and self.training and (self.has_loss or moves):
            raise RuntimeError("the balance of experts needs the padding mask, and it has not come to this layer")
        probs, routing_map = super().routing(logits, padding_mask)
        if self._capacity_factor is not None:
            probs, routing_map = self._within_capacity(probs, routing_map, padding_mask)
        real = routing_map if padding_mask is None else routing_map & ~padding_mask.reshape(-1, 1)
        super()._apply_expert_bias(real)
        return probs, routing_map

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Nothing: routing() counts once it knows which tokens are dropped."""

    def _within_capacity(self, probs: Tensor, routing_map: Tensor, padding_mask: Tensor | None):
        """Experts take capacity_factor times their even share of this rank's real tokens; padding goes to none."""
        rows = slice(None) if padding_mask is None else (~padding_mask).reshape(-1).nonzero().squeeze(1)
        kept_probs, kept_map = torch.zeros_like(probs), torch.zeros_like(routing_map)
        kept_probs[rows], kept_map[rows] = apply_router_token_dropping(
            probs[rows],
            routing_map[rows],
            router_topk=self.topk,
            capacity_factor=self._capacity_factor,
            drop_policy=self.config.moe_token_drop_policy,
        )
        return kept_probs, kept_map

    def _apply_aux_loss(self, probs, scores_for_aux_loss, routing_map, with_padding_mask=False):
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        counts = reduce_from_tensor_model_parallel_region(routing_map.sum(0), self.tp_cp_group)
        loss = _balance(counts, scores_for_aux_loss.sum(0), counts.sum() / self.topk)
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, coefficient * loss, "load_balancing_loss", self.tp_cp_group
        )

    def _apply_seq_aux_loss(self, probs, scores_for_aux_loss, routing_map, seq_length, bsz, with_padding_mask=False):
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if coefficient == 0:
            return probs
        shape = seq_length, bsz, self.num_experts
        counts = reduce_from_tensor_model_parallel_region(routing_map.view(shape).sum(0), self.tp_cp_group)
        loss = _balance(counts, scores_for_aux_loss.view(shape).sum(0), counts.sum(-1, keepdim=True) / self.topk)
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, coefficient * loss.mean(), "seq_load_balancing_loss", self.tp_cp_group
        )

    def _apply_global_aux_loss(self, probs, scores_for_aux_loss, routing_map, with_padding_mask=False):
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        if coefficient == 0:
            return probs
        counts = reduce_from_tensor_model_parallel_region(routing_map.sum(0), self.tp_dp_cp_group)
        self.global_tokens_per_expert += counts
        self.ga_steps += 1
        loss = _balance(self.global_tokens_per_expert, scores_for_aux_loss.sum(0), counts.sum() / self.topk)
        return self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            coefficient * loss,
            "global_load_balancing_loss",
            self.tp_dp_cp_group,
            needs_dp_avg=False,
            # This rank has a share of one loss of all data-parallel ranks, not one of its own.
            parts=self.tp_dp_cp_group.size() // self.tp_cp_group.size(),
        )

    def attach_and_log_load_balancing_loss(
        self,
        activation,
        aux_loss_coeff,
        aux_loss,
        aux_loss_name,
        reduce_group,
        needs_dp_avg=True,
        valid_token_count=None,
        parts: int = 1,
    ):
        # Megatron multiplies by this and by the size of the group.
        count = self._scale() * parts / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, needs_dp_avg, valid_token_count=count
        )

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        squares = torch.logsumexp(logits, dim=-1).square()
        real = torch.ones_like(squares) if padding_mask is None else (~padding_mask).to(squares.dtype)
        count = reduce_from_tensor_model_parallel_region(real.sum(), self.tp_cp_group).clamp(min=1)
        # This rank's share of the mean over the micro-batch.
        z_loss = (squares * real).sum() / count
        heads, layer_number = self.config.mtp_num_layers or 0, self.layer_number
        if self.is_mtp_layer:
            layer_number += self.config.num_layers
            # A layer that is used for all heads counts once.
            z_loss = z_loss / heads if self.config.mtp_use_repeated_layer else z_loss
        get_moe_metrics_tracker().record(
            "z_loss",
            z_loss * self.tp_cp_group.size(),
            layer_number,
            self.config.num_layers + heads,
            avg_group=self.tp_dp_cp_group,
        )
        return MoEAuxLossAutoScaler.apply(logits, coefficient * z_loss * self._scale())

    def _scale(self) -> Tensor:
        if self.supervised_share is None:
            raise RuntimeError("the router adds to the loss, but nobody has set supervised_share")
        return self.supervised_share


def _balance(counts: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    """E sum_i f_i P_i over the last dimension.

    counts: of choices of each expert, of the whole set.
    scores: sums over this rank's tokens of a set of so many tokens.
    """
    chosen = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return counts.shape[-1] * (chosen * scores / tokens.clamp(min=1)).sum(-1)
