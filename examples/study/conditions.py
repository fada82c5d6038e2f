"""The kinds of data of a study: each writes its demonstrations, and evaluates what was trained on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from examples.study.evaluate import Evaluation, evaluate, likeliest
from examples.study.study_file import Arm, Data
from examples.study.tasks import Condition


class StudyCondition(Protocol):
    """A kind of data."""

    def write_training(self, path: Path, arm: Arm, base: Path, count: int, seed: int) -> Path:
        """The training file of a run: ``path``, written now, or one that was there."""

    def evaluate(self, model: Path, base: Path, temperatures: Sequence[float], folder: Path) -> Evaluation:
        """What a trained model can do; folder: for what is kept."""


class MadeUp:
    """Demonstrations of the made-up tasks, other ones for each seed."""

    def __init__(self, condition: Condition):
        self.condition = condition

    def write_training(self, path: Path, arm: Arm, base: Path, count: int, seed: int) -> Path:
        records = self.condition.demonstrations(count, seed)
        if arm.keep < 1:
            records = likeliest(records, arm.keep, base)
        if arm.objective == "cft":
            records = [record | {"critical": _critical(record["completion"])} for record in records]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        return path

    def evaluate(self, model: Path, base: Path, temperatures: Sequence[float], folder: Path) -> Evaluation:
        return evaluate(model, base, self.condition, temperatures)


def _critical(completion: str) -> list[bool]:
    """For each token whether it is a step's result, or of the answer: what a step's question follows from is known."""
    *steps, answer = completion.split(";")
    found = []
    for step in steps:
        begin = max(step.rfind(sign) for sign in "=:>") + 1
        found += [place >= begin for place in range(len(step))] + [False]
    return found + [True] * (len(answer) + 1)


def condition_of(data: Data) -> StudyCondition:
    """What a study file calls [data.NAME]. ValueError for keys that are none of its kind's."""
    table = dict(data.condition)
    if "task" in table:
        return MadeUp(_made("task", data.name, table, Condition))
    raise ValueError(f"[data.{data.name}]: expected task")


def _made(kind: str, name: str, table: Mapping[str, Any], made: Any) -> Any:
    known = {field.name for field in fields(made)}
    if strange := sorted(table.keys() - known):
        raise ValueError(
            f"[data.{name}]: unknown key {strange[0]!r} beside {kind}: expected {', '.join(sorted(known))}"
        )
    try:
        return made(**table)
    except (TypeError, ValueError) as error:
        raise ValueError(f"[data.{name}]: {error}") from error
