"""--metrics-jsonl: every value that Megatron logs, a line of JSON for each step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

# Megatron logs each value once more, counted in samples.
_BY_SAMPLES = " vs samples"


class MetricsFile:
    """Takes the place of Megatron's TensorBoard writer, and hands on to it what it is given.

    A line is {"step": N, VALUE: number or null, ...} under the names of TensorBoard; null is NaN or infinity. It is
    written when the next step begins, and at flush(). A training that resumes goes on behind the lines of the steps
    before its first one; what an earlier start has written of later steps is dropped.
    """

    def __init__(self, path: Path, writer: Any = None):
        """writer: Megatron's, None where nothing else is written."""
        self._path, self._writer = path, writer
        self._step: int | None = None
        self._values: dict[str, float | None] = {}
        self._begin = 0  # of the line of this step in the file

    def add_scalar(self, tag: str, value: Any, step: int, *arguments: Any, **keywords: Any) -> None:
        """As SummaryWriter has it."""
        if self._writer is not None:
            self._writer.add_scalar(tag, value, step, *arguments, **keywords)
        if tag.endswith(_BY_SAMPLES):
            return
        if self._step is None:
            self._begin = _end_of_steps_before(self._path, step)
        elif step != self._step:
            self._write()
            self._begin, self._values = self._path.stat().st_size, {}
        number = float(value)
        self._step, self._values[tag] = step, number if math.isfinite(number) else None

    def flush(self) -> None:
        """Write what is there of the step; values that come later are added to its line."""
        if self._writer is not None:
            self._writer.flush()
        self._write()

    def _write(self) -> None:
        if self._step is None:
            return
        line = json.dumps({"step": self._step, **self._values}) + "\n"
        with open(self._path, "r+b" if self._path.exists() else "w+b") as file:
            file.truncate(self._begin)
            file.seek(self._begin)
            file.write(line.encode())

    def __getattr__(self, name: str) -> Any:
        """Other methods of SummaryWriter; nothing where there is none."""
        if self._writer is None:
            return lambda *arguments, **keywords: None
        return getattr(self._writer, name)


def _end_of_steps_before(path: Path, step: int) -> int:
    """Where in the file the lines of steps before this one end; incomplete and foreign lines are no such lines."""
    end = 0
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                is_before = line.endswith(b"\n") and json.loads(line)["step"] < step
            except (ValueError, TypeError, KeyError):
                is_before = False
            if not is_before:
                break
            end += len(line)
    return end


def check_metrics_file(path: Path) -> None:
    """ValueError where the file cannot be written."""
    if path.is_dir():
        raise ValueError(f"--metrics-jsonl {path}: expected the name of a file, got a directory")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--metrics-jsonl {path}: there is no directory {path.absolute().parent}: create it")
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"--metrics-jsonl {path}: {error.strerror}: choose another file") from error
