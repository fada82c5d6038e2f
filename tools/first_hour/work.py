"""What a step has at hand: commands whose output is in its log, and the ways in which it ends."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.benchmarking import machine, step, workers

LOGGED = ("lm loss", "grad norm")
Curves = dict[str, list[float]]  # of each, a value a step
# Float32 products as they are, not in TF32: what is compared with the CPU's.
FLOAT32 = {"NVIDIA_TF32_OVERRIDE": "0"}


class NotRun(Exception):
    """The step cannot be run on this machine; the message says why."""


class Failed(Exception):
    """The step was run and something is wrong; the message says what."""


@dataclass(frozen=True)
class Work:
    """folder: of the step's own files, empty at its start; of other steps' beside it. log: where output is added.
    limit: seconds of the step. gpus: how many there are; capability: of the first one."""

    folder: Path
    log: Path
    limit: float
    gpus: int
    capability: tuple[int, int]

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
        """What a command prints, run in the repository; MeasurementFailed where it fails."""
        return workers.output_of(
            command,
            what=Path(command[0]).name,
            folder=machine.ROOT,
            environment=os.environ | dict(environment or {}),
            timeout=self.limit,
            log=self.log,
        )

    def python(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        return self.run([sys.executable, *words], environment)

    def ranks(self, words: Sequence[str], size: int, environment: Mapping[str, str] | None = None) -> str:
        """What a module prints, run by so many ranks in the step's folder."""
        # Megatron asks for it where tensor or context parallelism overlaps with computation.
        variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | dict(environment or {})
        return step.launch(self.folder, list(words), size, 1, self.limit, variables, self.log)

    def train(
        self, shape: step.Shape, words: Sequence[str], size: int = 1, environment: Mapping[str, str] | None = None
    ) -> Curves:
        """What a training logs, on what step.write has written; Failed where a value is not finite."""
        text = self.ranks(step.training(shape, list(words)), size, environment)
        curves = {name: step.logged(text, name) for name in LOGGED}
        for name, values in curves.items():
            # Megatron's console has one figure for the first two steps.
            if len(values) < shape.steps - 1 or not all(map(math.isfinite, values)):
                raise Failed(f"{name}: expected {shape.steps - 1} finite values or more, got {values}")
        return curves

    def needs_gpus(self, count: int) -> None:
        if self.gpus < count:
            raise NotRun(f"it needs {count} GPUs, and there is {self.gpus}")

    def needs_engine(self) -> None:
        needs("transformer_engine", "Transformer Engine", "pip install '.[gpu]' --no-build-isolation")


def needs(module: str, name: str, remedy: str) -> None:
    """NotRun where a module is not there."""
    if importlib.util.find_spec(module) is None:
        raise NotRun(f"{name} is not installed ({remedy})")
