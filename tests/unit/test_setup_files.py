"""What a fresh clone relies on: the interpreter search, the pins, the stamp of the installation."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setup_script import make

ROOT = Path(__file__).parents[2]
BASE = getattr(sys, "_base_executable", sys.executable)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def find_python(tmp_path: Path, bin_folder: Path, **env: str) -> subprocess.CompletedProcess:
    """Run tools/find_python.sh seeing only bin_folder's interpreters and an empty home."""
    bin_folder.mkdir(exist_ok=True)
    bash = shutil.which("bash")
    return subprocess.run(
        [bash, str(ROOT / "tools" / "find_python.sh")],
        capture_output=True,
        text=True,
        timeout=800,
        env={"PATH": str(bin_folder), "HOME": str(tmp_path / "home"), **env},
    )


BROKEN_SHIM = "echo 'pyenv: python3.12: command not found' >&2; exit 127"


def test_a_shim_that_fails_is_passed_over_for_one_that_runs(tmp_path):
    executable(tmp_path / "bin" / "python3.12", BROKEN_SHIM)
    executable(tmp_path / "home/.pyenv/versions/3.12.9/bin/python3.12", f'exec "{BASE}" "$@"')
    done = find_python(tmp_path, tmp_path / "bin")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(BASE)


def test_an_interpreter_that_uv_manages_is_found(tmp_path):
    folder = "home/.local/share/uv/python/cpython-3.12.9-linux-x86_64-gnu/bin"
    executable(tmp_path / folder / "python3.12", f'exec "{BASE}" "$@"')
    assert find_python(tmp_path, tmp_path / "bin").returncode == 0


def test_without_any_interpreter_it_says_what_to_install_and_why_not_the_others(tmp_path):
    executable(tmp_path / "bin" / "python3.12", BROKEN_SHIM)
    done = find_python(tmp_path, tmp_path / "bin")
    assert done.returncode == 1 and done.stdout == ""
    assert "pyenv install 3.12" in done.stderr
    assert "bin/python3.12: pyenv: python3.12: command not found" in done.stderr


def test_a_named_interpreter_is_the_only_one_tried(tmp_path):
    executable(tmp_path / "bin" / "python3.12", f'exec "{BASE}" "$@"')
    wrong = executable(tmp_path / "other", "echo 'is Python 3.9' >&2; exit 1")
    done = find_python(tmp_path, tmp_path / "bin", PYTHON=str(wrong))
    assert done.returncode == 1
    assert f"PYTHON={wrong} cannot be used" in done.stderr and "is Python 3.9" in done.stderr


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_requirement_has_a_pin_within_its_range():
    extras = project()["optional-dependencies"]
    declared = [*project()["dependencies"], *extras["demo"], *extras["test"], *extras["dev"], *extras["docs"]]
    # make test builds the site, and make docs installs nothing.
    assert set(extras["docs"]) <= set(extras["test"])
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    for requirement in map(Requirement, declared):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not admit {version}"


def test_pins_are_exact_plain_and_sorted():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line) for line in names)
    assert names == sorted(names)


@pytest.mark.parametrize("name", ["Makefile", "pyproject.toml", "constraints.txt", ".ci/run"])
def test_setup_files_name_packages_only(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|(^|\s)-i\s+http", text)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the Makefile with a stand-in environment whose pip records and may fail."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "find_python.sh", tmp_path / "tools")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "core.h").touch()
    executable(tmp_path / ".venv/bin/python", 'echo "$@" >>calls; test ! -e fail')
    os.utime(tmp_path / "csrc" / "core.h", (1, 1))
    for name in ("pyproject.toml", "constraints.txt", "tools/find_python.sh"):
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".venv" / ".dependencies-installed").touch()
    os.utime(tmp_path / ".venv" / ".dependencies-installed", (2, 2))
    return tmp_path


def builds(folder: Path) -> int:
    calls = folder / "calls"
    return calls.read_text().count("--editable .") if calls.exists() else 0


def test_package_is_built_once_and_again_when_a_header_changes(checkout):
    assert make(checkout, "install").returncode == 0
    assert make(checkout, "install").returncode == 0
    assert builds(checkout) == 1
    stamp = checkout / ".venv" / ".package-built"
    later = stamp.stat().st_mtime + 10
    os.utime(checkout / "csrc" / "core.h", (later, later))
    assert make(checkout, "install").returncode == 0
    assert builds(checkout) == 2


def test_lint_is_style_and_types(checkout):
    assert make(checkout, "lint").returncode == 0
    calls = (checkout / "calls").read_text().splitlines()
    assert calls[-3:] == ["-m ruff check .", "-m ruff format --check .", "-m mypy"]


def test_failed_build_is_not_taken_for_a_finished_one(checkout):
    (checkout / "fail").touch()
    failed = make(checkout, "install")
    assert failed.returncode != 0 and "The build failed" in failed.stderr
    assert make(checkout, "install").returncode != 0
    (checkout / "fail").unlink()
    assert make(checkout, "install").returncode == 0
    assert builds(checkout) == 3


def test_make_alone_teaches(checkout):
    done = make(checkout)
    assert done.returncode == 0
    for target in ("demo", "test", "test-quick", "docs", "gpu", "lint", "clean"):
        assert f"make {target} " in done.stdout
