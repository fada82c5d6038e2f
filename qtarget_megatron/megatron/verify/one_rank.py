"""The trainings on one rank that a layout is compared with, in processes of their own that one rank starts.

The reference and its noise are computed on the CPU in float32, with torch alone: no NCCL, no Transformer Engine, no
kernel of a GPU. What measures the noise of the user's precision runs where the ranks run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from qtarget_megatron._version import versions
from qtarget_megatron.megatron.faults.explained import Fault
from qtarget_megatron.megatron.verify.comparison import Training, saved_key

MODULE = "qtarget_megatron.commands.verify_training"
REFERENCE, REORDERED, PRECISION = "reference", "reordered", "precision"
_LAUNCHER = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_", "WORLD_SIZE", "RANK", "SLURM_", "OMPI_", "PMI_")
_LOG = "one-rank.log"
# Files of a folder that trainings read.
_INPUTS = ("config.json", "model.safetensors", "data.jsonl")


@dataclass(frozen=True)
class Job:
    """What one process computes.

    parent:         the process that it ends with.
    runs:           name of each training -> its words.
    objective_file: of the user's, run before.
    on_cpu:         without a GPU, and without what is made for one.
    keys:           name of each training -> a digest of all that it depends on.
    """

    parent: int
    folder: str
    runs: dict[str, list[str]]
    objective_file: str | None
    on_cpu: bool
    keys: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> Job:
        """A job that was written."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def result(self, name: str) -> Path:
        """The file of a training: one for each key."""
        return Path(self.folder, f"{name}-{self.keys[name][:16]}.safetensors")

    def with_keys(self) -> Job:
        """The same with its keys."""
        package = Path(__file__).parents[2]
        read = [path for path in sorted(Path(self.folder).rglob("*")) if path.name in _INPUTS]
        read += [] if self.objective_file is None else [Path(self.objective_file)]
        digest = hashlib.sha256(versions().encode())
        for path in [*sorted(package.rglob("*.py")), *read]:
            digest.update(path.read_bytes())

        def key(words: list[str]) -> str:
            mine = digest.copy()
            mine.update(json.dumps([words, self.on_cpu]).replace(self.folder, "").encode())
            return mine.hexdigest()

        return replace(self, keys={name: key(words) for name, words in self.runs.items()})

    def unknown(self) -> Job:
        """The same without the trainings whose results are there."""
        runs = {name: words for name, words in self.runs.items() if saved_key(self.result(name)) != self.keys[name]}
        return replace(self, runs=runs)


class OneRank:
    """The trainings of some jobs. A context manager: no process of them is left behind."""

    def __init__(self, folder: Path, jobs: Sequence[Job], timeout: float):
        """folder: of the jobs, for results and the log. Results of the same that are there are not computed again.
        timeout: seconds that all of them may take together."""
        self._folder, self._timeout = folder, timeout
        self._jobs = [job.with_keys() for job in jobs]
        self._left = [left for job in self._jobs if (left := job.unknown()).runs]
        self._processes: list[subprocess.Popen] = []
        self._begun = time.monotonic()

    @property
    def is_known(self) -> bool:
        """Whether nothing is left to compute."""
        return not self._left

    def __enter__(self) -> OneRank:
        with open(self._folder / _LOG, "wb") as log:
            for job in self._left:
                path = self._folder / f"{'-'.join(job.runs)}.json"
                path.write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", MODULE, str(path)],
                        env=_environment(on_cpu=job.on_cpu),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def results(self) -> dict[str, Training]:
        """What they have computed, by name; waits for them. Fault where one fails, or takes too long, with its log on
        stderr."""
        for process in self._processes:
            try:
                code = process.wait(max(self._timeout - (time.monotonic() - self._begun), 0.0))
            except subprocess.TimeoutExpired:
                self._show_log()
                raise Fault(f"training on one rank has not ended within {self._timeout:g} s (--timeout)") from None
            if code != 0:
                self._show_log()
                raise Fault(f"training on one rank has failed with exit code {code}: its log is above")
        return {name: Training.load(job.result(name)) for job in self._jobs for name in job.runs}

    def _show_log(self) -> None:
        text = (self._folder / _LOG).read_text(encoding="utf-8", errors="replace")
        print(f"--- {self._folder / _LOG}\n{text[-6000:]}\n---", file=sys.stderr, flush=True)


def _environment(*, on_cpu: bool) -> dict[str, str]:
    """That of a lone rank, which imports the same package."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    paths = [str(Path(__file__).parents[3]), *filter(None, [found.get("PYTHONPATH")])]
    found |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "PYTHONPATH": os.pathsep.join(paths)}
    if on_cpu:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found
