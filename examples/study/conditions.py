"""The kinds of data of a study: each writes its demonstrations, and evaluates what was trained on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from examples.study.evaluate import Evaluation, evaluate
from examples.study.lm_eval import Harness
from examples.study.real import RealProblems
from examples.study.study_file import Arm, Data
from examples.study.tasks import Condition


class StudyCondition(Protocol):
    """A kind of data."""

    def write_training(self, path: Path, arm: Arm, count: int, seed: int) -> Path:
        """The training file of a run: ``path``, written now, or one that was there. count: of demonstrations."""

    def evaluate(self, model: Path, base: Path, temperatures: Sequence[float], folder: Path) -> Evaluation:
        """What a trained model can do; folder: for what is kept."""


class MadeUp:
    """Demonstrations of the made-up tasks, other ones for each seed."""

    def __init__(self, condition: Condition):
        self.condition = condition

    def write_training(self, path: Path, arm: Arm, count: int, seed: int) -> Path:
        records = self.condition.demonstrations(count, seed)
        if arm.objective == "cft":
            records = [record | {"critical": critical(record["completion"])} for record in records]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        return path

    def evaluate(self, model: Path, base: Path, temperatures: Sequence[float], folder: Path) -> Evaluation:
        return evaluate(model, base, self.condition, temperatures)


def critical(completion: str) -> list[bool]:
    """For each token, the one that ends the solution included, whether it is of a step's result or of the answer, or a
    sign behind one of them.

    What a step asks follows from the steps before it."""
    *steps, answer = completion.split(";")
    found = []
    for step in steps:
        begin = max(step.rfind(sign) for sign in "=:>") + 1
        found += [place >= begin for place in range(len(step) + 1)]
    return found + [True] * (len(answer) + 1)


# The key that a table of a study file is known by -> what reads it.
_KINDS: dict[str, tuple[Any, Any]] = {
    "task": (Condition, MadeUp),
    "source": (RealProblems, lambda problems: problems),
    "train": (Harness, lambda harness: harness),
}


def condition_of(data: Data) -> StudyCondition:
    """What a study file calls [data.NAME]. ValueError for keys that are none of its kind's."""
    table = dict(data.condition)
    for key, (made, kind) in _KINDS.items():
        if key in table:
            return kind(_made(key, data.name, table, made))
    raise ValueError(
        f"[data.{data.name}]: expected task (a made-up one), source (gsm8k or math), or train with tasks (files of "
        "your own, evaluated by lm-evaluation-harness)"
    )


def _made(kind: str, name: str, table: Mapping[str, Any], made: Any) -> Any:
    known = {field.name for field in fields(made)}
    if strange := sorted(table.keys() - known):
        raise ValueError(
            f"[data.{name}]: unknown key {strange[0]!r} beside {kind}: expected {', '.join(sorted(known))}"
        )
    try:
        return made(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"[data.{name}]: {error}") from error
