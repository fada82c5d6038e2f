"""--model-class: which of Megatron's model classes holds the layers."""

from __future__ import annotations

import argparse
from typing import TypeVar

GPT, HYBRID = "gpt", "hybrid"
# What Megatron has for a GPTModel alone.
_GPT_ONLY = ("mtp_num_layers", "overlap_moe_expert_parallel_comm", "cpu_offloading_num_layers")
Flags = TypeVar("Flags", bound=argparse._ActionsContainer)


def add_model_class(parser: Flags) -> Flags:
    """Add the flag --model-class to a parser, or to a group of one."""
    parser.add_argument(
        "--model-class",
        choices=(GPT, HYBRID),
        default=GPT,
        help="Megatron's class of the model: gpt, GPTModel, or hybrid, HybridModel, its successor, which has attention "
        "and MLPs as layers of their own. Both compute the same, take the same flags and load each other's checkpoints "
        "(default: gpt)",
    )
    return parser


def check_model_class(args: argparse.Namespace) -> None:
    """Refuse flags that Megatron's HybridModel does not serve. Raises ValueError."""
    if args.model_class != HYBRID:
        return
    for name in _GPT_ONLY:
        if getattr(args, name, None):
            raise ValueError(f"--{name.replace('_', '-')} needs --model-class gpt: give it, or drop the flag")
