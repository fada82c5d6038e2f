"""What setup.py builds with the nvcc that is there: none of these runs a compiler."""

from pathlib import Path

import pytest
import setup_script
from setuptools import Distribution, Extension

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.85" ;;
--list-gpu-arch) printf 'compute_%s\\n' {known} ;;
--dryrun) echo '#$ TOP={top}' >&2 ;;
*) {compiles} ;;
esac
"""
# What a compiler was asked is what it makes.
MAKES_IT = 'for word; do [ "$before" = -o ] && echo "$*" >"$word"; before=$word; done; true'
FAILS = 'echo "nvcc warning : old" >&2; echo "rows.cuh(7): error: \'__stuff\' is undefined" >&2; exit 2'
OLDER = dict(version="12.6", known="50 80 86 90")


@pytest.fixture
def setup_py():
    return setup_script.load()


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Puts an nvcc in CUDA_HOME that answers as told, and a C++ compiler that makes whatever it is asked for."""
    for name in ("QTARGET_CUDA", "QTARGET_CUDA_ARCHS", "QTARGET_BUILD_JOBS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()

    def executable(name, text):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    monkeypatch.setenv("CXX", str(executable("c++", f"#!/bin/sh\n{MAKES_IT}\n")))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    def install(version="13.0", known="75 80 86 90 100 103 110 120", compiles=MAKES_IT):
        executable("nvcc", NVCC.format(version=version, known=known, top=tmp_path, compiles=compiles))

    install()
    return install


def test_the_default_is_what_nvcc_knows_of_it(setup_py, toolkit, capsys):
    assert setup_py.find_cuda().archs == ("80", "90", "100")
    assert capsys.readouterr().out == ""
    toolkit(**OLDER)
    cuda = setup_py.find_cuda()
    assert cuda.archs == ("80", "90") and cuda.version == "12.6"
    assert capsys.readouterr().out == "qtarget_megatron: nvcc 12.6 does not know sm_100: left out\n"
    assert cuda.flags()[-1] == "-gencode=arch=compute_90,code=compute_90"
    assert not any("100" in flag for flag in cuda.flags())


@pytest.mark.parametrize("named", ["90;100", "90,100", " 9.0 10.0 ", "90a;100f", "9.0a, 10.0", "90;100;90"])
def test_architectures_may_be_spelled_as_others_do(setup_py, toolkit, monkeypatch, named):
    monkeypatch.setenv("QTARGET_CUDA_ARCHS", named)
    assert setup_py.find_cuda().archs == ("90", "100")


@pytest.mark.parametrize(
    "named, line",
    [
        ("90;100", "QTARGET_CUDA_ARCHS names 100, which nvcc 12.6 does not know: it knows 50, 80, 86, 90"),
        ("120,103", "QTARGET_CUDA_ARCHS names 120, 103, which nvcc 12.6 does not know: it knows 50, 80, 86, 90"),
        ("sm_90", "QTARGET_CUDA_ARCHS must look like \"80;90;100\", got 'sm_90'"),
        ("9", "QTARGET_CUDA_ARCHS must look like \"80;90;100\", got '9'"),
    ],
)
def test_an_architecture_that_is_named_must_be_known(setup_py, toolkit, monkeypatch, named, line):
    toolkit(**OLDER)
    monkeypatch.setenv("QTARGET_CUDA_ARCHS", named)
    with pytest.raises(SystemExit) as refusal:
        setup_py.find_cuda()
    assert str(refusal.value) == line


def build(setup_py, tmp_path):
    """The compilers' arguments, by what they made: the fakes write them there."""
    command = setup_py.BuildNative(Distribution())
    command.build_lib, command.build_temp, command.include_dirs = str(tmp_path / "lib"), str(tmp_path / "temp"), []
    command.build_extension(Extension("qtarget_megatron._C", sources=[]))
    made = [path for path in Path(tmp_path).rglob("*") if path.suffix in (".o", ".so")]
    return {path.name.removesuffix(path.suffix).split(".")[0]: path.read_text() for path in made}


def test_a_working_nvcc_builds_both_halves(setup_py, toolkit, tmp_path, capsys):
    toolkit(**OLDER)
    made = build(setup_py, tmp_path)
    assert "-lcudart_static" in made["_C"] and "cuda_rows_bf16.cu.o" in made["_C"]
    assert '-DQTARGET_CUDA_ARCHS="80;90"' in made["binding"]
    assert "and cuda (sm_80, sm_90) with nvcc 12.6" in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken, reason",
    [
        (dict(compiles=FAILS), "bin/nvcc fails: rows.cuh(7): error: '__stuff' is undefined"),
        (dict(version="10.1", known="30 75"), "nvcc 10.1 knows none of the architectures 80, 90, 100"),
    ],
)
def test_an_nvcc_that_does_not_serve_leaves_the_cpu_half(
    setup_py, toolkit, tmp_path, monkeypatch, capsys, broken, reason
):
    toolkit(**broken)
    made = build(setup_py, tmp_path)
    assert ".cu.o" not in made["_C"] and "cudart" not in made["_C"] and "cpu_scalar.cpp.o" in made["_C"]
    assert "QTARGET_WITH_CUDA" not in made["binding"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "without CUDA" in line]
    assert line.endswith(reason)
    monkeypatch.setenv("QTARGET_CUDA", "1")
    with pytest.raises(SystemExit) as refusal:
        build(setup_py, tmp_path)
    message = str(refusal.value)
    assert message.startswith("QTARGET_CUDA=1, but ") and message.endswith(reason) and "\n" not in message
    assert refusal.value.__suppress_context__
    monkeypatch.setenv("QTARGET_CUDA", "0")
    toolkit(compiles="exit 9")
    assert ".cu.o" not in build(setup_py, tmp_path)["_C"]
