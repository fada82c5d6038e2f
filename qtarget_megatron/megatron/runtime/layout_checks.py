"""Whether a model can be cut as the flags of a layout say, before anything is built."""

from __future__ import annotations

import argparse

from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.parallel_layout import division_problems, expert_problems, sequence_problems, stage_problems


def check_layout(args: argparse.Namespace, arch: Architecture, who: str) -> None:
    """Refuse a parallel layout that this model cannot be cut into, before anything is built. Raises ValueError."""
    tp, length = args.tensor_model_parallel_size, args.seq_length
    for problem in division_problems(arch, who, tensor=tp, seq_length=length):
        raise ValueError(problem)
    if arch.latent is not None and args.transformer_impl == "local":
        # Megatron's local layers cut the projections to latents, Transformer Engine's do not.
        widths = (arch.latent.query_rank, arch.latent.key_value_rank + arch.latent.rotary_dim)
        if any(width % tp != 0 for width in widths):
            raise ValueError(
                f"--tensor-model-parallel-size {tp} does not divide the latents of the {who} (of queries {widths[0]}, "
                f"of keys and values with their rotary part {widths[1]})"
            )
    if length is not None:
        for problem in sequence_problems(length, args.context_parallel_size, tp if args.sequence_parallel else 1):
            raise ValueError(problem)


def check_experts(args: argparse.Namespace, arch: Architecture, who: str) -> None:
    """Refuse expert parallelism that this model's experts cannot be cut into. Raises ValueError."""
    for problem in expert_problems(arch, who, world_size=args.world_size, **layout_of_experts(args)):
        raise ValueError(problem)
    if arch.experts is None:
        return
    balanced = args.moe_router_load_balancing_type
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind in ([balanced] if isinstance(balanced, str) else balanced):
            raise ValueError(
                f"--moe-router-load-balancing-type {kind} would balance padding as well: choose aux_loss, seq_aux_loss "
                "or global_aux_loss"
            )
    if args.moe_pad_expert_input_to_capacity:
        raise ValueError("--moe-pad-expert-input-to-capacity would give padding room of the experts: drop it")


def layout_of_experts(args: argparse.Namespace) -> dict[str, int]:
    """What planning.expert_problems asks of a layout."""
    tensor = args.tensor_model_parallel_size
    return dict(
        tensor=tensor,
        pipeline=args.pipeline_model_parallel_size,
        expert_parallel=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or tensor,
    )


def check_whole_stages(args: argparse.Namespace, arch: Architecture, who: str) -> None:
    """Refuse pipeline stages that the first model's layers do not divide into, unless flags say how they are shared.
    Raises ValueError."""
    if not states_stages(args):
        for problem in stage_problems(arch, who, pipeline=args.pipeline_model_parallel_size):
            raise ValueError(problem)


def states_stages(args: argparse.Namespace) -> bool:
    """Whether flags say which pipeline stage has which layers."""
    return bool(
        args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
        or args.pipeline_model_parallel_layout
    )
