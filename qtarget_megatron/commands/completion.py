"""What a shell completes behind the command qtarget: its subcommands, their flags, files and directories."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from qtarget_megatron import finetune
from qtarget_megatron.commands import (
    cache_teacher,
    convert_hf,
    generate,
    import_teacher,
    inspect_targets,
    plan,
    score,
    verify_parallel,
)

_PARSERS = {
    "finetune": finetune.command_line,
    "generate": generate.command_line,
    "score": score.command_line,
    "cache-teacher": cache_teacher.command_line,
    "import-teacher": import_teacher.command_line,
    "plan": plan.command_line,
    "verify": verify_parallel.command_line,
    "inspect": inspect_targets.command_line,
}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """That of each subcommand, by its name."""
    return {name: make() for name, make in _PARSERS.items()} | convert_hf.command_lines()


def script(shell: str, summaries: Mapping[str, str]) -> str:
    """The program that a shell reads. ImportError without shtab, ValueError for a shell that it does not know.

    summaries: the help of each subcommand, by its name.
    """
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"expected one of {', '.join(shtab.SUPPORTED_SHELLS)}, got {shell!r}")
    root = argparse.ArgumentParser(prog="qtarget")
    subcommands = root.add_subparsers()
    known = parsers()
    for name, summary in summaries.items():
        child = subcommands.add_parser(name, help=summary, add_help=False)
        for action in known[name]._actions:
            child._add_action(action)
            if action.type is Path:
                completion = shtab.FILE if action.metavar == "FILE" else shtab.DIRECTORY
                action.complete = completion  # type: ignore[attr-defined]  # where shtab looks for it
    return shtab.complete(root, shell)
