"""--model-class: which of Megatron's model classes holds the layers."""

from __future__ import annotations

import argparse

from qtarget_megatron.huggingface import Architecture

GPT, HYBRID = "gpt", "hybrid"
# What Megatron has for a GPTModel alone.
_GPT_ONLY = ("mtp_num_layers", "overlap_moe_expert_parallel_comm", "cpu_offloading_num_layers")


def add_model_class[Flags: argparse._ActionsContainer](parser: Flags) -> Flags:
    """Add the flag --model-class to a parser, or to a group of one."""
    parser.add_argument(
        "--model-class",
        choices=(GPT, HYBRID),
        help="Megatron's class of the model: gpt, GPTModel, or hybrid, its successor HybridModel, which has attention "
        "and MLPs as layers of their own. Both compute the same, take the same flags and load each other's checkpoints "
        "(default: what Megatron recommends, hybrid; gpt for models and flags that its HybridModel does not serve, or "
        "no translation of its own: latent attention, experts in some of the layers, multi-token prediction, "
        "--overlap-moe-expert-parallel-comm, other formats of checkpoints than torch_dist)",
    )
    return parser


def choose_model_class(args: argparse.Namespace, arch: Architecture) -> None:
    """Set the class where the flag does not. ValueError for flags that Megatron's HybridModel does not serve."""
    needs_gpt = [name for name in _GPT_ONLY if getattr(args, name, None)]
    if args.model_class is None:
        mixed = arch.experts is not None and not all(arch.experts.layers)
        foreign = arch.latent is not None or mixed or bool(arch.further_layers) or args.ckpt_format != "torch_dist"
        args.model_class = GPT if needs_gpt or foreign else HYBRID
    if args.model_class == HYBRID and needs_gpt:
        flag = f"--{needs_gpt[0].replace('_', '-')}"
        raise ValueError(f"{flag} needs --model-class gpt: give it, or drop {flag}")
