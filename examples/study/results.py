"""The results of a study, a line of JSON each: what is there need not be run again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
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


def pack(right: list[bool]) -> str:
    """Outcomes as hexadecimal digits, the number of problems before them: "5:a8" is right, wrong, right, wrong, right."""
    return f"{len(right)}:{np.packbits(np.array(right, dtype=bool)).tobytes().hex()}"


def unpack(text: str) -> np.ndarray:
    """The bool [problems] that pack() wrote."""
    count, _, digits = text.partition(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))[: int(count)].astype(bool)
