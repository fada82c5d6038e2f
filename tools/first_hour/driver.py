"""Run the first hour on a GPU: every check of this repository that needs one, in order, and write benchmarks/GPU.md.

    make gpu                                       # everything that can be run here
    python tools/gpu.py --list                     # the steps, and how long each may take
    python tools/gpu.py --only kernels --only head # only these
    python tools/gpu.py --again                    # also what has passed at this commit

Each step is a process of its own with a time limit and a log in OUT/logs/; one that fails, or is ended at its limit
with all that it started, does not stop the next ones. A verdict is passed, failed, or not run with the reason: a step
that needs two GPUs, Transformer Engine, Apex, Liger or compute-sanitizer is not run without, and is no failure.

Results are kept in OUT/state.json. The same command goes on where it was ended: a step that has passed at this commit,
on this GPU, with this driver and torch, is not run again. With uncommitted changes every step is run again.

The first step installs the package in the environment that runs this, from this checkout (pip install --editable);
pip, setuptools, wheel, pybind11, pytest and matplotlib must be there, as they are in that of make. Transformer Engine,
Apex and Liger are used where they are installed: put them into the same environment first.

Exit code: 0 no step failed, 1 a step failed, 2 bad usage, 3 there is no GPU, 130 interrupted (make turns each other
than 0 into its own 2).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tools.benchmarking import machine
from tools.benchmarking.workers import end_tree
from tools.first_hour import report
from tools.first_hour.process import outcome
from tools.first_hour.steps import STEPS, Step

NO_GPU = 3
_OUT = machine.ROOT / "build" / "gpu"
_REPORT = machine.ROOT / machine.REPORTS / "GPU.md"


@dataclass(frozen=True)
class Gpus:
    """name: of the first one, with the driver. capability: (major, minor)."""

    name: str
    count: int
    capability: tuple[int, int]


def main(argv: list[str] | None = None) -> int:
    """Run and write; the exit code."""
    args = _parser().parse_args(argv)
    unknown = [name for name in args.only if name not in {step.name for step in STEPS}]
    if unknown:
        print(f"gpu: error: unknown step {unknown[0]!r}: --list names them", file=sys.stderr)
        return 2
    if args.list:
        for step in STEPS:
            print(f"{step.name:24}{step.limit:5.0f} s  {step.title}")
        return 0
    gpus, torch_version = find_gpus()
    if gpus is None:
        print(f"gpu: torch {torch_version} finds no NVIDIA GPU here: no step was run", file=sys.stderr)
        return NO_GPU
    chosen = [step for step in STEPS if step.name in args.only or not args.only]
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run(chosen, gpus, f"{gpus.name}, torch {torch_version}", args.out.resolve(), args.report, args.again)
    except KeyboardInterrupt:
        print(f"gpu: interrupted; the same command goes on from {args.out}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def find_gpus() -> tuple[Gpus | None, str]:
    """The GPUs, if there are any, and torch's version. No context is made on them where nvidia-smi says what they are:
    their memory is the steps'."""
    import torch

    if not torch.cuda.is_available():
        return None, torch.__version__
    words = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        first = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[0]
        name, driver, capability = (part.strip() for part in first.split(","))
        major, minor = map(int, capability.split("."))
    except (OSError, subprocess.SubprocessError):
        name, driver = torch.cuda.get_device_name(), "unknown"
        major, minor = torch.cuda.get_device_capability()
    return Gpus(f"{name}, driver {driver}", torch.cuda.device_count(), (major, minor)), torch.__version__


def run(steps: Sequence[Step], gpus: Gpus, where: str, out: Path, report_file: Path, again: bool) -> int:
    """Run the steps that have not passed before, in order; the report is written anew after each."""
    here = machine.repository()
    state = out / "state.json"
    results: dict[str, dict[str, Any]] = json.loads(state.read_text())["results"] if state.exists() else {}
    # Not those that were chosen: what is known of the others stays in the report.
    order = {step.name: number for number, step in enumerate(STEPS, 1)}
    failed = 0
    for number, step in enumerate(steps, 1):
        label = f"gpu {number:2}/{len(steps)} {step.name}"
        before = results.get(step.name, {})
        same = before.get("commit") == here["commit"] and before.get("on") == where and not here["dirty"]
        if before.get("verdict") == "passed" and same and not before["dirty"] and not again:
            print(f"{label}: has passed at this commit on {before['date'][:10]}", flush=True)
            continue
        print(f"{label}: {step.title} (at most {step.limit:.0f} s)", flush=True)
        log = out / "logs" / f"{order.get(step.name, 0):02}-{step.name}.log"
        result = run_step(step, gpus, out / "steps" / step.name, log)
        results[step.name] = result | here | {"on": where, "date": _now()}
        _write(state, json.dumps({"results": results}, indent=1) + "\n")
        _write(report_file, report.markdown(STEPS, results, about(gpus, where, here)))
        failed += result["verdict"] == "failed"
        reason = f": {report.first_line(result['reason'])}" if result["reason"] else ""
        see = f" ({log})" if result["verdict"] == "failed" else ""
        print(f"{label}: {result['verdict']} in {result['seconds']:.0f} s{reason}{see}", flush=True)
    _write(report_file, report.markdown(STEPS, results, about(gpus, where, here)))
    print(f"gpu: wrote {report_file}", flush=True)
    return 1 if failed else 0


def run_step(step: Step, gpus: Gpus, folder: Path, log: Path) -> dict[str, Any]:
    """What a step's process says, or what became of it. Nothing that it has started is left afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    given = asdict(step) | {"folder": str(folder), "log": str(log), "gpus": gpus.count}
    given["capability"] = gpus.capability
    path = os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.first_hour.process", json.dumps(given)],
            cwd=machine.ROOT,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(step.limit)
            found = _found(folder / "result.json", status)
        except subprocess.TimeoutExpired:
            found = outcome("failed", f"it took more than {step.limit:g} s and was ended")
        finally:
            end_tree(process.pid)
            process.wait()
    return found | {"seconds": time.monotonic() - started}


def _found(path: Path, status: int) -> dict[str, Any]:
    if status != 0 or not path.exists():
        return outcome("failed", f"its process ended with status {status}")
    return json.loads(path.read_text())


def about(gpus: Gpus, where: str, here: dict[str, Any]) -> dict[str, str]:
    """The first table of the report."""
    capability = ".".join(map(str, gpus.capability))
    return {
        "GPU": where,
        "number of GPUs": f"{gpus.count}, compute capability {capability}",
        **machine.versions("megatron-core", "transformers", "transformer-engine", "apex", "liger-kernel"),
        "commit": f"{here['commit']}{report.DIRTY if here['dirty'] else ''}",
        "date": _now(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="minutes")


def _write(path: Path, text: str) -> None:
    """Under its name only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(f".{path.name}.incomplete")
    incomplete.write_text(text, encoding="utf-8")
    os.replace(incomplete, path)


def _interrupt(signum, frame) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run this step; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the steps in their order, with their time limits")
    parser.add_argument("--again", action="store_true", help="run steps that have passed at this commit as well")
    parser.add_argument("--out", type=Path, default=_OUT, metavar="DIR", help="state and logs (default: build/gpu)")
    parser.add_argument(
        "--report", type=Path, default=_REPORT, metavar="FILE", help="what to write (default: benchmarks/GPU.md)"
    )
    return parser
