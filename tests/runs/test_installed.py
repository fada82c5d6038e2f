"""A package installed by pip from the source distribution, used from the folder of a checkout and from elsewhere."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from finetune_runs import write_data, write_models
from launching import REPOSITORY, Launch

from qtarget_megatron import __version__
from qtarget_megatron.kernels import native

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

SOURCES = ("qtarget_megatron", "csrc", "docs", "examples", "tools", "setup.py", "pyproject.toml", "MANIFEST.in")
FILES = ("LICENSE", "constraints.txt", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml")
SMALL = ["--seq-length", 32, "--micro-batch-size", 1, "--global-batch-size", 2, "--train-iters", 1, "--lr", 1e-3]
# The compiled module takes long to make and is here already: what the linker would write.
COMPILER = """\
#!/usr/bin/env bash
while [[ $# -gt 0 ]]; do
    [[ $1 == -shared ]] && links=1
    [[ $1 == -o ]] && out=$2
    shift
done
if [[ -n ${links:-} ]]; then cp BUILT "$out"; else : >"$out"; fi
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source distribution unpacked, wheel made from it)."""
    folder = tmp_path_factory.mktemp("build")
    (folder / "checkout").mkdir()
    for name in (*SOURCES, *FILES):
        source, target = REPOSITORY / name, folder / "checkout" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(source, target)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    command([sys.executable, "-c", build], folder / "checkout")
    with tarfile.open(folder / f"qtarget_megatron-{__version__}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    tree = folder / f"qtarget_megatron-{__version__}"
    compiler = folder / "c++"
    compiler.write_text(COMPILER.replace("BUILT", native.extension().__file__))
    compiler.chmod(0o755)
    leftover = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/qtarget_megatron"
    (tree / leftover).mkdir(parents=True)
    (tree / leftover / "of_an_earlier_version.py").touch()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    command([*pip, "-w", folder, tree], folder, CXX=str(compiler), QTARGET_CUDA="0")
    # What the build leaves behind is not part of a checkout.
    assert (tree / leftover / "finetune.py").is_file()
    shutil.rmtree(tree / "build")
    return tree, folder / next(path.name for path in folder.glob("*.whl"))


def command(words, folder, **environment):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    words = list(map(str, words))
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """The interpreter of an environment with the wheel, and everything else that this one has."""
    home = tmp_path_factory.mktemp("environment")
    command([sys.executable, "-m", "venv", "--without-pip", home], home)
    found = home / "bin" / "python"
    site = Path(command([found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home).strip())
    # A folder that is named so brings no .pth files of its own: this environment's editable package stays out.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", found, "install", "--ignore-installed", "--no-deps", "--no-index"]
    command([*pip, built[1]], home)
    torchrun = home / "bin" / "torchrun"
    torchrun.write_text(f'#!/usr/bin/env bash\nexec {found} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    return found


@pytest.fixture(scope="module")
def tree(built):
    """The checkout, where nothing may run but what leads to the installed copy."""
    with (built[0] / "qtarget_megatron" / "statistics.py").open("a") as file:
        file.write("\nraise RuntimeError('the source tree runs')\n")
    return built[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    write_data(folder / "train.jsonl", 12, seed=1)
    return folder


def run(words, folder, **environment):
    environment = {"PYTHONPATH": ""} | environment
    with Launch(words, environment, folder=folder) as launch:
        done = launch.wait(timeout=240)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "the source tree at" in done.stdout and "first in statistics.py" in done.stdout
    return done.stdout


def test_what_is_in_the_packages(built):
    tree, wheel = built
    for name in (*FILES, "docs/data.md", "examples/launch/one_node.sh", "tools/plan.py", "csrc/row_math.h", "setup.py"):
        assert (tree / name).is_file(), name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert {f"qtarget_megatron/{Path(native.extension().__file__).name}", "qtarget_megatron/commands/plan.py"} <= names
    assert {"qtarget_megatron/commands/targets_page.html", "qtarget_megatron/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"qtarget_megatron", metadata.split("/")[0]}
    assert {name for name in names if name.endswith(".py")} == files(REPOSITORY, "qtarget_megatron", ".py")
    assert files(tree, "csrc") == files(REPOSITORY, "csrc")
    assert f"\nVersion: {__version__}\n" in text and "\n# qtarget_megatron\n" in text and "\nKeywords: " in text


def files(root, folder, suffix=""):
    found = (path for path in (root / folder).rglob("*") if path.is_file() and path.name.endswith(suffix))
    return {path.relative_to(root).as_posix() for path in found}


def test_finetune_as_a_lone_rank_in_the_checkout(python, tree, models, tmp_path):
    words = [python, "-m", "qtarget_megatron.finetune", "--hf-model", models / "untied", *SMALL]
    printed = run([*words, "--sft-train", models / "train.jsonl", "--save-hf", tmp_path / "hf"], tree)
    assert f"exported the model to {tmp_path / 'hf'}" in printed


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_a_launch_script(python, tree, models, tmp_path, where):
    """Two ranks under torchrun, from the checkout's folder, and as a copy of the script where no checkout is."""
    model = models / "untied"
    values = dict(MODEL=model, TEACHER=model, TRAIN=models / "train.jsonl", OUT=tmp_path / "out")
    values |= dict(GPUS=2, TP=2, SEQ_LENGTH=32, GLOBAL_BATCH=2, STEPS=1, LR=1e-3, PRECISION="")
    environment = {f"QTARGET_{name}": str(value) for name, value in values.items()}
    environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    script = ["bash", tree / "examples" / "launch" / "one_node.sh"]
    if where == "checkout":
        assert run(script, tree, **environment).count("the source tree at") == 1
    else:
        copy = shutil.copy(script[1], tmp_path)
        with Launch(["bash", copy], {"PYTHONPATH": "", **environment}, folder=tmp_path) as launch:
            done = launch.wait(timeout=240)
        assert done.returncode == 0 and "the source tree" not in done.stdout, done.stdout[-4000:]
    assert (tmp_path / "out" / "hf" / "config.json").exists()


def test_a_tool_by_its_path_and_by_its_module(python, tree, models, tmp_path):
    words = ["--hf-model", models / "untied", "--world-size", 1, "--seq-length", 32]
    assert "GiB per rank of a pipeline stage" in run([python, tree / "tools" / "plan.py", *words], tmp_path)
    printed = command([python.parent / "qtarget", "import", "--version"], tmp_path)
    assert printed.startswith(f"qtarget_megatron {__version__}, torch ")
