"""The CUDA kernels as nvcc reports them, where nvcc is: nothing runs, but a spilled register shows."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import REPOSITORY

ARCHITECTURES = ("80", "90", "100")
NVCC = shutil.which("nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/"), "bin"))) or shutil.which("nvcc")
SOURCES = sorted((REPOSITORY / "csrc" / "cuda").glob("rows_*.cu"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
]


def reports(source: Path, folder: Path) -> dict[str, str]:
    """What ptxas says of each kernel (mangled name), for every architecture."""
    # One PTX for all of them: registers are given when it is assembled, and the kernels ask for no newer instruction.
    codes = [f"-gencode=arch=compute_{ARCHITECTURES[0]},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [NVCC, "-O3", "-std=c++17", *codes, "-Xptxas", "-v", "-c", source, "-o", folder / f"{source.stem}.o"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    entries = re.split(r"Compiling entry function '(\w+)' for '(sm_\w+)'", done.stderr)[1:]
    return {f"{name} {arch}": text for name, arch, text in zip(*[iter(entries)] * 3, strict=True)}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills_a_register(source, tmp_path):
    found = reports(source, tmp_path)
    assert {name.split()[1].rstrip("a") for name in found} == {f"sm_{arch}" for arch in ARCHITECTURES}
    assert sum("statistics" in name for name in found) and sum("gradient" in name for name in found)
    for name, text in found.items():
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
        assert len(spills) == 2 and set(spills) == {"0"}, f"{name}: {text.strip()}"


def test_every_dtype_has_a_source():
    assert [path.stem for path in SOURCES] == ["rows_bf16", "rows_fp16", "rows_fp32"]
