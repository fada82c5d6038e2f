"""A checkout that is not built gives way to the installed copy of the package.

``python -m``, ``torchrun -m`` and ``tools/*.py`` put the checkout first on the path, where it hides what
``pip install .`` has installed: the only copy with the compiled module. The installed copy is then used as a whole.
Python files of one copy over the compiled module of another would be a silent fault: the two share layouts of memory.
"""

from __future__ import annotations

import filecmp
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_PACKAGE = "qtarget_megatron"


def is_built(folder: Path) -> bool:
    """Whether this copy of the package has a compiled module for this Python."""
    return PathFinder.find_spec(f"{_PACKAGE}._C", [str(folder)]) is not None


def is_source_tree(folder: Path) -> bool:
    """Whether this copy of the package lies in a checkout, or in an unpacked source distribution."""
    return (folder.parent / "csrc").is_dir() and (folder.parent / "setup.py").is_file()


def installed_copy(folder: Path) -> ModuleSpec | None:
    """The first copy on Python's path that is built, where this one is a source tree that is not."""
    if is_built(folder) or not is_source_tree(folder):
        return None
    return next((spec for spec in _others(folder) if is_built(_folder(spec))), None)


def give_way(folder: Path, copy: ModuleSpec) -> None:
    """Make copy the package that is being imported; a line says so where its files are others."""
    found = _folder(copy)
    if (name := _difference(folder, found)) is not None and _is_first_process():
        print(
            f"{_PACKAGE}: the source tree at {folder.parent} is not built, so the installed copy at {found} runs. They "
            f"differ, first in {name}: run make, or pip install . again, to run what the source tree holds",
            file=sys.stderr,
            flush=True,
        )
    # Each copy has its own.
    sys.modules.pop(__name__)
    module = importlib.util.module_from_spec(copy)
    sys.modules[_PACKAGE] = module
    assert copy.loader is not None  # see _others
    copy.loader.exec_module(module)


def _others(folder: Path) -> Iterator[ModuleSpec]:
    entries = [entry for entry in sys.path if Path(entry or ".").resolve() != folder.parent.resolve()]
    for finder in sys.meta_path:
        for entry in entries:
            # An editable installation has a finder of its own, which heeds no path.
            spec = finder.find_spec(_PACKAGE, [entry]) if hasattr(finder, "find_spec") else None
            if spec is not None and spec.origin is not None and spec.loader is not None:
                yield spec


def _folder(spec: ModuleSpec) -> Path:
    assert spec.origin is not None  # see _others
    return Path(spec.origin).parent


def _difference(one: Path, other: Path) -> str | None:
    """The first file that is not the same in both."""
    names = sorted({path.relative_to(root).as_posix() for root in (one, other) for path in root.rglob("*.py")})
    for name in names:
        both = (one / name).is_file() and (other / name).is_file()
        if not both or not filecmp.cmp(one / name, other / name, shallow=False):
            return name
    return None


def _is_first_process() -> bool:
    # A spawned process has its name before it imports anything, and knows its parent only later.
    return os.environ.get("RANK", "0") == "0" and multiprocessing.current_process().name == "MainProcess"
