"""--lora-rank and its like: adapters in the place of training all weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from qtarget_megatron.huggingface import EXPERTS, TARGETS, Architecture, Lora, check_targets, default_targets
from qtarget_megatron.huggingface.adapters.peft_directory import PeftDirectory

# The attributes of args that say what the adapters are; checkpoints are saved with them.
KEYS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_rslora", "lora_targets")
# Flags of Megatron's that train, replace or take apart what adapters are beside.
_REFUSED = (
    *("mtp_num_layers", "use_megatron_fsdp", "use_torch_fsdp2"),
    *("use_transformer_engine_op_fuser", "moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm"),
    *("delay_wgrad_compute", "cpu_offloading_num_layers"),
)


def add_lora_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flags of adapters to a parser, or to a group of one."""
    parser.add_argument(
        "--lora-rank",
        type=int,
        metavar="R",
        help="train adapters (LoRA) of this rank beside the linear layers, y = W x + s B A x, and leave the model as "
        "it is. --save holds adapters and their optimizer alone, --save-hf becomes a PEFT directory",
    )
    parser.add_argument(
        "--lora-alpha", type=float, metavar="ALPHA", help="s is ALPHA / R (default: 32, whatever the rank)"
    )
    parser.add_argument(
        "--lora-dropout", type=float, metavar="P", help="dropout of what goes into an adapter (default: 0)"
    )
    parser.add_argument(
        "--lora-rslora", action="store_true", default=None, help="s is ALPHA / sqrt(R), for large ranks (rsLoRA)"
    )
    parser.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="LAYER",
        help=f"which linear layers have an adapter, of {', '.join(TARGETS)}; gate, up and down are those of MLPs and "
        f"shared experts, {EXPERTS} those of each expert (default: q k v o gate up down; q k v o where there are "
        "experts). One that the model has together with others (as qkv_proj of Phi-3) is given with all of them",
    )
    parser.add_argument(
        "--lora-from",
        type=Path,
        metavar="DIR",
        help="go on from the adapters of a PEFT directory; rank, alpha and targets are those of its "
        "adapter_config.json",
    )
    parser.add_argument(
        "--lora-merge",
        action="store_true",
        help="--save-hf becomes a whole model, with s B A added to the weights, not a PEFT directory",
    )
    parser.add_argument(
        "--teacher-self",
        action="store_true",
        help="in place of --teacher-hf: the second model is the first one without its adapters. It takes no memory for "
        "weights, and two forwards in a step",
    )


def read_lora(args: argparse.Namespace, arch: Architecture) -> Lora | None:
    """The adapters that args ask for, None where they ask for none; fills the flags that were not given.

    ValueError for flags that contradict each other or --lora-from, and for targets that the model does not have.
    """
    given = {key: getattr(args, key) for key in KEYS if getattr(args, key, None) is not None}
    if args.lora_from is not None:
        lora = _lora_from(args, arch, given)
    elif args.lora_rank is None:
        stray = [key for key in (*KEYS, "lora_merge", "teacher_self") if getattr(args, key, None)]
        if stray:
            more = ", or cache the model as its own teacher (--teacher-hf or --teacher-cache)"
            why = (
                "the weights move, so that nothing would be left of what the teacher was"
                if stray[0] == "teacher_self"
                else ""
            )
            raise ValueError(
                f"--{stray[0].replace('_', '-')} needs adapters{': ' if why else ''}{why}: give --lora-rank"
                f"{more if why else ', or drop it'}"
            )
        return None
    else:
        names = {key: key.removeprefix("lora_") for key in KEYS}
        values = {names[key]: value for key, value in given.items()}
        values["targets"] = tuple(values.get("targets", default_targets(arch)))
        lora = Lora(**values)
    check_targets(arch, lora)
    moves_bias = arch.experts is not None and arch.experts.has_correction
    for key in (*_REFUSED, *(["moe_router_bias_update_rate"] if moves_bias else [])):
        if getattr(args, key, None):
            flag = f"--{key.replace('_', '-')}"
            raise ValueError(f"{flag} does not go with adapters (--lora-rank): drop one of them")
    set_lora(args, lora)
    # No weight has a gradient to add up.
    args.gradient_accumulation_fusion = False
    return lora


def set_lora(args: argparse.Namespace, lora: Lora) -> None:
    """Write what the adapters are into args."""
    for key in KEYS:
        setattr(args, key, getattr(lora, key.removeprefix("lora_")))


def saved_lora(saved: argparse.Namespace) -> Lora | None:
    """The adapters of a checkpoint by the arguments that it was saved with; None where it holds a whole model."""
    if getattr(saved, "lora_rank", None) is None:
        return None
    return Lora(**{key.removeprefix("lora_"): getattr(saved, key) for key in KEYS})


def lora_words(lora: Lora) -> str:
    """The flags that ask for these adapters."""
    words = [f"--lora-rank {lora.rank}", f"--lora-alpha {lora.alpha:g}"]
    words += [f"--lora-dropout {lora.dropout:g}"] if lora.dropout else []
    words += ["--lora-rslora"] if lora.rslora else []
    return " ".join([*words, f"--lora-targets {' '.join(lora.targets)}"])


def check_saved_lora(load: str, saved: argparse.Namespace, lora: Lora | None) -> None:
    """ValueError where a checkpoint holds a whole model and adapters are asked for, the reverse, or other adapters.

    load: --load. saved: the arguments that the checkpoint was saved with.
    """
    before = saved_lora(saved)
    if before is None and lora is None:
        return
    if before is None:
        raise ValueError(
            f"--load {load} holds a whole model, no adapters: with --lora-rank the weights are those of --hf-model: "
            "export the checkpoint (qtarget export), and give that directory as --hf-model"
        )
    if lora is None:
        raise ValueError(f"--load {load} holds adapters, no model: give {lora_words(before)} with its --hf-model")
    if (before.rank, before.targets) != (lora.rank, lora.targets) or before.scale != lora.scale:
        raise ValueError(f"--load {load} holds other adapters than {lora_words(lora)}: give {lora_words(before)}")


def _lora_from(args: argparse.Namespace, arch: Architecture, given: dict) -> Lora:
    directory = PeftDirectory(args.lora_from, arch)
    own = directory.lora
    for key, value in given.items():
        expected = getattr(own, key.removeprefix("lora_"))
        value = tuple(sorted(value)) if key == "lora_targets" else value
        expected = tuple(sorted(expected)) if key == "lora_targets" else expected
        if key != "lora_dropout" and value != expected:
            shown = " ".join(expected) if key == "lora_targets" else expected
            raise ValueError(
                f"--{key.replace('_', '-')}: --lora-from {args.lora_from} has {shown}: drop the flag, or give the same"
            )
    dropout = given.get("lora_dropout", own.dropout)
    return Lora(own.rank, own.alpha, dropout, own.rslora, own.targets)
