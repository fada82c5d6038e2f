"""Answer the questions of a data file, greedily or by sampling, with the model of a Hugging Face directory or of a
Megatron checkpoint.

    # the likeliest answers; OUT has the records of the data with "answers", and "ended", whether each was complete
    qtarget generate --hf-model DIR --data questions.jsonl --out answers.jsonl

    # eight answers to each question, drawn at temperature 1
    qtarget generate --hf-model DIR --data questions.jsonl --out answers.jsonl --temperature 1 --samples 8

    # a Megatron checkpoint, of a whole model or of adapters on DIR
    qtarget generate --hf-model DIR --load CKPT --data questions.jsonl --out answers.jsonl

The data are of any form that training takes, with or without answers: a conversation is asked up to its last answer,
behind the template's generation prompt; a prompt as it is; token ids up to the first target. Prompts and instructions
need no answer beside them. A record keeps its fields, so that what comes can be compared with what it holds.

transformers computes, on one GPU or the CPU: a model that does not fit there is exported (qtarget export) and asked
through vLLM. A checkpoint is exported to a folder beside --out while it is needed. A run that was ended goes on where
it stopped when it is started again with the same words; the same seed gives the same answers on the same machine.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from qtarget_megatron.commands.parsers import add_path, command_parser
from qtarget_megatron.data.forms import add_data_format

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Answer one file; returns the process's exit code: 0 done, 2 bad input."""
    from qtarget_megatron.megatron.faults.ending import exit_code

    return exit_code("generate", lambda: _run(command_line().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    from qtarget_megatron.huggingface import Sampling
    from qtarget_megatron.megatron.jobs.generate import GenerateOptions, generate
    from qtarget_megatron.megatron.runtime.ranks import print_once

    given = vars(args)
    sampling = Sampling(**{each.name: given.pop(each.name) for each in fields(Sampling)})
    count, cut = generate(GenerateOptions(sampling=sampling, **given))
    print_once(f"generate: wrote {count} answers to {args.out}")
    if cut:
        print_once(f"generate: {cut} of them were cut at {sampling.max_new_tokens} tokens: see --max-new-tokens")
    return 0


def command_line() -> argparse.ArgumentParser:
    """The parser of its own flags."""
    parser = command_parser("generate", __doc__)
    add_path(parser, "--hf-model", "DIR", "Hugging Face directory of the model and its tokenizer", required=True)
    add_path(parser, "--load", "CKPT", "Megatron checkpoint with its weights (default: those of --hf-model)")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration of --load (default: the latest)")
    add_path(parser, "--data", "FILE", "the questions, a file or folder as for training", required=True)
    add_data_format(parser)
    parser.add_argument(
        "--data-date", metavar="YYYY-MM-DD", help="the date that a chat template writes which asks for today's"
    )
    add_path(parser, "--out", "FILE", "the records with their answers", required=True)
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token each time (default: 0)"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that have mass P together"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens")
    group.add_argument("--samples", type=int, default=1, metavar="N", help="answers to a question (default: 1)")
    group.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="where an answer is cut (default: 512)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions at a time (default: 16)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="what is computed in (default: bfloat16 on a GPU, float32 on the CPU)"
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU; the default where no GPU is found")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace --out, and fields of the same names in the records"
    )
    return parser


if __name__ == "__main__":
    from qtarget_megatron.megatron.faults import ending

    ending.run("generate", main)
