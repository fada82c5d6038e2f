"""When does a designed target help, when does it hurt? Train every run of a study, and keep what each could do.

    python -m examples.study.run                                      # study.toml, about 2 hours on two cores
    python -m examples.study.run --study examples/study/quick.toml    # about 10 minutes
    python -m examples.study.run --dry-run                            # what would be run

OUT/results.jsonl gets a line for each run when it is complete. Ended at any point, the same command goes on: what has a
line is not run again. OUT/REPORT.md and its pictures are written at the end, and by `python -m examples.study.report
OUT` at any time. The learning rate of each base, data and arm is the one of a sweep whose model answers most dev
problems; test problems are only looked at in the report.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tools.benchmarking.machine import cores, processor, repository

HERE = Path(__file__).parent
LOCK = ".study.lock"
PRELOAD = "examples.study.preload"


@dataclass
class Job:
    """A process of the study.

    log:  where it prints.
    done: what follows when it has ended well.
    """

    name: str
    process: Any
    log: Path
    done: Callable[[float], None]
    started: float = field(default_factory=time.monotonic)


class Failed(ValueError):
    """A job has failed; the message says which, and why."""


class Pool:
    """Runs jobs, so many at a time, each in a process that is forked from one with everything imported.

    preload: import what a training imports; not needed where a launcher starts it.
    """

    def __init__(self, workers: int, *, preload: bool = True):
        self._workers, self._jobs = workers, []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([PRELOAD] if preload else [])

    @property
    def is_full(self) -> bool:
        return len(self._jobs) >= self._workers

    @property
    def is_empty(self) -> bool:
        return not self._jobs

    def start(self, name: str, work: Callable[[], None], log: Path, done: Callable[[float], None]) -> None:
        from examples.study.jobs import as_process

        process = self._context.Process(target=as_process, args=(work, log), name=name)
        process.start()
        self._jobs.append(Job(name, process, log, done))

    def wait(self) -> None:
        """Wait for a job to end, and do what follows. Failed where one has failed: the others are waited for first."""
        wait([job.process.sentinel for job in self._jobs])
        failed = []
        for job in [job for job in self._jobs if not job.process.is_alive()]:
            self._jobs.remove(job)
            job.process.join()
            if job.process.exitcode == 0:
                job.done(time.monotonic() - job.started)
            else:
                failed.append(f"{job.name}: {_reason(job.log, job.process.exitcode)}")
        if failed:
            while self._jobs:
                try:
                    self.wait()
                except Failed as error:
                    failed.append(str(error))
            raise Failed("; ".join(failed))

    def end(self) -> None:
        """End what runs."""
        for job in self._jobs:
            job.process.terminate()
        for job in self._jobs:
            job.process.join(30)
            if job.process.is_alive():
                job.process.kill()
                job.process.join()
        self._jobs.clear()


def _reason(log: Path, code: int) -> str:
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
    said = [line.partition("study: error: ")[2] for line in lines if "study: error: " in line]
    return (said or [line for line in lines if line.strip()] or [f"it ended with {code}"])[-1] + f" (log: {log})"


class Progress:
    """Says what has been done and, from the runs so far, when the rest will be."""

    def __init__(self, total: int, done: int, workers: int):
        self._total, self._done, self._workers = total, done, workers
        self._seconds: list[float] = []

    def add(self, run: object, seconds: float, result: dict[str, Any]) -> None:
        self._done += 1
        self._seconds.append(seconds)
        left = (self._total - self._done) * sum(self._seconds) / len(self._seconds) / self._workers
        metrics = result["metrics"]
        shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("dev", "greedy", "sampled") if name in metrics)
        say(f"{self._done}/{self._total} {run}: {shown}; {seconds:.0f} s, {timedelta(seconds=round(left))} left")


def say(line: str) -> None:
    print(f"study: {line}", flush=True)


def run_study(
    study_path: Path, out: Path, workers: int | None, threads: int | None, keep_models: bool, dry_run: bool
) -> int:
    """Do what is left of a study; returns the number of its runs."""
    from examples.study.conditions import condition_of
    from examples.study.results import ResultsFile
    from examples.study.runs import number_of_runs
    from examples.study.study_file import read_study
    from qtarget_megatron import output_lock
    from qtarget_megatron.megatron.runtime import logs

    study = read_study(study_path)
    for data in study.data.values():
        condition_of(data)
    workers = workers or study.workers
    total = number_of_runs(study)
    file = ResultsFile(out / "results.jsonl")
    if dry_run:
        tell_plan(study, file.read(study), out)
        return total
    # Before the processes that share the cores begin.
    os.environ["OMP_NUM_THREADS"] = str(threads or max(1, cores() // workers))
    if study.flags.get("cpu"):
        # The same with and without a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with logs.shown():
        output_lock.claim(out / LOCK, str(out))
    try:
        if study_path.absolute() != out / study_path.name:
            shutil.copyfile(study_path, out / study_path.name)
        results = file.read(study)
        say(f"{study.title}: {total} runs, {len(results)} of them done; results go to {file.path}")
        pool = Pool(workers, preload=not study.launcher)
        try:
            prepare(study, out, pool)
            train_all(study, out, pool, file, results, keep_models, Progress(total, len(results), workers))
        finally:
            pool.end()
    finally:
        output_lock.release(out / LOCK)
    return total


def prepare(study: Any, out: Path, pool: Pool) -> None:
    """Train the bases that are not there."""
    from examples.demo.prepare import MODEL_FOLDER
    from examples.demo.prepare import prepare as prepare_demo
    from examples.study.bases import missing, models_of, train_base

    for name in study.base_names():
        base = study.bases[name]
        if base.model is not None and base.model.name == MODEL_FOLDER and not base.model.is_dir():
            prepare_demo()
        if base.model is not None and not base.model.is_dir():
            raise ValueError(f"[bases.{name}]: there is no directory {base.model}")
    for name in missing(study, out):
        folder = models_of(study.bases[name], out).base.parent
        say(f"training the base {name}: {study.bases[name].steps + study.bases[name].strong_steps} steps; {folder}")
        while pool.is_full:
            pool.wait()
        pool.start(
            f"base {name}",
            partial(train_base, study, name, out),
            folder / "job.log",
            lambda seconds, name=name: say(f"the base {name} is there; {seconds:.0f} s"),
        )
    while not pool.is_empty:
        pool.wait()


def train_all(
    study: Any, out: Path, pool: Pool, file: Any, results: dict, keep_models: bool, progress: Progress
) -> None:
    from examples.study.bases import models_of
    from examples.study.jobs import RESULT, do
    from examples.study.runs import digest, possible_runs

    about = {"commit": commit(), "machine": processor()}
    begun: set = set()

    def finished(run: Any, folder: Path, seconds: float) -> None:
        result = json.loads((folder / RESULT).read_text("utf-8")) | about
        file.append(study, run, result)
        results[run] = result
        progress.add(run, seconds, result)
        if not keep_models:
            shutil.rmtree(folder)

    while True:
        left = [run for run in possible_runs(study, results) if run not in results and run not in begun]
        if not left and pool.is_empty:
            return
        for run in left:
            if pool.is_full:
                break
            begun.add(run)
            folder = out / "runs" / digest(study, run)
            work = partial(do, study, run, models_of(study.bases[run.base], out), folder)
            pool.start(str(run), work, folder.with_suffix(".log"), partial(finished, run, folder))
        pool.wait()


def tell_plan(study: Any, results: dict, out: Path) -> None:
    """The command of the first training of each kind, and how many there are."""
    from examples.study.bases import models_of
    from examples.study.jobs import training_words
    from examples.study.runs import number_of_runs, possible_runs

    seen = set()
    for run in possible_runs(study, results):
        kind = (run.base, run.data, run.arm)
        if run in results or kind in seen:
            continue
        seen.add(kind)
        folder = out / "runs" / "RUN"
        words = training_words(study, run, models_of(study.bases[run.base], out), folder / "train.jsonl", folder)
        launcher = [*study.launcher, "-m", "qtarget_megatron.finetune"] if study.launcher else ["qtarget", "finetune"]
        print(f"# {run}")
        print(" ".join([*launcher, *words]))
    say(f"{number_of_runs(study)} runs, {len(results)} of them done; nothing was run")


def commit() -> str:
    """The commit that is checked out, in short, with -dirty where files differ from it."""
    found = repository()
    return str(found["commit"])[:7] + ("-dirty" if found["dirty"] else "")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.study.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", type=Path, default=HERE / "study.toml", metavar="FILE", help="what is run, as TOML")
    parser.add_argument("--out", type=Path, metavar="OUT", help="folder of results (default: NAME-output of NAME.toml)")
    parser.add_argument("--workers", type=int, metavar="N", help="trainings at a time (default: as the file says)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of a training (default: the cores, shared by the workers); of as many a seed gives the same bits",
    )
    parser.add_argument("--keep-models", action="store_true", help="keep every trained model, in OUT/runs")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the trainings, and run nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a study; returns the process's exit status."""
    from examples.demo.launch import sigterm_as_interrupt

    args = command_line().parse_args(argv)
    out = (args.out or Path(f"{args.study.stem}-output")).absolute()
    for name in ("workers", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            print(f"study: error: --{name}: expected 1 or more, got {getattr(args, name)}", file=sys.stderr)
            return 2
    try:
        with sigterm_as_interrupt():
            run_study(args.study, out, args.workers, args.threads, args.keep_models, args.dry_run)
            if not args.dry_run:
                from examples.study.report import write_report

                write_report(args.study, out)
    except Failed as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
