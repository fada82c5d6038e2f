"""The CUDA kernels as nvcc compiles them for a package: nothing runs, but what they were made into shows."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import setup_script
from launching import REPOSITORY

SETUP = setup_script.load()
NVCC = shutil.which("nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/"), "bin"))) or shutil.which("nvcc")
SOURCES = sorted((REPOSITORY / "csrc" / "cuda").glob("rows_*.cu"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
]


class Kernel(NamedTuple):
    """report: ptxas's, with registers and spills."""

    name: str
    report: str
    instructions: list[str]


def cuobjdump() -> str | None:
    """The toolkit's, or Triton's, which torch brings along."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(folder, "backends/nvidia/bin") for folder in triton.submodule_search_locations] if triton else []
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.stem)
def kernels(request, tmp_path_factory) -> list[Kernel]:
    """Those of a source, for each architecture."""
    made = tmp_path_factory.mktemp("machine-code") / f"{request.param.stem}.o"
    flags = SETUP.Cuda(NVCC, "", SETUP.DEFAULT_ARCHS, "").flags()
    entries = re.split(
        r"Compiling entry function '(\w+)' for '(sm_\d+)a?'",
        output(NVCC, *flags, "-Xptxas", "-v", "-c", request.param, "-o", made),
    )
    reports = {(name, arch): text for name, arch, text in zip(entries[1::3], entries[2::3], entries[3::3], strict=True)}
    dump = cuobjdump()
    assert dump is not None, "cuobjdump is neither in the CUDA toolkit nor in Triton's package"
    codes = {}
    for arch in SETUP.DEFAULT_ARCHS:
        functions = re.split(r"Function : (\w+)\n", output(dump, "-sass", "-arch", f"sm_{arch}", made))
        for name, code in zip(functions[1::2], functions[2::2], strict=True):
            codes[name, f"sm_{arch}"] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", code)
    assert codes.keys() == reports.keys()
    for kind in ("statistics", "gradient"):
        assert {arch for name, arch in codes if kind in name} == {f"sm_{arch}" for arch in SETUP.DEFAULT_ARCHS}
    return [Kernel(" ".join(key), reports[key], codes[key]) for key in codes]


def without(kernels: list[Kernel], pattern: str) -> list[str]:
    """The names of the kernels in which no instruction matches."""
    return [
        kernel.name
        for kernel in kernels
        if not any(re.search(pattern, instruction) for instruction in kernel.instructions)
    ]


def test_no_kernel_spills_a_register(kernels):
    for kernel in kernels:
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", kernel.report)
        assert len(spills) == 2 and set(spills) == {"0"}, f"{kernel.name}: {kernel.report.strip()}"


def test_rows_are_read_and_gradients_written_16_bytes_at_a_time(kernels):
    assert without(kernels, r"\bLDG\.\S*128") == []
    # RZ, zeros, is what padding is cleared with.
    gradients = [kernel for kernel in kernels if "gradient" in kernel.name]
    assert without(gradients, r"\bSTG\.\S*128\S* .*, R\d+$") == []


def test_no_kernel_of_rows_calculates_in_double(kernels):
    assert len(without(kernels, r"\bD(ADD|MUL|FMA|SETP|MNMX)\b")) == len(kernels)


def test_every_dtype_has_a_source():
    assert [path.stem for path in SOURCES] == ["rows_bf16", "rows_fp16", "rows_fp32"]
