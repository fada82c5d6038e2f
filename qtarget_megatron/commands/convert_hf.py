"""Convert models between Hugging Face directories and Megatron checkpoints, and check the result: qtarget import,
qtarget export, qtarget check.
"""

from __future__ import annotations

import argparse
import sys

from qtarget_megatron._version import versions
from qtarget_megatron.command_line import Parser
from qtarget_megatron.commands.parsers import MEGATRON, add_path, command_parser

_FLAGS = """\
Every Megatron flag works: layout, --bf16 or --fp16 to change the dtype (import and export keep it, check computes in
float32), --transformer-impl, --ckpt-step. finetune reads --hf-model and writes --save-hf by itself; this command is for
other programs, and to look before a long run.
"""
IMPORT = f"""\
Hugging Face directory to Megatron checkpoint.

    # the checkpoint (torch_dist) loads at any layout, by finetune --load CKPT --finetune and by plain Megatron
    qtarget import --hf-model DIR --save CKPT

    # a model too large for one process: any layout, each rank reads its slices only
    torchrun --nproc-per-node 8 -m qtarget_megatron.import --hf-model DIR --save CKPT \\
        --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2

CKPT appears when it is complete; until then it is filled in a hidden folder beside it, .CKPT.incomplete. An import that
was interrupted starts anew.

{_FLAGS}
A checkpoint imported on a CPU (Megatron's local layers) has the tensor names of one imported on a GPU (Transformer
Engine's layers) and loads there. Plain Megatron then needs --dist-ckpt-strictness log_unexpected, because Transformer
Engine's layers ask for a state of their own that such a checkpoint does not hold; finetune, export and check set it
themselves.
"""
EXPORT = f"""\
Megatron checkpoint to Hugging Face directory.

    # architecture and tokenizer come from DIR
    qtarget export --hf-model DIR --load CKPT --save-hf OUT

    # a model too large for one process: at any layout
    torchrun --nproc-per-node 8 -m qtarget_megatron.export --hf-model DIR --load CKPT --save-hf OUT \\
        --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2

    # a checkpoint of adapters (finetune --lora-rank): a PEFT directory, or the model of DIR with them added
    qtarget export --hf-model DIR --load CKPT --save-hf OUT
    qtarget export --hf-model DIR --load CKPT --save-hf OUT --lora-merge

OUT appears when it is complete; until then it is filled in a hidden folder beside it, .OUT.incomplete. An export that
was interrupted goes on when the same command is given again: the files that were complete are kept if their SHA-256
still says so. Started from another checkpoint, dtype or number of pipeline stages it is refused, until that folder is
deleted.

{_FLAGS}"""
CHECK = f"""\
Do both compute the same? Logits of Megatron against transformers' in float32; exit code 0 or 1. Where they differ: the
worst tokens, the first layer whose hidden states differ, and what to look at.

    qtarget check --hf-model DIR
    qtarget check --hf-model DIR --load CKPT
    qtarget check --hf-model OUT --reference DIR
    torchrun --nproc-per-node 8 -m qtarget_megatron.check --hf-model DIR --load CKPT --tensor-model-parallel-size 8

{_FLAGS}"""
TEXT = """\
A lighthouse keeper once kept two books. In the first she wrote what she saw: ships by name, the
hour they passed, the colour of the sea. In the second she wrote what she expected to see the next
day. On quiet evenings she laid both on the table and compared them line by line. Where they
differed she did not cross out the guess; she asked what had made her so sure. After 27 years the
second book was only a little thicker than the first, and visitors could hardly tell which was
which. "It is not that I know the sea," she told them, "I have just learnt how much to trust a
wave." The function that lit the lamp was simpler: def light(hour): return hour >= 18 or hour < 6.
Nobody had ever seen it fail, except once, in the winter of 1963, when 3 + 4 ships came home at noon
and fog made noon as dark as any night.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the process's exit code: 0 done or equal, 1 not equal, 2 bad input."""
    from qtarget_megatron.megatron.faults.ending import exit_code

    def command() -> int:
        ours, words = command_line().parse_known_args(argv)
        return ours.run(ours, words)

    return exit_code(_name(argv), command)


def _name(argv: list[str] | None = None) -> str:
    """The subcommand that is run, for its lines."""
    words = sys.argv[1:] if argv is None else argv
    return words[0] if words and words[0] in ("import", "export", "check") else "qtarget"


def run_import(ours: argparse.Namespace, words: list[str]) -> int:
    from qtarget_megatron.megatron.jobs.convert import import_hf
    from qtarget_megatron.megatron.runtime.ranks import print_once

    import_hf(ours.hf_model, ours.save, words, cpu=ours.cpu)
    print_once(f"import: imported {ours.hf_model} to {ours.save}")
    return 0


def run_export(ours: argparse.Namespace, words: list[str]) -> int:
    from qtarget_megatron.megatron.jobs.convert import export_hf
    from qtarget_megatron.megatron.runtime.ranks import print_once

    export_hf(
        *(ours.hf_model, ours.load, ours.save_hf, words), merge=ours.lora_merge, checksums=ours.checksums, cpu=ours.cpu
    )
    print_once(f"export: exported {ours.load} to {ours.save_hf}")
    return 0


def run_check(ours: argparse.Namespace, words: list[str]) -> int:
    import torch

    from qtarget_megatron.data import load_tokenizer
    from qtarget_megatron.huggingface import report_lines
    from qtarget_megatron.megatron.jobs.convert import text_tokens
    from qtarget_megatron.megatron.jobs.open_model import open_model
    from qtarget_megatron.megatron.runtime.ranks import print_once

    tokens = text_tokens(ours.hf_model, ours.text or TEXT)
    tokenizer = load_tokenizer(ours.hf_model)
    model = open_model(
        ours.hf_model,
        words,
        load=ours.load,
        dtype=torch.float32,
        seq_length=len(tokens),
        cpu=ours.cpu,
    )
    from qtarget_megatron.megatron.jobs.against_transformers import compare_with_transformers

    found = compare_with_transformers(model, ours.reference or ours.hf_model, tokens)
    print_once("\n".join(report_lines(found, ours.tolerance, lambda token: repr(tokenizer.decode([token])))))
    # Written so that NaN fails.
    equal = found.max_difference <= ours.tolerance
    print_once(
        f"check: over {found.num_tokens} tokens the logits of Megatron and of transformers differ by at most "
        f"{found.max_difference:.3g}: {'equal' if equal else 'DIFFERENT'}"
    )
    return 0 if equal else 1


def command_line() -> argparse.ArgumentParser:
    """The parser of its own flags."""
    parser = Parser(prog="qtarget", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=versions(), help="print versions and exit")
    commands = parser.add_subparsers(required=True, metavar="{import,export,check}")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = command_parser(name, text, others=MEGATRON, of=commands)
        sub.set_defaults(run=run)
        add_path(sub, "--hf-model", "DIR", "Hugging Face directory; its config.json is the architecture", required=True)
        sub.add_argument(
            "--cpu",
            action="store_true",
            help="run on the CPU; the default where no GPU is found, refused where one is",
        )
        return sub

    new = "a new or empty directory"
    sub = command("import", run_import, IMPORT)
    add_path(sub, "--save", "CKPT", f"where to write the checkpoint: {new}", required=True)
    sub = command("export", run_export, EXPORT)
    add_path(sub, "--load", "CKPT", "the Megatron checkpoint", required=True)
    add_path(sub, "--save-hf", "OUT", f"where to write the model: {new}", required=True)
    checksums = "write the SHA-256 of each file there: cd OUT && sha256sum -c FILE (default: none)"
    add_path(sub, "--checksums", "FILE", checksums)
    sub.add_argument(
        "--lora-merge",
        action="store_true",
        help="of a checkpoint of adapters, export the model of --hf-model with them added to its weights (default: a "
        "PEFT directory)",
    )
    sub = command("check", run_check, CHECK)
    add_path(sub, "--load", "CKPT", "Megatron checkpoint with the weights (default: those of --hf-model)")
    add_path(sub, "--reference", "DIR", "what transformers loads (default: --hf-model)")
    add_path(sub, "--text", "FILE", "UTF-8 text to run on (default: a paragraph of this command's own)")
    sub.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest absolute difference of two logits to accept (default: %(default)g)",
    )
    return parser


def command_lines() -> dict[str, argparse.ArgumentParser]:
    """The parser of each subcommand."""
    (subcommands,) = (a for a in command_line()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(subcommands.choices)


if __name__ == "__main__":
    from qtarget_megatron.megatron.faults import ending

    ending.run(_name(), main)
