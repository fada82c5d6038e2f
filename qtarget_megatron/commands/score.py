"""Score a data set with a frozen model: the side inputs that iw-sft, weighted-sft and psft train with.

    # log p of every supervised token under the model before training: "old_log_prob", for psft with
    # refresh=0, and for iw-sft with start=data, in the place of a second model
    qtarget score --hf-model DIR --data train.jsonl --out scored.jsonl --seq-length 4096

    # besides, "weight", one number a sample, for weighted-sft:
    # clamp(exp(temp * mean_t(log p - log p_ref)), 0, max-weight), p under DIR and p_ref under REF
    qtarget score --hf-model DIR --reference-hf REF --data train.jsonl --out scored.jsonl \\
        --seq-length 4096 --temp 1.0 --max-weight 16

    # a model too large for one process, weights from a Megatron checkpoint
    torchrun --nproc-per-node 8 -m qtarget_megatron.score --hf-model DIR --load CKPT --data train.jsonl \\
        --out scored.jsonl --seq-length 4096 --micro-batch-size 4 --bf16 \\
        --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2

    # then train with the same --seq-length
    torchrun --nproc-per-node 8 -m qtarget_megatron.finetune --hf-model DIR --sft-train scored.jsonl \\
        --objective psft --objective-args refresh=0 --seq-length 4096 ...

What these numbers mean: log-probabilities and weights of models that stay as they are. psft takes them anew from the
trained model every 8 updates; with those of a file it stops at (1 + epsilon_high) times a token's first probability.
iw-sft takes its weight anew in every step, from the model that is trained; "weight" is that formula for two frozen
models, and with the files of --hf-model as --reference-hf exactly 1.

Every record is written back, in order, unchanged but for the new fields. Log-probabilities are in
nats, one for each supervised token within --seq-length; a record without supervised tokens gets an
empty list and no weight.

A run that was ended goes on where it stopped when it is started again with the same inputs, at any
layout: results are kept in OUT.partial until OUT is complete. Every Megatron flag works; the models
compute in float32 unless --bf16 or --fp16 is given.
"""

from __future__ import annotations

import argparse

from qtarget_megatron.commands.parsers import MEGATRON, add_path, add_run, command_parser, run_options


def main(argv: list[str] | None = None) -> int:
    """Score one file; returns the process's exit code: 0 done, 2 bad input."""
    from qtarget_megatron.megatron.faults.ending import exit_code

    def command() -> int:
        parser = command_line()
        ours, words = parser.parse_known_args(argv)
        for flag, value in (("--temp", ours.temp), ("--max-weight", ours.max_weight)):
            if value is not None and ours.reference_hf is None:
                parser.error(f"{flag} belongs to the weight, which needs --reference-hf DIR")
        return _run(ours, words)

    return exit_code("score", command)


def _run(ours: argparse.Namespace, words: list[str]) -> int:
    from qtarget_megatron.megatron.jobs.score import ScoreOptions, score
    from qtarget_megatron.megatron.runtime.ranks import print_once

    options = ScoreOptions(
        **run_options(ours, ours.hf_model),
        reference=ours.reference_hf,
        temperature=1.0 if ours.temp is None else ours.temp,
        max_weight=16.0 if ours.max_weight is None else ours.max_weight,
        overwrite=ours.overwrite,
    )
    count = score(options, words, cpu=ours.cpu)
    print_once(f"score: wrote {count} samples with {' and '.join(options.fields)} to {options.out}")
    return 0


def command_line() -> argparse.ArgumentParser:
    """The parser of its own flags."""
    parser = command_parser("score", __doc__, others=MEGATRON)
    add_run(
        parser,
        model="--hf-model",
        what="the model; tokenizer and chat template too",
        out=("FILE", "the scored records"),
        seq_length=", as in the training to come",
    )
    add_path(parser, "--reference-hf", "DIR", "Hugging Face directory of the reference model: compute weights as well")
    parser.add_argument("--temp", type=float, metavar="X", help="temp in the weight's formula (default: 1)")
    parser.add_argument("--max-weight", type=float, metavar="X", help="largest weight (default: 16)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace --out, and fields of the same names in the records"
    )
    return parser


if __name__ == "__main__":
    from qtarget_megatron.megatron.faults import ending

    ending.run("score", main)
