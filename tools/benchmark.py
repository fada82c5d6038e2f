"""Measure the losses, in time and memory, next to what they replace, and write a report.

    python tools/benchmark.py all                    # everything; about 45 minutes on 2 cores that do nothing else
    python tools/benchmark.py kernels head           # only these; their sections of the report are replaced
    python tools/benchmark.py kernels --quick        # small shapes, under a minute: does it work? Not for figures
    python tools/benchmark.py report                 # only write the report anew, from what was measured before

kernels      loss of given logits, forward and backward: ours, torch, torch.compile, Megatron, and Target-SFT as one
             would write it; each against the time that the bytes alone take (the floor)
divergences  divergences from a teacher next to sft, kd and the loss as one would write it, 14,000 x 152,000; 13 GiB
head         output layer and loss together: logits a chunk at a time against logits as a whole, time and memory
collective   one all-gather and merge against Megatron's three all-reduces, 2 and 4 ranks over gloo
step         training steps of the fine-tuning command on a small random model, 1 rank and 2 tensor-parallel ranks
lora         training steps of LoRA and of all weights, by teacher: a copy of the model, the model itself, none
data         attention of the local layers next to Megatron's own; useful tokens per second of packed and padded rows
growth       how time grows with tokens, vocabulary and shards, and memory with tokens
convert      a random model of Qwen2.5-1.5B's shape from Hugging Face to Megatron and back, 2 and 4 ranks; 10 GB of disk
cuda         kernels on a GPU, 8192 x 131072 in bfloat16, with Megatron's fused loss, and Liger's and Transformer
             Engine's where installed
cuda-head    output layer and loss on a GPU, hidden size 4096, chunks of 512 to 4096 tokens and what the weight's
             gradient takes of each, with torch's linear_cross_entropy and Liger's
all          all of them; cuda and cuda-head only where there is a GPU

Writes to --out, a file at a time and each only when it is complete: NAME.json (every run's time), REPORT.md and the
pictures. Peers take turns run by run in one process, so that a slow moment meets them all; the report gives medians,
quartiles, and ratios with the quartiles of runs that followed each other. Before anything is timed, all methods must
agree on loss and gradients. The machine should be idle: this warns where it is not, and the report repeats it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Run by its path, a script finds its own folder only.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.benchmarking import machine, report  # noqa: E402
from tools.benchmarking.plans import PLANS  # noqa: E402
from tools.benchmarking.workers import MeasurementFailed  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Measure and write; the exit code: 0 done, 1 a measurement failed, 2 bad usage, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        names = _names(args.names)
        out = _out(args, names)
    except ValueError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 2
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(names, out, args.quick)
    except KeyboardInterrupt:
        print(f"benchmark: interrupted; what was complete is in {out}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signum, frame) -> None:
    raise KeyboardInterrupt


def _run(names: list[str], out: Path, quick: bool) -> int:
    load = machine.load_average()
    if names and load > report.BUSY * machine.cores():
        print(
            f"benchmark: WARNING: the machine is busy (load average {load:.1f} on {machine.cores()} cores): do not "
            "quote these times",
            file=sys.stderr,
        )
    if names:
        about = {**machine.repository(), "machine": machine.describe(), "load_average": load}
        about |= {"cores": machine.cores(), "quick": quick}
    failed = []
    for number, name in enumerate(names, 1):
        started = time.monotonic()

        def say(line: str, name: str = name, started: float = started) -> None:
            print(f"{name} {time.monotonic() - started:5.0f} s  {line}", flush=True)

        say(f"part {number} of {len(names)}")
        date = datetime.now(UTC).isoformat(timespec="minutes")
        try:
            rows = PLANS[name](say, quick)
        except MeasurementFailed as error:
            print(f"benchmark: {name} failed: {error}", file=sys.stderr)
            failed.append(name)
            continue
        taken = time.monotonic() - started
        _save(out / f"{name}.json", {"benchmark": name, "date": date, "took": taken, **about, "rows": rows})
        say("done")
    if failed:
        again = " ".join(failed)
        print(f"benchmark: no report was written: repeat {again}, or run `report` without", file=sys.stderr)
        return 1
    try:
        written = report.write(out)
    except ValueError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"benchmark: wrote {path}")
    return 0


def _save(path: Path, data: dict[str, Any]) -> None:
    """Under its name only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(f".{path.name}.incomplete")
    try:
        incomplete.write_text(_dump(data), encoding="utf-8")
        os.replace(incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)


def _dump(data: dict[str, Any]) -> str:
    """JSON with a row on each line."""
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in data["rows"])
    head = json.dumps({key: value for key, value in data.items() if key != "rows"}, indent=1, allow_nan=False)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def _names(given: list[str]) -> list[str]:
    """The parts to measure, in the order of the report. ValueError where one of them cannot be."""
    unknown = [name for name in given if name not in (*PLANS, "all", "report")]
    if unknown:
        raise ValueError(f"unknown part {unknown[0]!r}: expected {', '.join(PLANS)}, all or report")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the pictures are drawn by matplotlib, which is not installed: pip install matplotlib")
    wanted = list(PLANS) if "all" in given else [name for name in PLANS if name in given]
    of_a_gpu = [name for name in wanted if name.startswith("cuda")]
    if of_a_gpu and not _has_gpu():
        if any(name in given for name in of_a_gpu):
            raise ValueError(f"{of_a_gpu[0]} needs an NVIDIA GPU, and torch finds none here")
        print(f"benchmark: there is no GPU: {' and '.join(of_a_gpu)} are left out")
        wanted = [name for name in wanted if name not in of_a_gpu]
    return wanted


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _out(args: argparse.Namespace, names: list[str]) -> Path:
    out = args.out or ROOT / ("build/benchmark-quick" if args.quick else machine.REPORTS)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: expected a directory, got a file")
    for name in PLANS if names else ():
        kept = report.load(out, name)
        if kept is not None and name not in names and kept["quick"] != args.quick:
            kind = "full" if args.quick else "--quick"
            raise ValueError(f"--out {out} holds {name}.json of a {kind} run: give another directory")
    return out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("names", nargs="+", metavar="PART", help=f"{', '.join(PLANS)}, all or report")
    parser.add_argument("--quick", action="store_true", help="small shapes and few runs: to try it, not to measure")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where results and report are kept (default: benchmarks/ here, with --quick build/benchmark-quick/)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
