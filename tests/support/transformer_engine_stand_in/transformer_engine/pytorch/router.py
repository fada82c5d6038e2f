"""Names of fused kernels of the experts' router, which Megatron calls under --moe-router-fusion only."""


def _missing(*args, **kwargs):
    raise NotImplementedError("the stand-in for Transformer Engine has no fused kernels")


fused_topk_with_score_function = fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = _missing
