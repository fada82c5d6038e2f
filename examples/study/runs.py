"""The trainings of a study: which there are, which can begin, and the learning rates that the dev split chooses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.study.study_file import Study

# Results by the run that they are of.
Results = Mapping["Run", Mapping[str, Any]]


@dataclass(frozen=True, order=True)
class Run:
    """A training, by the names of its study."""

    base: str
    data: str
    arm: str
    learning_rate: float
    seed: int
    steps: int

    def __str__(self) -> str:
        return f"{self.data} {self.base}, {self.arm}, lr {self.learning_rate:g}, seed {self.seed}, {self.steps} steps"


def digest(study: Study, run: Run) -> str:
    """What a run depends on besides its own names, as a short hexadecimal number: another one is another run."""
    known = {
        "run": asdict(run),
        # A directory by its name: the same model may lie elsewhere.
        "base": {
            key: value.name if isinstance(value, Path) else value
            for key, value in asdict(study.bases[run.base]).items()
        },
        "data": dict(study.data[run.data].condition),
        "arm": asdict(study.arms[run.arm]),
        "steps": study.steps,
        "demonstrations": study.demonstrations,
        "flags": dict(study.flags),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def possible_runs(study: Study, results: Results) -> list[Run]:
    """All runs that are known by now, in the order in which they are wanted; those with results are among them.

    Those at a chosen learning rate follow once its sweep is done."""
    found: dict[Run, None] = {}
    for grid in study.grids:
        for data in grid.data:
            for base in grid.bases:
                for arm in grid.arms:
                    found |= dict.fromkeys(_sweep(study, base, data, arm))
                    rate = learning_rate(study, results, base, data, arm)
                    if rate is None:
                        continue
                    for steps in grid.steps or (study.steps,):
                        found |= dict.fromkeys(Run(base, data, arm, rate, seed, steps) for seed in range(grid.seeds))
    return list(found)


def number_of_runs(study: Study) -> int:
    """How many there are when all learning rates are chosen."""
    sweeps: set[Run] = set()
    at_chosen = set()
    for grid in study.grids:
        for data in grid.data:
            for base in grid.bases:
                for arm in grid.arms:
                    sweep = _sweep(study, base, data, arm)
                    sweeps |= set(sweep)
                    swept_here = study.data[data].learning_rates_from is None and len(study.learning_rates) > 1
                    for steps in grid.steps or (study.steps,):
                        for seed in range(grid.seeds):
                            # The first seed at the whole length is one of the sweep's.
                            if not (seed == 0 and steps == study.steps and swept_here):
                                at_chosen.add((base, data, arm, seed, steps))
    return len(sweeps) + len(at_chosen)


def _sweep(study: Study, base: str, data: str, arm: str) -> list[Run]:
    """The runs that a learning rate is chosen by; none where there is no choice."""
    source = study.data[data].learning_rates_from or data
    if len(study.learning_rates) == 1:
        return []
    return [Run(base, source, arm, rate, 0, study.steps) for rate in study.learning_rates]


def learning_rate(study: Study, results: Results, base: str, data: str, arm: str) -> float | None:
    """The learning rate with the best dev score, the smaller of equals; None before its sweep is done."""
    if len(study.learning_rates) == 1:
        return study.learning_rates[0]
    sweep = _sweep(study, base, data, arm)
    if any(run not in results for run in sweep):
        return None
    return max(sorted(sweep), key=lambda run: results[run]["metrics"]["dev"]).learning_rate
