"""One training with its evaluation, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from examples.study.conditions import condition_of
from examples.study.runs import Run
from examples.study.study_file import Study

RESULT = "result.json"
LOG = "train.log"
# Values of the log whose means over the steps are kept.
_LOGGED = ("total mass", "trust", "p(y)")


@dataclass(frozen=True)
class Models:
    """The directories of a base: base, and strong where there is one."""

    base: Path
    strong: Path | None = None


def do(study: Study, run: Run, models: Models, folder: Path) -> None:
    """Train and evaluate: result.json appears in the folder when both are done. ValueError where it cannot be."""
    arm, condition = study.arms[run.arm], condition_of(study.data[run.data])
    if "save-interval" not in study.flags:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # A training of no steps is the base as it is.
    model = folder / "model" if run.steps else models.base
    if not model.is_dir():
        train = condition.write_training(folder / "train.jsonl", arm, study.demonstrations, run.seed)
        if arm.keep < 1:
            scored = _scored(study, models.base, None, train, folder / "likelihoods.jsonl")
            train = keep_likeliest(scored, folder / "kept.jsonl", arm.keep)
        train = _with_side_inputs(study, run, models, train, folder)
        finetune(study, training_words(study, run, models, train, folder), folder / LOG)
    trained = time.monotonic()
    found = condition.evaluate(model, models.base, arm.temperatures, folder)
    result = {
        "metrics": found.metrics,
        "outcomes": found.outcomes,
        "training": read_log(folder / "metrics.jsonl") if run.steps else {},
        "seconds": {"train": trained - started, "evaluate": time.monotonic() - trained},
    }
    temporary = folder / f"{RESULT}.new"
    temporary.write_text(json.dumps(result), "utf-8")
    temporary.replace(folder / RESULT)


def training_words(study: Study, run: Run, models: Models, train: Path, folder: Path) -> list[str]:
    """finetune's command line."""
    from qtarget_megatron import objectives

    arm = study.arms[run.arm]
    words: dict[str, Any] = {
        "hf-model": models.base,
        "sft-train": train,
        "objective": arm.objective,
        "train-iters": run.steps,
        # A shorter training is the beginning of the whole one.
        "lr-decay-iters": study.steps,
        "lr": run.learning_rate,
        "seed": run.seed + 1,
        "log-interval": 1,
        "tensorboard-log-interval": 1,
        "metrics-jsonl": folder / "metrics.jsonl",
        "save-hf": folder / "model",
    }
    flags = dict(study.flags)
    itself = flags.pop("teacher-self", False)
    if objectives.from_arguments(arm.objective, list(arm.args)).needs_teacher:
        if itself and arm.teacher == "base":
            words["teacher-self"] = True
        else:
            words["teacher-hf"] = models.strong if arm.teacher == "strong" else models.base
    if "save-interval" in study.flags:
        words |= {"save": folder / "checkpoint", "load": folder / "checkpoint"}
    return [*flag_words(words | flags), *(["--objective-args", *arm.args] if arm.args else [])]


def flag_words(flags: dict[str, Any]) -> list[str]:
    """{"lr": 0.001, "bf16": True} as --lr 0.001 --bf16."""
    words = []
    for name, value in flags.items():
        if value is False:
            continue
        words += [f"--{name}"]
        words += [] if value is True else [str(part) for part in (value if isinstance(value, list) else [value])]
    return words


def finetune(study: Study, words: list[str], log: Path) -> None:
    """Run qtarget finetune: with the study's launcher, or forked from this process. ValueError where it fails."""
    command(study.launcher, "finetune", words, log)


def command(launcher: Sequence[str], name: str, words: list[str], log: Path) -> None:
    """Run a command of qtarget. launcher: what starts its ranks; empty: one process, forked from this one."""
    if launcher:
        from examples.demo.launch import LaunchFailed, launch

        try:
            launch(
                [*launcher, "-m", f"qtarget_megatron.{name}", *words],
                env=dict(os.environ, PYTHONUNBUFFERED="1"),
                log=log,
                on_line=lambda line: None,
            )
        except LaunchFailed as error:
            raise ValueError(str(error)) from None
        return
    process = multiprocessing.get_context("fork").Process(target=_be_command, args=(name, words, log))
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    if process.exitcode != 0:
        raise ValueError(f"qtarget {name} ended with {process.exitcode}: {_last_words(log)}")


def _be_command(name: str, words: list[str], log: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    to_file(log)
    module = {"finetune": "qtarget_megatron.finetune", "score": "qtarget_megatron.commands.score"}[name]
    code = importlib.import_module(module).main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the exit handlers of the process that it was forked from.
    os._exit(code)


def _with_side_inputs(study: Study, run: Run, models: Models, train: Path, folder: Path) -> Path:
    """The training file with what the objective reads besides, from qtarget score."""
    from qtarget_megatron import objectives

    arm = study.arms[run.arm]
    asked = set(objectives.from_arguments(arm.objective, list(arm.args)).token_inputs)
    if not asked & {"old_log_prob", "weight"}:
        return train
    if "weight" in asked:
        # Samples count more where the better model finds them likelier than the base does.
        return _scored(study, models.strong, models.base, train, folder / "scored.jsonl")
    return _scored(study, models.base, None, train, folder / "scored.jsonl")


# Flags of the training that its scoring takes as well.
_SCORING = {
    "cpu", "bf16", "fp16", "data-format", "seq-length", "micro-batch-size", "sequence-parallel",
    "tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size", "expert-model-parallel-size",
    "expert-tensor-parallel-size",
}  # fmt: skip


def _scored(study: Study, model: Path, reference: Path | None, data: Path, out: Path) -> Path:
    """The data with each token's log p under a model, and weights against a reference; by qtarget score."""
    if not out.exists():
        words = {"hf-model": model, "data": data, "out": out, "overwrite": True}
        words |= {} if reference is None else {"reference-hf": reference}
        words |= {name: value for name, value in study.flags.items() if name in _SCORING}
        command(study.launcher, "score", flag_words(words), out.with_suffix(".log"))
    return out


def keep_likeliest(scored: Path, out: Path, keep: float) -> Path:
    """Write the share of scored records with the highest mean log p of a token, in their order."""
    records = [json.loads(line) for line in scored.read_text("utf-8").splitlines()]
    means = [statistics.fmean(record.pop("old_log_prob") or [-math.inf]) for record in records]
    order = sorted(range(len(records)), key=lambda number: -means[number])
    kept = sorted(order[: max(1, round(keep * len(records)))])
    out.write_text("".join(json.dumps(records[number]) + "\n" for number in kept), "utf-8")
    return out


def read_log(path: Path) -> dict[str, float]:
    """Means over the steps of --metrics-jsonl; loss first and loss last besides."""
    steps = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found = {}
    for name in _LOGGED:
        values = [step[name] for step in steps if step.get(name) is not None]
        if values:
            found[name] = statistics.fmean(values)
    losses = [step["lm loss"] for step in steps if step.get("lm loss") is not None]
    return found | ({"loss first": losses[0], "loss last": losses[-1]} if losses else {})


def _last_words(log: Path) -> str:
    """The line of a log that says what went wrong, or its last ones."""
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    return (errors or lines or ["it has printed nothing"])[-1][:500]


def to_file(log: Path) -> None:
    """Send what this process prints to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def end_with_parent() -> None:
    """End this process when the one that started it has ended, however that ended."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def as_process(work: Callable[[], None], log: Path) -> None:
    """Be the process of a job: what fails is its last line."""
    from examples.demo.launch import sigterm_as_interrupt

    end_with_parent()
    log.parent.mkdir(parents=True, exist_ok=True)
    to_file(log)
    code = 1
    with contextlib.suppress(KeyboardInterrupt):
        try:
            with sigterm_as_interrupt():
                work()
            code = 0
        except ValueError as error:
            print(f"study: error: {error}", flush=True)
    sys.stdout.flush()
    os._exit(code)
