"""The results of a study, a line of JSON each: what is there need not be run again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from examples.study.runs import Run, digest
from examples.study.study_file import Study


class ResultsFile:
    """results.jsonl of a study.

    A line holds base, data, arm, learning_rate, seed and steps of its run; digest, of all that it depends on; metrics;
    outcomes, for each test problem whether its answer was right (pack()); training, means of the log; seconds; commit.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self, study: Study) -> dict[Run, dict[str, Any]]:
        """The results of the study's runs as they are defined now; lines of others, and a last one that was cut, are
        passed over."""
        found = {}
        for line in self._lines():
            run = Run(**{key: line[key] for key in Run.__dataclass_fields__})
            known = run.base in study.bases and run.data in study.data and run.arm in study.arms
            if known and digest(study, run) == line["digest"]:
                found[run] = line
        return found

    def append(self, study: Study, run: Run, result: Mapping[str, Any]) -> None:
        """A line, which is on the disk when this returns."""
        line = json.dumps({**asdict(run), "digest": digest(study, run), **result}) + "\n"
        with open(self.path, "a+b") as file:
            file.seek(0)
            text = file.read()
            file.truncate(text.rfind(b"\n") + 1)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise ValueError(
                    f"{self.path}, line {number}: expected JSON: delete the line to run it again"
                ) from None


def pack(right: Sequence[bool] | Sequence[float]) -> str | list[float]:
    """Outcomes of problems: right and wrong as hexadecimal digits behind their number, "5:a8" is right, wrong, right,
    wrong, right; shares, of several answers to a problem, as they are."""
    if all(value in (0, 1) for value in right):
        return f"{len(right)}:{np.packbits(np.array(right, dtype=bool)).tobytes().hex()}"
    return [round(float(value), 4) for value in right]


def unpack(outcomes: str | list[float]) -> np.ndarray:
    """The float64 [problems] that pack() wrote."""
    if isinstance(outcomes, list):
        return np.array(outcomes, dtype=float)
    count, _, digits = outcomes.partition(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))[: int(count)].astype(float)
