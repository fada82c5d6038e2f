"""Builds qtarget_megatron._C: the CPU kernels always, the CUDA kernels where nvcc is found.

Environment:
    QTARGET_CUDA        1: build the CUDA kernels, error where they cannot be; 0: never;
                        unset: where nvcc is found and compiles them
    QTARGET_CUDA_ARCHS  compute capabilities, "80;90;100" or "8.0 9.0 10.0"; default: those of
                        80, 90, 100 that nvcc knows. A GPU of the same major version and a larger
                        minor one (86, 89, 103) runs the same machine code; a later one (120)
                        compiles the PTX of the newest when it first runs
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
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path("csrc")
CPU_SOURCES = ["binding.cpp", "cpu/dispatch.cpp", "cpu/scalar.cpp", "cpu/tokens.cpp"]
CUDA_SOURCES = ["cuda/launch.cu", "cuda/rows_fp32.cu", "cuda/rows_bf16.cu", "cuda/rows_fp16.cu", "cuda/tokens.cu"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
# row_math.h carries unrolling hints for nvcc; only explicit fused multiply-adds are wanted.
CXX_FLAGS += ["-Wno-unknown-pragmas", "-ffp-contract=off"]
# Each is compiled for its own instructions; the processor chooses at run time.
VECTOR_SOURCES = {"avx2": "cpu/avx2.cpp", "avx512": "cpu/avx512.cpp"}
VECTOR_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    # GCC's own header of the intrinsics reads variables that it leaves uninitialized on purpose.
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
}
# What older compilers or assemblers do not know, besides the flags.
AVX512_PROBE = """
#include <immintrin.h>
int main() {
    __m512 wide = _mm512_setzero_ps();
    __m256i half;
    asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(wide));
    return __builtin_cpu_supports("avx512bf16") + _mm256_extract_epi32(half, 0);
}
"""
# -ftz: an exponential is a product and one instruction; for the sake of numbers below the normal ones it has four more.
NVCC_FLAGS = ["-O3", "-std=c++17", "-ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
DEFAULT_ARCHS = ("80", "90", "100")


class CudaUnavailable(Exception):
    """Why the CUDA kernels cannot be built, in a line."""


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


def find_cuda() -> Cuda:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        raise CudaUnavailable("nvcc not found: put it on PATH or set CUDA_HOME")
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = re.search(r"release ([\d.]+)", answer.stdout)
    if release is None:
        raise CudaUnavailable(f"{nvcc} --version fails: {first_error(answer.stdout + answer.stderr)}")
    archs = cuda_archs(nvcc, release[1], os.environ.get("QTARGET_CUDA_ARCHS"))
    return Cuda(nvcc, release[1], archs, cuda_library_dir(nvcc))


def cuda_archs(nvcc: str, version: str, named: str | None) -> tuple[str, ...]:
    """Those to build for: the named ones, which nvcc must know, or those of the default that it knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = re.findall(r"^compute_(\d+)$", listed, re.MULTILINE)
    if named:
        words = re.split(r"[;,\s]+", named.strip())
        # The kernels use no instruction of one chip alone, which is what an a or f after the number allows.
        archs = [re.fullmatch(r"(\d+)\.?(\d)[af]?", word) for word in words]
        if not all(archs):
            raise SystemExit(f'QTARGET_CUDA_ARCHS must look like "80;90;100", got {named!r}')
        archs = tuple(dict.fromkeys(arch[1] + arch[2] for arch in archs))
        if unknown := [arch for arch in archs if arch not in known]:
            raise SystemExit(
                f"QTARGET_CUDA_ARCHS names {', '.join(unknown)}, which nvcc {version} does not know: "
                f"it knows {', '.join(known)}"
            )
        return archs
    archs = tuple(arch for arch in DEFAULT_ARCHS if arch in known)
    if not archs:
        raise CudaUnavailable(f"nvcc {version} knows none of the architectures {', '.join(DEFAULT_ARCHS)}")
    if left_out := [f"sm_{arch}" for arch in DEFAULT_ARCHS if arch not in archs]:
        print(f"qtarget_megatron: nvcc {version} does not know {', '.join(left_out)}: left out")
    return archs


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
    raise CudaUnavailable(f"no libcudart_static.a under {home}: install the CUDA runtime's static library")


class BuildPython(build_py):
    """Starts from nothing: modules that an earlier version left in build/ would go into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "qtarget_megatron"), ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Compiles each source with its own flags, several at a time, and links one module."""

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("QTARGET_CUDA") or None
        if wanted not in (None, "0", "1"):
            raise SystemExit(f"QTARGET_CUDA must be 0, 1 or unset, got {wanted!r}")
        try:
            if wanted == "0":
                raise CudaUnavailable("QTARGET_CUDA=0")
            self.build(ext, find_cuda())
        except CudaUnavailable as reason:
            if wanted == "1":
                raise SystemExit(f"QTARGET_CUDA=1, but {reason}") from None
            print(f"qtarget_megatron: building without CUDA: {reason}", flush=True)
            self.build(ext, None)

    def build(self, ext: Extension, cuda: Cuda | None) -> None:
        objects = Path(self.build_temp, "qtarget")
        vectors = vector_sets(objects)
        names = f"cpu ({' + '.join(['scalar', *vectors])})"
        if cuda is not None:
            archs = ", ".join(f"sm_{arch}" for arch in cuda.archs)
            names += f" and cuda ({archs}) with nvcc {cuda.version}"
        print(f"qtarget_megatron: building {names}", flush=True)
        commands = self.compile_commands(objects, cuda, vectors)
        jobs = int(os.environ.get("QTARGET_BUILD_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, commands.values()))
        self.link(ext, list(commands), cuda)

    def compile_commands(self, objects: Path, cuda: Cuda | None, vectors: list[str]) -> dict[Path, list[str]]:
        includes = [f"-I{pybind11.get_include()}", *(f"-I{path}" for path in self.include_dirs)]
        defines = [f"-DQTARGET_WITH_{name.upper()}" for name in vectors]
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
        flags_of = {VECTOR_SOURCES[name]: VECTOR_FLAGS[name] for name in reversed(vectors)}
        for source, own_flags in (flags_of | dict.fromkeys(CPU_SOURCES, [])).items():
            flags = [*CXX_FLAGS, *own_flags]
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


def vector_sets(folder: Path) -> list[str]:
    """The instruction sets besides plain C++ that the compiler can build for, slowest first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    probe, out = folder / "probe.cpp", folder / "probe.o"
    probe.write_text(AVX512_PROBE)
    command = [*cxx(), "-std=c++17", *VECTOR_FLAGS["avx512"], "-c", str(probe), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return ["avx2", "avx512"]
    print(f"qtarget_megatron: no AVX-512, which {cxx()[0]} does not build: {done.stderr.strip().splitlines()[:1]}")
    return ["avx2"]


def object_path(objects: Path, source: str) -> Path:
    target = objects / (source.replace("/", "_") + ".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def in_out(source: str, target: Path) -> list[str]:
    return ["-c", str(CSRC / source), "-o", str(target)]


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode != 0:
        reason = f"{command[0]} fails: {first_error(done.stderr)}"
        raise CudaUnavailable(reason) if Path(command[0]).name == "nvcc" else SystemExit(reason)


def first_error(text: str) -> str:
    """The line of a compiler's output that says most."""
    lines = text.strip().splitlines() or ["it says nothing"]
    return next((line for line in lines if "error" in line or "fatal" in line), lines[0])


setup(
    ext_modules=[Extension("qtarget_megatron._C", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
