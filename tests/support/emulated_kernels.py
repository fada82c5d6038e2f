"""The CUDA kernels on the CPU: csrc/cuda behind the headers of cuda_emulator/, built by the C++ compiler.

Multiply-adds are fused as nvcc fuses them, threads run in random order between two barriers, and undefined behaviour
(an address that is not aligned, an overflow) and memory that is not there raise RuntimeError.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from launching import REPOSITORY

from qtarget_megatron.kernels import native

CXX = shlex.split(os.environ.get("CXX", "c++"))
SHIM = Path(__file__).parent / "cuda_emulator"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-march=native", "-ffp-contract=fast"]
FLAGS += ["-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes"]
# What the sanitizer has besides takes three times as long to compile, and guards addresses that fault anyway.
OF_KERNELS = ["-O1", "-fsanitize=alignment,bounds,shift,signed-integer-overflow,float-cast-overflow"]
BUILT_AS = ["-DQTARGET_WITH_CUDA", '-DQTARGET_CUDA_ARCHS="0"', '-DQTARGET_NVCC_VERSION="none"']
LAUNCH = re.compile(r"(\w+_kernel<[^;]*?>)<<<([^;]*?), (\w+), 0, stream>>>\(args\);")


def build(folder: Path) -> Path:
    """The module, built in folder by the first process that asks; another waits for it."""
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        module = folder / "emulated_C.so"
        if not module.exists():
            _build(folder, module)
    return module


def _build(folder: Path, module: Path) -> None:
    import pybind11  # needed to build the package, and by no other test

    csrc = folder / "csrc"
    shutil.copytree(REPOSITORY / "csrc", csrc, dirs_exist_ok=True)
    shutil.copytree(SHIM, csrc / "cuda_emulator", dirs_exist_ok=True)
    for source in (csrc / "cuda").iterdir():
        source.write_text(LAUNCH.sub(r"emulator::launch(\2, \3, [&] { (void)stream; \1(args); });", source.read_text()))
    includes = [csrc / "cuda_emulator", pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [*CXX, *FLAGS, *BUILT_AS, *(f"-I{path}" for path in includes), "-x", "c++", "-c"]
    # The longest compilation first.
    flags_of = {csrc / "binding.cpp": [], csrc / "cuda_emulator" / "emulator.cpp": ["-O1"]}
    flags_of |= dict.fromkeys((csrc / "cuda").glob("*.cu"), OF_KERNELS)
    objects = [folder / f"{source.name}.o" for source in flags_of]

    def run(arguments: list) -> None:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=1000)
        assert done.returncode == 0, done.stderr[-3000:]

    def compile_source(source: Path, target: Path) -> None:
        run([*command, *flags_of[source], source, "-o", target])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_source, flags_of, objects))
    unfinished = folder / "unfinished.so"
    run([*CXX, "-shared", "-fsanitize=undefined", *objects, "-o", unfinished])
    unfinished.rename(module)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_in_use = False


def are_in_use() -> bool:
    return _in_use


@contextmanager
def in_place_of_the_cpu_s(module: ModuleType) -> Iterator[None]:
    """The functions of kernels.native take CPU tensors to the emulated CUDA kernels."""
    with (
        patch(f"{__name__}._in_use", True),
        patch.object(native, "extension", lambda: module),
        patch.object(native, "_kernels_for", lambda tensor: "cuda"),
        patch.object(native, "_execution", lambda tensor: (0, 0)),
    ):
        yield
