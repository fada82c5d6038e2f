"""The command ``qtarget``: each of its subcommands is a module of its own, started as the process that it is."""

from __future__ import annotations

import difflib
import runpy
import sys
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """A subcommand.

    module:  what is run.
    words:   what it gets before the user's.
    summary: a line of the help.
    """

    module: str
    words: tuple[str, ...]
    summary: str


_CONVERT = "qtarget_megatron.commands.convert_hf"
COMMANDS = {
    "finetune": Command("qtarget_megatron.finetune", (), "train a Hugging Face model on Megatron, and export it"),
    "import": Command(_CONVERT, ("import",), "Hugging Face directory to Megatron checkpoint"),
    "export": Command(_CONVERT, ("export",), "Megatron checkpoint to Hugging Face directory"),
    "check": Command(_CONVERT, ("check",), "compare the logits of Megatron and of transformers"),
    "generate": Command("qtarget_megatron.commands.generate", (), "answer the questions of a data file, as JSON lines"),
    "score": Command("qtarget_megatron.commands.score", (), "compute the side inputs of iw-sft, weighted-sft and psft"),
    "cache-teacher": Command(
        "qtarget_megatron.commands.cache_teacher", (), "keep a teacher's largest probabilities for training"
    ),
    "import-teacher": Command(
        "qtarget_megatron.commands.import_teacher", (), "the same of a server's, DistillKit's or Megatron-LM's word"
    ),
    "plan": Command("qtarget_megatron.commands.plan", (), "memory and traffic of a layout, before renting for it"),
    "verify": Command(
        "qtarget_megatron.commands.verify_parallel", (), "compare losses or a whole training with one process"
    ),
    "inspect": Command(
        "qtarget_megatron.commands.inspect_targets", (), "show the target distribution of each token of a sample"
    ),
}
HELP = """usage: qtarget COMMAND [flags]

Supervised fine-tuning on Megatron-Core with designed target distributions.

{}

qtarget COMMAND --help explains each with examples, qtarget --version prints versions.

On several GPUs every command is a module, with _ for -:
    torchrun --nproc-per-node 8 -m qtarget_megatron.finetune --hf-model DIR ...
    torchrun --nproc-per-node 8 -m qtarget_megatron.cache_teacher --teacher-hf DIR ...

Completion of commands and flags, for bash, zsh, fish and others (pip install 'qtarget_megatron[completion]'):
    qtarget completion bash > ~/.local/share/bash-completion/completions/qtarget
"""


def main() -> None:
    """Be the process of a subcommand that sys.argv names."""
    name, words = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in COMMANDS:
        run(name, words)
    elif name in ("-h", "--help", "help"):
        print(help_text(), end="")
    elif name == "--version":
        from qtarget_megatron._version import versions

        print(versions())
    elif name == "completion":
        _complete(words)
    else:
        _refuse(name)


def run(name: str, words: list[str] | None = None) -> None:
    """Run a subcommand in place of this module. words: by default those behind it on the command line."""
    command = COMMANDS[name]
    sys.argv = [sys.argv[0], *command.words, *(sys.argv[1:] if words is None else words)]
    # As python -m does it: what starts processes of its own finds the module by its name.
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


def help_text() -> str:
    width = max(map(len, COMMANDS)) + 2
    return HELP.format("\n".join(f"    {name:<{width}}{command.summary}" for name, command in COMMANDS.items()))


def _complete(words: list[str]) -> None:
    from qtarget_megatron.commands.completion import script

    try:
        text = script(words[0] if words else "", {name: command.summary for name, command in COMMANDS.items()})
    except ImportError as error:
        _fail(f"completion: {error}: pip install 'qtarget_megatron[completion]'")
    except ValueError as error:
        _fail(f"completion: {error}")
    print(text)


def _refuse(name: str) -> NoReturn:
    if not name:
        _fail("expected a command: qtarget --help lists them")
    near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
    _fail(f"unknown command {name!r}{f' (did you mean {near[0]}?)' if near else ''}: qtarget --help lists them")


def _fail(message: str) -> NoReturn:
    print(f"qtarget: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
