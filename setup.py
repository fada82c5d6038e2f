"""Builds qtarget_megatron._C: the CPU kernels always, the CUDA kernels where nvcc is found.

Environment:
    QTARGET_CUDA        1: build the CUDA kernels, error without nvcc; 0: never;
                        unset: where nvcc is found
    QTARGET_CUDA_ARCHS  compute capabilities without the dot, default "80;90;100"
    QTARGET_BUILD_JOBS  compilers at a time, default: the number of processors
    CXX, CUDA_HOME      the C++ compiler and the CUDA toolkit
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
CPU_SOURCES = ["binding.cpp", "cpu/dispatch.cpp", "cpu/scalar.cpp"]
AVX2_SOURCE = "cpu/avx2.cpp"
CUDA_SOURCES = ["cuda/launch.cu", "cuda/rows_fp32.cu", "cuda/rows_bf16.cu", "cuda/rows_fp16.cu"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
# row_math.h carries unrolling hints for nvcc; only explicit fused multiply-adds are wanted.
CXX_FLAGS += ["-Wno-unknown-pragmas", "-ffp-contract=off"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


@dataclass(frozen=True)
class Cuda:
    """The toolkit that compiles the CUDA kernels."""

    nvcc: str
    version: str
    archs: tuple[str, ...]
    library_dir: str

    def flags(self) -> list[str]:
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        # Machine code for each architecture, and PTX of the newest for those to come.
        newest = max(self.archs, key=int)
        return [*NVCC_FLAGS, *codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def find_cuda() -> Cuda | None:
    wanted = os.environ.get("QTARGET_CUDA")
    if wanted not in (None, "", "0", "1"):
        raise SystemExit(f"QTARGET_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        if wanted == "1":
            raise SystemExit("QTARGET_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME")
        return None
    archs = tuple(os.environ.get("QTARGET_CUDA_ARCHS", "80;90;100").split(";"))
    if not all(arch.isdigit() for arch in archs):
        raise SystemExit(f'QTARGET_CUDA_ARCHS must look like "80;90;100", got {";".join(archs)!r}')
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return Cuda(nvcc, re.search(r"release ([\d.]+)", version)[1], archs, cuda_library_dir(nvcc))


def cuda_library_dir(nvcc: str) -> str:
    """The folder of libcudart_static.a, as nvcc says (nvcc on PATH may be a link or a wrapper)."""
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    home = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (home / folder / "libcudart_static.a").exists():
            return str(home / folder)
    raise SystemExit(f"no libcudart_static.a under {home}: install the CUDA runtime's static library")


class BuildNative(build_ext):
    """Compiles each source with its own flags, several at a time, and links one module."""

    def build_extension(self, ext: Extension) -> None:
        cuda = find_cuda()
        avx2 = platform.machine().lower() in ("x86_64", "amd64")
        cpu = "cpu (scalar + avx2)" if avx2 else "cpu (scalar)"
        if cuda is not None:
            archs = ", ".join(f"sm_{arch}" for arch in cuda.archs)
            print(f"qtarget_megatron: building {cpu} and cuda ({archs}) with nvcc {cuda.version}")
        else:
            reason = "QTARGET_CUDA=0" if os.environ.get("QTARGET_CUDA") == "0" else "nvcc not found"
            print(f"qtarget_megatron: building {cpu} only: {reason}")

        objects = Path(self.build_temp, "qtarget")
        commands = self.compile_commands(objects, cuda, avx2)
        jobs = int(os.environ.get("QTARGET_BUILD_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, commands.values()))
        self.link(ext, list(commands), cuda)

    def compile_commands(self, objects: Path, cuda: Cuda | None, avx2: bool) -> dict[Path, list[str]]:
        includes = [f"-I{pybind11.get_include()}", *(f"-I{path}" for path in self.include_dirs)]
        defines = ["-DQTARGET_WITH_AVX2"] if avx2 else []
        if cuda is not None:
            archs = ";".join(cuda.archs)
            defines += [
                "-DQTARGET_WITH_CUDA",
                f'-DQTARGET_CUDA_ARCHS="{archs}"',
                f'-DQTARGET_NVCC_VERSION="{cuda.version}"',
            ]
        commands = {}
        # The longest compilations first.
        for source in CUDA_SOURCES if cuda is not None else []:
            target = object_path(objects, source)
            commands[target] = [cuda.nvcc, *cuda.flags(), *in_out(source, target)]
        for source in [*CPU_SOURCES, AVX2_SOURCE] if avx2 else CPU_SOURCES:
            flags = [*CXX_FLAGS, *(AVX2_FLAGS if source == AVX2_SOURCE else [])]
            target = object_path(objects, source)
            commands[target] = [*cxx(), *flags, *defines, *includes, *in_out(source, target)]
        return commands

    def link(self, ext: Extension, objects: list[Path], cuda: Cuda | None) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*cxx(), "-shared", "-fopenmp", *map(str, objects), "-o", str(target)]
        if cuda is not None:
            # Static: the module imports on a machine without CUDA.
            command += [f"-L{cuda.library_dir}", "-lcudart_static", "-Wl,--exclude-libs,ALL"]
            command += ["-ldl", "-lrt", "-lpthread"]
        run(command)


def cxx() -> list[str]:
    """The C++ compiler; CXX may carry arguments or name a launcher before it."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        raise SystemExit(f"no C++ compiler {command}: install one with OpenMP (GCC), or set CXX")
    return command


def object_path(objects: Path, source: str) -> Path:
    target = objects / (source.replace("/", "_") + ".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def in_out(source: str, target: Path) -> list[str]:
    return ["-c", str(CSRC / source), "-o", str(target)]


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


setup(
    ext_modules=[Extension("qtarget_megatron._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
