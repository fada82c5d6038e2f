"""What the command lines have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qtarget_megatron._version import versions
from qtarget_megatron.command_line import Parser
from qtarget_megatron.data.forms import add_data_format

MEGATRON = "Megatron's flags as well: layout, --micro-batch-size, --bf16, ..."


def command_parser(
    name: str, text: str, *, others: str | None = None, of: argparse._SubParsersAction | None = None
) -> argparse.ArgumentParser:
    """A command's parser, with --version.

    text:   its --help.
    others: flags that it takes besides, which end the help.
    of:     the subcommands that it is one of.
    """
    settings: dict[str, Any] = dict(
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=None if others is None else f"Takes {others}",
    )
    if of is None:
        parser = Parser(prog=f"qtarget {name}", **settings)
    else:
        parser = of.add_parser(name, help=text.partition("\n")[0], **settings)
    parser.add_argument("--version", action="version", version=versions(), help="print versions and exit")
    return parser


def add_path(parser: argparse.ArgumentParser, flag: str, metavar: str, text: str, *, required: bool = False) -> None:
    parser.add_argument(flag, type=Path, metavar=metavar, help=text, required=required)


def add_run(parser: argparse.ArgumentParser, *, model: str, what: str, out: tuple[str, str], seq_length: str) -> None:
    """The flags of a dataset_run.RunOptions. model: its flag; what: whose it is; out: metavar and help of --out;
    seq_length: why samples are cut."""
    add_path(parser, model, "DIR", f"Hugging Face directory of {what}", required=True)
    add_path(parser, "--load", "CKPT", f"Megatron checkpoint with its weights (default: those of {model})")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration of --load (default: the latest)")
    add_path(parser, "--data", "FILE", "the data, a file or folder as for training", required=True)
    add_data_format(parser)
    parser.add_argument(
        "--data-date",
        metavar="YYYY-MM-DD",
        help="the date that a chat template writes which asks for today's (default: that of the run that goes on, or "
        "today)",
    )
    add_path(parser, "--out", *out, required=True)
    parser.add_argument("--seq-length", type=int, required=True, metavar="S", help=f"samples are cut to it{seq_length}")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="run on the CPU; the default where no GPU is found, refused where one is",
    )


def run_options(ours: argparse.Namespace, hf_model: Path) -> dict[str, Any]:
    """The fields of a dataset_run.RunOptions that add_run()'s flags say."""
    names = ("data", "data_format", "out", "seq_length", "load", "ckpt_step", "data_date")
    return {"hf_model": hf_model} | {name: getattr(ours, name) for name in names}
