"""Data of one's own, and lm-evaluation-harness as the judge: for models that need a cluster.

The harness is a program of its own, in an environment of its own: https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.study.evaluate import Evaluation, sampled_name
from examples.study.results import pack
from examples.study.study_file import Arm

# What a run of the harness is called; the second one is made once for each repeat.
GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True)
class Harness:
    """Training data in a file, and tasks of lm-evaluation-harness.

    train:        the file, of any form that finetune reads.
    tasks:        that the report compares.
    dev_tasks:    that learning rates are chosen by; other problems than those of tasks.
    metric:       of every task, 0 or 1 for each problem.
    filter:       of the answers, where tasks have several.
    repeats:      how many times answers are drawn at temperature 1.
    command:      what starts the harness.
    model:        its backend; model_args: of it, besides the model's directory.
    arguments:    more words of its command line.
    """

    train: str
    tasks: tuple[str, ...]
    dev_tasks: tuple[str, ...]
    metric: str = "exact_match"
    filter: str | None = None
    repeats: int = 4
    command: str = "lm_eval"
    model: str = "vllm"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tasks or not self.dev_tasks:
            raise ValueError("expected tasks and dev_tasks of lm-evaluation-harness, one of each at least")
        if shared := set(self.tasks) & set(self.dev_tasks):
            raise ValueError(f"{min(shared)} is among tasks and dev_tasks: what chooses must not be what is compared")
        if self.repeats < 1:
            raise ValueError(f"repeats: expected 1 or more, got {self.repeats}")

    def write_training(self, path: Path, arm: Arm, count: int, seed: int) -> Path:
        """The file as it is: the order of its samples follows from the seed."""
        if not Path(self.train).exists():
            raise ValueError(f"train: there is no {self.train}")
        return Path(self.train)

    def command_lines(self, model: Path, temperatures: Sequence[float], folder: Path) -> dict[str, list[str]]:
        """Name of each run of the harness, GREEDY, "sampled-1", ... -> its words."""
        found = {GREEDY: self._words(model, "temperature=0,do_sample=False", folder / GREEDY, 0)}
        for temperature in temperatures:
            for repeat in range(1, self.repeats + 1):
                name = f"{sampled_name(temperature)}-{repeat}"
                drawn = f"temperature={temperature:g},do_sample=True"
                found[name] = self._words(model, drawn, folder / name, repeat)
        return found

    def _words(self, model: Path, drawn: str, out: Path, seed: int) -> list[str]:
        args = {"pretrained": model, **self.model_args}
        if self.model == "vllm":
            args["seed"] = seed
        words = [*shlex.split(self.command), "--model", self.model]
        words += ["--model_args", ",".join(f"{key}={value}" for key, value in args.items())]
        words += ["--tasks", ",".join([*self.dev_tasks, *self.tasks]), "--gen_kwargs", drawn, "--seed", str(seed)]
        return [*words, "--output_path", str(out), "--log_samples", *self.arguments]

    def evaluate(self, model: Path, base: Path, temperatures: Sequence[float], folder: Path) -> Evaluation:
        """Scores of the likeliest answers and of drawn ones; a run that is there is not made again."""
        found: dict[str, dict[str, list[float]]] = {}
        for name, words in self.command_lines(model, temperatures, folder / "lm_eval").items():
            out = folder / "lm_eval" / name
            if not list(out.rglob("results_*.json")):
                out.mkdir(parents=True, exist_ok=True)
                with open(out / "log", "w", encoding="utf-8") as log:
                    ended = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
                if ended.returncode != 0:
                    raise ValueError(f"{' '.join(words)} ended with {ended.returncode} (log: {out / 'log'})")
            found[name] = {task: read_samples(out, task, self.metric, self.filter) for task in self._all_tasks()}
        return self._evaluation(found, temperatures)

    def _all_tasks(self) -> list[str]:
        return [*self.dev_tasks, *self.tasks]

    def _evaluation(self, found: dict[str, dict[str, list[float]]], temperatures: Sequence[float]) -> Evaluation:
        """found: run of the harness -> task -> score of each problem."""
        result = Evaluation()
        names = {GREEDY: [GREEDY]}
        for temperature in temperatures:
            kind = sampled_name(temperature)
            names[kind] = [f"{kind}-{repeat}" for repeat in range(1, self.repeats + 1)]
        for kind, runs in names.items():
            by_task = {}
            for task in self._all_tasks():
                columns = [found[run][task] for run in runs]
                by_task[task] = [sum(values) / len(values) for values in zip(*columns, strict=True)]
            for prefix, tasks in (("dev ", self.dev_tasks), ("", self.tasks)):
                result.metrics[prefix + kind] = sum(_mean(by_task[task]) for task in tasks) / len(tasks)
            for task in self.tasks:
                result.metrics[f"{task} {kind}"] = _mean(by_task[task])
            result.outcomes[kind] = pack([value for task in self.tasks for value in by_task[task]])
        dev = [result.metrics[f"dev {kind}"] for kind in (GREEDY, SAMPLED) if f"dev {kind}" in result.metrics]
        result.metrics["dev"] = sum(dev) / len(dev)
        return result


def read_samples(folder: Path, task: str, metric: str, chosen: str | None) -> list[float]:
    """The metric of each problem of a task, in the order of their numbers, from samples_TASK_*.jsonl of the harness.

    chosen: the filter; None: the only one. ValueError where there is no such file or metric, or there are several
    filters and none is chosen.
    """
    files = sorted(folder.rglob(f"samples_{task}_[0-9]*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: expected samples_{task}_*.jsonl, as --log_samples writes it, found none")
    records = [json.loads(line) for line in files[-1].read_text("utf-8").splitlines()]
    filters = list(dict.fromkeys(record.get("filter", "none") for record in records))
    if chosen is None and len(filters) > 1:
        raise ValueError(f"{task} has the filters {', '.join(filters)}: say which counts, with filter = {filters[0]!r}")
    kept = [
        record for record in records if chosen is None or record.get("filter", "none") == chosen or len(filters) == 1
    ]
    if not kept or metric not in kept[0]:
        raise ValueError(f"{files[-1]}: expected the metric {metric} of the filter {chosen or filters[0]}, found none")
    return [float(record[metric]) for record in sorted(kept, key=lambda record: record["doc_id"])]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
