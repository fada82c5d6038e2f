"""Steps that need no training: the build, the tests, the sanitizer, every objective, kernels and head next to peers."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

from tools.benchmarking import report, workers
from tools.first_hour.work import FLOAT32, Failed, NotRun, Work

# Rows that begin anywhere, with NaN around them; and a row of several blocks with a teacher.
SANITIZED = {
    "memcheck": "test_strided_and_unaligned_rows_never_touch_their_surroundings[cuda-torch.bfloat16-3-nan]",
    "racecheck": "test_both_kernels_match_float64_for_every_width_dtype_and_residual"
    "[cuda-2061-torch.bfloat16-((0.5, 0.5),)]",
}
_KERNEL_TESTS = "tests/unit/test_native_kernels.py"
_ERRORS = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
_TESTS = re.compile(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+) in [\d.]+s", re.MULTILINE)
_ROW = re.compile(r"^\S.*?  +([\d.e+-]+|inf) +\d+  +([\d.e+-]+|inf) +\d+ \w+ +(ok|FAIL)", re.MULTILINE)


def build(work: Work) -> list[str]:
    work.run(["nvidia-smi"])
    if (nvcc := _of_the_toolkit("nvcc")) is None:
        raise Failed("nvcc is neither in CUDA_HOME/bin nor on PATH: the CUDA kernels cannot be compiled")
    work.run([nvcc, "--version"])
    words = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--verbose", "--editable", "."]
    work.python(*words)
    # In a process that has not loaded an older module.
    program = "import json, torch; from tools.benchmarking import machine; "
    program += "print(json.dumps({'CUDA of torch': torch.version.cuda} | machine.describe()))"
    found = json.loads(work.python("-c", program).splitlines()[-1])
    if "CUDA kernels" not in found:
        raise Failed("the module was built without CUDA kernels: see the log of pip")
    return report.table(["", ""], found.items())


def _of_the_toolkit(program: str) -> str | None:
    home = os.environ.get("CUDA_HOME")
    folders = os.environ.get("PATH", "")
    return shutil.which(program, path=os.pathsep.join([str(Path(home, "bin")), folders]) if home else folders)


def cuda_tests(work: Work) -> list[str]:
    return [summary(work.python("-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"))]


def summary(text: str) -> str:
    """The line of pytest that counts; Failed where no test has passed."""
    counts = _TESTS.findall(text)
    if not counts or "passed" not in counts[-1]:
        raise Failed("pytest reports no test that has passed")
    return counts[-1]


def sanitizer(work: Work, tool: str) -> list[str]:
    program = _of_the_toolkit("compute-sanitizer")
    if program is None:
        raise NotRun("compute-sanitizer is neither in CUDA_HOME/bin nor on PATH")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable, "-m"]
    command += ["pytest", "-q", "-p", "no:cacheprovider", f"{_KERNEL_TESTS}::{SANITIZED[tool]}"]
    # torch's blocks are larger than what was asked for: an access beside a tensor would not be seen.
    text = work.run(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return [f"`{SANITIZED[tool]}`: {summary(text)}; {errors(text)} errors or hazards"]


def errors(text: str) -> int:
    """What the sanitizer counts; Failed where it counts any, or nothing at all."""
    found = [int(value) for value in _ERRORS.findall(text)]
    if not found or any(found):
        raise Failed(f"compute-sanitizer counts {max(found)}" if found else "compute-sanitizer has printed no summary")
    return 0


def objectives(work: Work) -> list[str]:
    lines = []
    for dtype, flags in {"float32": [], "bfloat16": ["--bf16"], "float16": ["--fp16"]}.items():
        words = ["-m", "qtarget_megatron.commands.verify_parallel", "--backend", "cuda", *flags]
        lines.append(f"- {dtype}: {worst(work.python(*words, environment=FLOAT32))}")
    return lines


def worst(text: str) -> str:
    """In a line, the table that verify_parallel prints."""
    rows = _ROW.findall(text)
    if not rows or any(verdict != "ok" for *_, verdict in rows):
        raise Failed("verify_parallel has not printed a table that is all well")
    loss, gradient = (max(float(row[column]) for row in rows) for column in (0, 1))
    last = next(line for line in text.splitlines() if line.startswith("verified: "))
    return f"{len(rows)} comparisons, loss off by {loss:.1e} and gradient by {gradient:.1e} at most. {last}"


def losses_on_a_device(work: Work, way: str) -> list[str]:
    """way: of calling them: captured, on a stream of their own, or on the second device while the first is current."""
    from tools.first_hour import ways

    if way == "second device":
        work.needs_gpus(2)
    import torch

    device = torch.device("cuda", 1 if way == "second device" else 0)
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        lines.append(f"- {str(dtype).removeprefix('torch.')}: {ways.compare(device, dtype, ways.WAYS[way])}")
    return lines


def no_labels(work: Work) -> list[str]:
    ranks = max(work.gpus, 1)
    workers.run("tools.first_hour.ways:no_labels", {"device": "cuda"}, say=_say, ranks=ranks, timeout=work.limit)
    return [f"Losses and gradients of both losses are 0 on {ranks} rank(s) of one tensor-parallel group over NCCL."]


def verify_parallel(work: Work) -> list[str]:
    work.needs_gpus(2)
    lines = []
    for words, size in layouts(work.gpus):
        command = ["qtarget_megatron.commands.verify_parallel", "--bf16", *words]
        lines.append(f"- {worst(work.ranks(command, size))}")
    return lines


def layouts(gpus: int) -> list[tuple[list[str], int]]:
    """Flags of each layout and its number of ranks: all GPUs that it divides into, the rest as data parallelism."""
    found = []
    for tensor, pipeline in ((2, 1), (2, 2), (4, 2)):
        model = tensor * pipeline
        if model <= gpus:
            words = ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)]
            found.append((words + (["--sequence-parallel"] if pipeline > 1 else []), gpus // model * model))
    return found


def benchmark(work: Work, part: str) -> list[str]:
    """A part of tools/benchmark.py: its section of the report, a level of headings down."""
    from tools.benchmarking import peers

    text = work.python("tools/benchmark.py", part, "--out", str(work.folder / "benchmark"))
    rows = report.load(work.folder / "benchmark", part)["rows"]
    missing = peers.not_installed()
    lines = [f"Not installed, and so not compared with: {', '.join(missing)}.", ""] if missing else []
    lines += [line.partition("  ")[2] + "\n" for line in text.splitlines() if "left out: " in line]
    return lines + [f"#{line}" if line.startswith("#") else line for line in report.SECTIONS[part][1](rows)]


def _say(line: str) -> None:
    print(line, flush=True)
