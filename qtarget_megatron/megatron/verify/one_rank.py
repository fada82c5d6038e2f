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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qtarget_megatron._version import versions
from qtarget_megatron.megatron.faults.explained import Fault
from qtarget_megatron.megatron.verify.comparison import Training

MODULE = "qtarget_megatron.commands.verify_training"
REFERENCE, REORDERED, PRECISION = "reference", "reordered", "precision"
_LAUNCHER = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_", "WORLD_SIZE", "RANK", "SLURM_", "OMPI_", "PMI_")
_KEY, _LOG = "key.txt", "one-rank.log"


@dataclass(frozen=True)
class Job:
    """What one process computes.

    parent:         the process that it ends with.
    runs:           name of each training -> its words; <name>.safetensors is what comes of it.
    models:         name of each training -> the directory of its model.
    objective_file: of the user's, run before.
    on_cpu:         without a GPU, and without what is made for one.
    """

    parent: int
    folder: str
    runs: dict[str, list[str]]
    objective_file: str | None
    on_cpu: bool

    def path(self) -> Path:
        """Where it is written."""
        return Path(self.folder, f"{'-'.join(self.runs)}.json")

    @classmethod
    def read(cls, path: str) -> Job:
        """A job that was written."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def result(self, name: str) -> Path:
        """The file of a training."""
        return Path(self.folder, f"{name}.safetensors")


class OneRank:
    """The trainings of some jobs. A context manager: no process of them is left behind."""

    def __init__(self, folder: Path, jobs: Sequence[Job], timeout: float):
        """folder: for results and the log; those that are there are taken where they are of the same jobs. timeout:
        seconds that all of them may take together."""
        self._folder, self._jobs, self._timeout = folder, jobs, timeout
        self._key = _key(folder, jobs)
        self._processes: list[subprocess.Popen] = []
        self._begun = time.monotonic()
        self.is_known = self._is_known()

    def __enter__(self) -> OneRank:
        if self.is_known:
            return self
        (self._folder / _KEY).unlink(missing_ok=True)
        with open(self._folder / _LOG, "wb") as log:
            for job in self._jobs:
                job.path().write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")
                command = [sys.executable, "-m", MODULE, str(job.path())]
                self._processes.append(
                    subprocess.Popen(
                        command,
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
        stderr; ValueError for bad input."""
        for process in self._processes:
            try:
                code = process.wait(max(self._timeout - (time.monotonic() - self._begun), 0.0))
            except subprocess.TimeoutExpired:
                self._show_log()
                raise Fault(f"training on one rank has not ended within {self._timeout:g} s (--timeout)") from None
            if code != 0:
                self._show_log()
                raise Fault(f"training on one rank has failed with exit code {code}: its log is above")
        (self._folder / _KEY).write_text(self._key, encoding="utf-8")
        return {name: Training.load(job.result(name)) for job in self._jobs for name in job.runs}

    def _is_known(self) -> bool:
        try:
            key = (self._folder / _KEY).read_text(encoding="utf-8")
        except OSError:
            return False
        return key == self._key and all(job.result(name).is_file() for job in self._jobs for name in job.runs)

    def _show_log(self) -> None:
        text = (self._folder / _LOG).read_text(encoding="utf-8", errors="replace")
        print(f"--- {self._folder / _LOG}\n{text[-6000:]}\n---", file=sys.stderr, flush=True)


def _key(folder: Path, jobs: Iterable[Job]) -> str:
    """A digest of all that results depend on: words, models, data, and the package itself."""
    digest = hashlib.sha256(versions().encode())
    package = Path(__file__).parents[2]
    for path in [*sorted(package.rglob("*.py")), *sorted(folder.rglob("*"))]:
        if path.is_file() and (path.suffix == ".py" or path.name in _INPUTS):
            digest.update(path.read_bytes())
    for job in jobs:
        digest.update(json.dumps([job.runs, job.on_cpu]).replace(str(folder), "").encode())
        if job.objective_file is not None:
            digest.update(Path(job.objective_file).read_bytes())
    return digest.hexdigest()


# Files of a folder that trainings read.
_INPUTS = ("config.json", "model.safetensors", "data.jsonl")


def _environment(*, on_cpu: bool) -> dict[str, str]:
    """That of a lone rank, which imports the same package."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    paths = [str(Path(__file__).parents[3]), *filter(None, [found.get("PYTHONPATH")])]
    found |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "PYTHONPATH": os.pathsep.join(paths)}
    if on_cpu:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found
