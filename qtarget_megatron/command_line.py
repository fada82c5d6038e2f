"""Command lines that are wrong, in one line each, and the cause of a failure where torch's launcher looks for it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn

# Flags of other trainers -> what they are called here.
SYNONYMS = {
    ("learning-rate",): ("--lr",),
    ("num-epochs", "num-train-epochs", "max-epochs", "epoch"): ("--epochs",),
    ("max-steps", "max-iters", "train-steps", "num-train-steps", "total-steps", "steps"): ("--train-iters",),
    ("per-device-train-batch-size", "train-batch-size", "train-micro-batch-size-per-gpu"): (
        "--micro-batch-size",
        "--global-batch-size",
    ),
    ("per-device-eval-batch-size", "eval-batch-size"): ("--eval-micro-batch-size", "--micro-batch-size"),
    ("gradient-accumulation-steps", "gradient-accumulation", "grad-accum-steps"): ("--global-batch-size",),
    ("max-seq-length", "max-seq-len", "max-length", "max-len", "model-max-length", "cutoff-len", "sequence-len"): (
        "--seq-length",
    ),
    ("model-name-or-path", "model-name", "model-path", "model", "base-model", "pretrained-model"): ("--hf-model",),
    ("teacher-model-name-or-path", "teacher-model", "teacher", "reference-model", "ref-model"): ("--teacher-hf",),
    ("output-dir", "output-path", "output", "out-dir", "save-dir"): ("--save-hf", "--save"),
    ("resume-from-checkpoint", "resume", "resume-from"): ("--load",),
    ("train-file", "train-data", "train-dataset", "dataset", "dataset-name", "dataset-path", "data-file"): (
        "--sft-train",
    ),
    ("packing", "sample-packing", "sequence-packing", "pack-sequences", "neat-packing"): ("--pack",),
    ("truncation-strategy", "overlong-filter"): ("--long-samples",),
    ("max-tokens", "max-tokens-per-batch", "max-packed-tokens"): ("--max-tokens-per-row",),
    ("validation-file", "eval-file", "valid-data", "eval-dataset", "val-file"): ("--sft-valid",),
    ("warmup-steps", "num-warmup-steps", "warmup-iters", "lr-warmup-steps"): ("--lr-warmup-iters",),
    ("warmup-ratio",): ("--lr-warmup-fraction",),
    ("lr-scheduler-type", "lr-scheduler", "scheduler"): ("--lr-decay-style",),
    ("min-learning-rate", "lr-min"): ("--min-lr",),
    ("max-grad-norm", "gradient-clipping", "grad-clip", "gradient-clip-val"): ("--clip-grad",),
    ("adam-epsilon",): ("--adam-eps",),
    ("optim",): ("--optimizer",),
    ("save-steps", "checkpoint-interval"): ("--save-interval",),
    ("eval-steps", "val-check-interval"): ("--eval-interval",),
    ("logging-steps", "log-every-n-steps"): ("--log-interval",),
    ("gradient-checkpointing", "activation-checkpointing"): ("--recompute-granularity",),
    ("tensor-parallel-size", "tensor-parallel", "tp", "tp-size"): ("--tensor-model-parallel-size",),
    ("pipeline-parallel-size", "pipeline-parallel", "pp", "pp-size"): ("--pipeline-model-parallel-size",),
    ("context-parallel", "cp", "cp-size"): ("--context-parallel-size",),
    ("expert-parallel-size", "ep", "ep-size"): ("--expert-model-parallel-size",),
    ("deepspeed", "fsdp", "zero-stage"): ("--use-distributed-optimizer",),
    ("torch-dtype", "dtype", "precision", "mixed-precision"): ("--bf16", "--fp16"),
    ("loss", "loss-type", "loss-fn"): ("--objective",),
    ("report-to", "logging-dir"): ("--tensorboard-dir", "--wandb-project"),
    ("dataloader-num-workers",): ("--num-workers",),
    ("ddp-timeout",): ("--distributed-timeout-minutes",),
}
_OWN_HELP = "--help lists the flags"
_ALL_HELP = "--help lists this program's flags, qtarget finetune --help-megatron Megatron's"
# argparse's words.
_UNKNOWN, _MISSING = "unrecognized arguments: ", "the following arguments are required: "

# Flags of the parsers that have been asked in this process: a tool's own come before Megatron's.
_asked: set[str] = set()


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are a ValueError of one line: no usage of hundreds of lines before it."""

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        _asked.update(self._option_string_actions)
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(self._given, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith(_MISSING):
            required = message.removeprefix(_MISSING).split(", ")
            for flag in dict.fromkeys(word.partition("=")[0] for word in self._given if word.startswith("--")):
                if flag not in self._option_string_actions and (found := meant(flag, required)):
                    message += f"; {flag}: did you mean {' or '.join(found)}?"
        _refuse(message, self._option_string_actions, _OWN_HELP)


def refuse(message: str, known: Collection[str]) -> NoReturn:
    """Raise the ValueError for argparse's message about Megatron's flags; known: those of its parser."""
    _refuse(message, _asked.union(known), _ALL_HELP)


def _refuse(message: str, known: Collection[str], help: str) -> NoReturn:
    if message.startswith(_UNKNOWN):
        message = f"{_unknown(message.removeprefix(_UNKNOWN).split(), sorted(known))}: {help}"
    raise ValueError(" ".join(message.split()))


def _unknown(words: Sequence[str], known: Collection[str]) -> str:
    """What to say of words that no parser has taken; known: all flags there are."""
    flags = list(dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("-") and not _number(word)))
    if not flags:
        return f"unexpected {words[0]!r}: expected a flag before it"
    said = []
    for flag in flags:
        found = meant(flag, known)
        said.append(f"{flag} (did you mean {' or '.join(found)}?)" if found else flag)
    return f"unknown flag{'s' if len(flags) > 1 else ''} {', '.join(said)}"


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def meant(flag: str, known: Collection[str]) -> list[str]:
    """The flags among known that an unknown one may stand for, the likeliest first."""
    bare = flag.lstrip("-").lower().replace("_", "-")
    if f"--{bare}" in known:
        return [f"--{bare}"]
    for names, here in SYNONYMS.items():
        if bare in names:
            return [name for name in here if name in known]
    return difflib.get_close_matches(f"--{bare}", known, n=2, cutoff=0.75)


def record_cause(line: str, details: str | None = None) -> None:
    """Write why this process fails to the file that torch's launcher shows it from, in torch's format; without a
    launcher nothing happens. The first call counts.

    The launcher takes the earliest of all ranks for the root cause, by whole seconds. details: shown in place of line.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    extra = {"py_callstack": details or line, "timestamp": str(int(time.time()))}
    # What cannot be written there, as on a full disk, is in the output all the same.
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": line, "extraInfo": extra}}, file)
