"""What a figure was measured on, and with which code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The reports themselves may differ from the commit.
REPORTS = "benchmarks"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def describe() -> dict[str, str]:
    """Hardware, versions and instruction sets, by the names that the report shows."""
    import torch

    from qtarget_megatron.kernels import native

    extension = native.extension()
    build = extension.build_info()
    found = {
        "CPU": processor(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **versions("torch", "megatron-core", "transformers", "transformer-engine", "liger-kernel"),
        "compiler of the CPU kernels": f"{_compiler(build['compiler'])}, built for {', '.join(build['cpu'])}",
        "CPU kernels run as": extension.cpu_isa(),
        "torch's CPU kernels run as": torch.backends.cpu.get_cpu_capability(),
    }
    if build["cuda"]:
        found["CUDA kernels"] = f"nvcc {build['nvcc']}, sm {build['cuda_archs'].replace(';', ', ')}"
    return found


def repository() -> dict[str, str | bool]:
    """commit, and dirty: whether a file differs from it (those of benchmarks/ aside)."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", f":(exclude){REPORTS}")
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": True}
    return {"commit": commit, "dirty": bool(changed)}


def load_average() -> float:
    """Processes that wanted a core in the last minute."""
    return os.getloadavg()[0]


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()


def processor() -> str:
    """The processor's name, and how many cores of it this process may use."""
    return f"{_cpu_model()}, {cores()} cores"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _compiler(version: str) -> str:
    # GCC gives its number alone.
    return f"GCC {version}" if version[:1].isdigit() else version


def versions(*packages: str) -> dict[str, str]:
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
