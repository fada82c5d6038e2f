"""A checkout without its compiled module: what works there, and how an installed copy takes its place."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY

from qtarget_megatron.kernels import native
from qtarget_megatron.megatron.jobs import dataset_run
from qtarget_megatron.megatron.runtime import cpu_platform
from qtarget_megatron.megatron.training.arguments import check_backend

# A start takes seconds, and minutes where many others are made on the machine.
pytestmark = pytest.mark.timeout(600)

PACKAGE = "qtarget_megatron"
# The environment's own editable installation is taken away, so that only the folders of a test are found.
START = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path[:] = [entry for entry in sys.path if not {str(REPOSITORY)!r} == entry]
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A checkout that is not built."""
    root = tmp_path_factory.mktemp("tree").resolve()
    copy_package(root)
    shutil.copy(REPOSITORY / "setup.py", root)
    (root / "csrc").mkdir()
    return root


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with an installed copy."""
    root = tmp_path_factory.mktemp("site").resolve()
    copy_package(root)
    shutil.copy(native.extension().__file__, root / PACKAGE)
    return root


def copy_package(root):
    shutil.copytree(REPOSITORY / PACKAGE, root / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.so"))


def test_missing_kernels_are_named_before_a_model_is_read(monkeypatch):
    def missing():
        raise ValueError("no compiled module")

    monkeypatch.setattr(native, "extension", missing)
    monkeypatch.setattr(cpu_platform, "activate", lambda requested: True)
    monkeypatch.setattr(dataset_run, "open_model", lambda *_, **__: pytest.fail("the model is read"))
    with pytest.raises(ValueError, match="no compiled module"):
        dataset_run.DatasetRun("score", None, [], tokenizer=None, file=None)
    flags = argparse.Namespace(qtarget_backend="auto", bf16=True, fp16=False)
    with pytest.raises(ValueError, match="no compiled module"):
        check_backend(flags, on_cpu=True)
    flags.qtarget_backend = "reference"
    check_backend(flags, on_cpu=True)
    flags.qtarget_backend = "cuda"
    with pytest.raises(ValueError, match="needs cuda tensors, got cpu logits"):
        check_backend(flags, on_cpu=True)


def run(program, folder, *path, **environment):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", START + program], cwd=folder, env=env, capture_output=True, text=True, timeout=500
    )


def test_without_a_compiled_module(tree):
    """The package is imported and the reference kernels compute; every native one says in a line what to do."""
    program = f"""
import torch
import {PACKAGE}, {PACKAGE}.huggingface, {PACKAGE}.data
logits, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([1, 2, 4])
loss = {PACKAGE}.qtarget_cross_entropy(logits, labels, objective={PACKAGE}.objectives.sft(), backend="reference")
loss.sum().backward()
expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
assert torch.allclose(loss, expected, atol=1e-6), (loss, expected)
for backend in ("auto", "cpp", "cuda"):
    try:
        {PACKAGE}.kernels.choose(backend, "cuda" if backend == "cuda" else "cpu", torch.bfloat16)
    except ValueError as error:
        print(error)
"""
    done = run(program, tree)
    assert done.returncode == 0, done.stderr
    expected = (
        f"the native kernels need the compiled module: this is the source tree at {tree} without it, and no installed "
        "copy was found: run make, or pip install . there"
    )
    assert done.stdout.splitlines() == [expected] * 3 and done.stderr == ""


WHERE = f"""
import multiprocessing
import {PACKAGE}.objectives, {PACKAGE}.kernels.native as native

def folders():
    native.extension()
    found = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "{PACKAGE}"]
    return sorted({{name.split("/{PACKAGE}/")[0] for name in found}})

def child(context):
    with multiprocessing.get_context(context).Pool(1) as pool:
        return pool.apply(folders)

if __name__ == "__main__":
    print(folders(), child("fork"), child("spawn"), {PACKAGE}.__file__)
"""


def places(tree, site, **environment):
    """Where the modules of the package came from, in a process and its children; what stderr says."""
    (tree / "where.py").write_text(START + WHERE)
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"} | environment
    words = [sys.executable, "-m", "where"]
    done = subprocess.run(words, cwd=tree, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_an_installed_copy_takes_its_place_as_a_whole(tree, site):
    installed = f"{[str(site)]} {[str(site)]} {[str(site)]} {site / PACKAGE / '__init__.py'}"
    assert places(tree, site) == (installed, "")


def test_a_copy_that_differs_says_so_once(tree, site, tmp_path):
    other = tmp_path / "site"
    shutil.copytree(site, other)
    (other / PACKAGE / "statistics.py").open("a").write("\n# Another.\n")
    installed = f"{[str(other)]} {[str(other)]} {[str(other)]} {other / PACKAGE / '__init__.py'}"
    found, said = places(tree, other)
    assert found == installed
    assert said.count("\n") == 1 and f"the source tree at {tree} is not built, so the installed copy at {other}" in said
    assert "first in statistics.py: run make, or pip install . again" in said
    assert places(tree, other, RANK="1") == (installed, "")


def test_a_built_checkout_stays_itself(tree, site, tmp_path):
    built = tmp_path / "built"
    shutil.copytree(tree, built)
    shutil.copy(native.extension().__file__, built / PACKAGE)
    assert places(built, site)[0].startswith(f"{[str(built)]} ")


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_compiled_module_that_does_not_load_is_named(tree, tmp_path, content):
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken)
    (broken / PACKAGE / Path(native.extension().__file__).name).write_bytes(content)
    program = f"""
import {PACKAGE}.kernels.native as native
try:
    native.extension()
except ValueError as error:
    print(error)
"""
    done = run(program, broken)
    assert f"the one in {broken / PACKAGE} does not load (" in done.stdout and done.stdout.count("\n") == 1, done
