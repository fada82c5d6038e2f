"""What the results of a study say: values of each arm, arms that follow from others, differences to sft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from examples.study.results import unpack
from examples.study.runs import Results, Run, learning_rate
from examples.study.statistics import Interval, paired_difference
from examples.study.study_file import SFT, Study

# Arms that need no training of their own: the model of sft that is best on dev along its training, and answers of
# sft's model that are drawn at a lower temperature.
EARLY = "sft, early stopping"
COOLER = "sft, at T = 0.5"
_SAMPLED_COOLER = "sampled 0.5"
# Higher is better, but of these.
LESS_IS_BETTER = {"nll"}


class Findings:
    """Results of a study by base, data and arm; seeds in their order."""

    def __init__(self, study: Study, results: Results):
        self.study, self._results = study, results

    def rate(self, base: str, data: str, arm: str) -> float | None:
        """The learning rate that dev has chosen; None before its sweep is done."""
        return learning_rate(self.study, self._results, base, data, SFT if arm in (EARLY, COOLER) else arm)

    def runs(self, base: str, data: str, arm: str, steps: int | None = None) -> dict[int, Mapping[str, Any]]:
        """Seed -> result, at the chosen learning rate; empty where there are none yet."""
        if arm == EARLY:
            return self._early(base, data)
        if arm == COOLER:
            return {seed: _cooler(result) for seed, result in self.runs(base, data, SFT).items() if _has_cooler(result)}
        rate = self.rate(base, data, arm)
        if rate is None:
            return {}
        steps = self.study.steps if steps is None else steps
        found = {}
        for seed in range(max(grid.seeds for grid in self.study.grids)):
            result = self._results.get(Run(base, data, arm, rate, seed, steps))
            if result is not None:
                found[seed] = result
        return found

    def _early(self, base: str, data: str) -> dict[int, Mapping[str, Any]]:
        lengths = sorted({steps for grid in self.study.grids if SFT in grid.arms for steps in grid.steps if steps})
        by_length = [self.runs(base, data, SFT, steps) for steps in [*lengths, self.study.steps]]
        whole = by_length[-1]
        seeds = [seed for seed in whole if lengths and all(seed in found for found in by_length)]
        # The shortest of equals.
        return {seed: max((found[seed] for found in by_length), key=_dev) for seed in seeds}

    def values(self, base: str, data: str, arm: str, metric: str, steps: int | None = None) -> np.ndarray:
        """A metric of each seed, float64 [seeds]; of the log where it is no metric (trust, total mass)."""
        found = self.runs(base, data, arm, steps).values()
        taken = [{**result["training"], **result["metrics"]}.get(metric) for result in found]
        return np.array([value for value in taken if value is not None], dtype=float)

    def difference(self, base: str, data: str, arm: str, metric: str, other: str = SFT) -> Interval | None:
        """An arm's metric minus that of another one, of the seeds and problems that both have; None where there are
        none."""
        one, two = (self.runs(base, data, name) for name in (arm, other))
        seeds = sorted(one.keys() & two.keys())
        if not seeds:
            return None
        pair = [np.stack([_of_problems(found[seed], metric) for seed in seeds]) for found in (one, two)]
        return paired_difference(*pair)

    def verdict(self, base: str, data: str, arm: str, metric: str) -> str | None:
        """win, tie or loss of an arm against sft."""
        found = self.difference(base, data, arm, metric)
        if found is None:
            return None
        if metric in LESS_IS_BETTER:
            found = Interval(-found.mean, -found.high, -found.low)
        return found.verdict

    def measured(self, metrics: Sequence[str]) -> list[str]:
        """Those of the metrics that a result has."""
        return [name for name in metrics if any(name in result["metrics"] for result in self._results.values())]

    def settings(self, arm: str) -> list[tuple[str, str]]:
        """(base, data) of which there are results of an arm, in the order of the grids."""
        pairs = dict.fromkeys((b, d) for grid in self.study.grids for d in grid.data for b in grid.bases)
        return [pair for pair in pairs if self.runs(*pair, arm)]


def _of_problems(result: Mapping[str, Any], metric: str) -> np.ndarray:
    """A metric as [problems]; [1] of one that is no share of right answers."""
    outcome = result["outcomes"].get(metric)
    return unpack(outcome) if outcome is not None else np.array([result["metrics"][metric]])


def _dev(result: Mapping[str, Any]) -> float:
    return result["metrics"]["dev"]


def _has_cooler(result: Mapping[str, Any]) -> bool:
    return _SAMPLED_COOLER in result["metrics"]


def _cooler(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """A result whose sampled answers are those at the lower temperature."""
    found = dict(result)
    for kind in ("metrics", "outcomes"):
        found[kind] = dict(result[kind])
        for prefix in ("", "other ", "dev ", "result ", "dev result "):
            if prefix + _SAMPLED_COOLER in result[kind]:
                found[kind][f"{prefix}sampled"] = result[kind][prefix + _SAMPLED_COOLER]
    return found
