"""Whether a source tree of Megatron has the names that this package uses: modules, functions, classes, methods that are
called on a base class, and the keyword arguments of each call.

    python tools/megatron_names.py                       # the Megatron that is installed
    python tools/megatron_names.py ~/Megatron-LM         # a checkout, the development branch say

Sources are parsed, nothing is imported. What is called through an object whose class is not written down, and what a
function does, is not looked at: a tree that has every name still has to be run. Exit code: 0 all there, 1 a line for
each name that is not, 2 bad input.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "qtarget_megatron"


@dataclass(frozen=True)
class Use:
    """A name of Megatron in a file of the package.

    where: file:line. module, name: what is imported. member: an attribute or method of it, where one is used. keywords:
    of a call, by name.
    """

    where: str
    module: str
    name: str
    member: str | None = None
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join(filter(None, (self.module, self.name, self.member)))


def uses(package: Path = PACKAGE) -> list[Use]:
    """Every use of a name that is imported from Megatron, in the files' order."""
    found: list[Use] = []
    for path in sorted(package.rglob("*.py")):
        found += _uses_in(ast.parse(path.read_text("utf-8")), str(path.relative_to(package.parent)))
    return found


def _uses_in(tree: ast.Module, file: str) -> Iterator[Use]:
    names: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            for alias in node.names:
                names[alias.asname or alias.name] = node.module or "", alias.name
                yield Use(f"{file}:{node.lineno}", node.module or "", alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
            if (target := _target(node.func, names)) and keywords:
                yield Use(f"{file}:{node.lineno}", *target, keywords)
        elif isinstance(node, ast.Attribute) and (target := _target(node, names)):
            yield Use(f"{file}:{node.lineno}", *target)
        elif isinstance(node, ast.ClassDef):
            yield from _calls_of_base(node, names, file)


def _target(node: ast.AST, names: dict[str, tuple[str, str]]) -> tuple[str, str, str | None] | None:
    """(module, name, member) of an imported name or of an attribute of one."""
    if isinstance(node, ast.Name) and node.id in names:
        return *names[node.id], None
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
        return *names[node.value.id], node.attr
    return None


def _calls_of_base(of: ast.ClassDef, names: dict[str, tuple[str, str]], file: str) -> Iterator[Use]:
    bases = [target for base in of.bases if (target := _target(base, names))]
    if len(bases) != 1 or len(of.bases) != 1:
        return
    module, name, _ = bases[0]
    for node in ast.walk(of):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_super(node.func.value):
            keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
            yield Use(f"{file}:{node.lineno}", module, name, node.func.attr, keywords)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


class Sources:
    """A source tree that holds the folder ``megatron``."""

    def __init__(self, root: Path):
        if not (root / "megatron" / "core").is_dir():
            raise ValueError(f"expected a folder with megatron/core in it, got {root}")
        self._root = root
        self._module = cache(self._parsed)

    def problem(self, use: Use) -> str | None:
        """What of a use is not there; None where all is, or where the sources alone do not tell."""
        found = self._find(use.module, use.name)
        if found is None:
            return f"{use.module} has no {use.name}"
        module, node = found
        if use.member is not None and isinstance(node, ast.ClassDef):
            member = self._member(module, node, use.member)
            if member is None:
                return None if self._is_open(module, node) else f"{use.module}.{use.name} has no {use.member}"
            module, node = member
        elif use.member is not None and node is None:
            inside = self._find(module, use.member)
            if inside is None:
                return f"{module} has no {use.member}"
            module, node = inside
        known = self._parameters(module, node)
        unknown = [name for name in use.keywords if known is not None and name not in known]
        return f"{use} takes no {', '.join(unknown)}" if unknown else None

    def _parsed(self, module: str) -> ast.Module | None:
        path = self._root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text("utf-8"))
        return None

    def _exists(self, module: str) -> bool:
        path = self._root.joinpath(*module.split("."))
        return path.is_dir() or path.with_suffix(".py").is_file()

    def _find(self, module: str, name: str, depth: int = 8) -> tuple[str, ast.AST | None] | None:
        """(module, definition) of a name, wherever it is defined; (module, None) of a module; None: there is none."""
        tree = self._module(module)
        if tree is not None and depth:
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name and node in _outer(tree):
                    return module, node
                if isinstance(node, ast.ImportFrom) and (origin := _origin(self._package(module), node)):
                    for alias in node.names:
                        is_name = (alias.asname or alias.name) == name
                        if is_name and (found := self._find(origin, alias.name, depth - 1)):
                            return found
                        if alias.name == "*" and (found := self._find(origin, name, depth - 1)):
                            return found
            for node in _outer(tree):
                if name in _bound(node):
                    return module, node
        if self._exists(f"{module}.{name}"):
            return f"{module}.{name}", None
        return None

    def _package(self, module: str) -> str:
        path = self._root.joinpath(*module.split("."))
        return module if path.is_dir() else module.rpartition(".")[0]

    def _bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.AST | None] | None]:
        for base in node.bases:
            if isinstance(base, ast.Subscript):
                base = base.value
            yield self._find(module, base.id) if isinstance(base, ast.Name) else None

    def _is_open(self, module: str, node: ast.ClassDef) -> bool:
        """Whether a class inherits from what is not in this tree."""
        for found in self._bases(module, node):
            if found is None or not isinstance(found[1], ast.ClassDef) or self._is_open(found[0], found[1]):
                return True
        return False

    def _member(self, module: str, node: ast.ClassDef, name: str) -> tuple[str, ast.AST] | None:
        for inner in ast.walk(node):
            is_bound = name in _bound(inner) or (isinstance(inner, ast.Attribute) and inner.attr == name)
            if (isinstance(inner, ast.FunctionDef) and inner.name == name) or is_bound:
                return module, inner
        for found in self._bases(module, node):
            if found and isinstance(found[1], ast.ClassDef) and (member := self._member(*found, name)):
                return member
        return None

    def _parameters(self, module: str, node: ast.AST | None) -> set[str] | None:
        """Names that a call may give; None where the sources do not tell, or it takes any."""
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            return None if arguments.kwarg else {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}
        if not isinstance(node, ast.ClassDef):
            return None
        if (init := self._member(module, node, "__init__")) is not None:
            return self._parameters(*init)
        fields = {name for inner in node.body if isinstance(inner, ast.AnnAssign) for name in _bound(inner)}
        for found in self._bases(module, node):
            inherited = None if found is None else self._parameters(*found)
            if inherited is None:
                return None
            fields |= inherited
        return fields or None


def _outer(tree: ast.Module) -> list[ast.AST]:
    """Statements of a module, those under a condition or a try too."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        found.append(node)
        if isinstance(node, ast.If | ast.Try):
            waiting += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)
            ]
        elif isinstance(node, ast.ExceptHandler):
            waiting += node.body
    return found


def _bound(node: ast.AST) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _origin(package: str, node: ast.ImportFrom) -> str | None:
    """The module that an import names, inside megatron."""
    module = node.module or ""
    if node.level:
        parts = package.split(".")
        module = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [module])])
    return module if module.split(".")[0] == "megatron" else None


def installed() -> Path:
    """The folder that holds the Megatron that is imported here."""
    found = importlib.util.find_spec("megatron.core")
    if found is None or found.origin is None:
        raise ValueError("megatron-core is not installed: name a source tree")
    return Path(found.origin).parent.parent.parent


def main(argv: list[str] | None = None) -> int:
    """Compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="?", type=Path, metavar="DIR", help="default: the Megatron that is installed")
    try:
        sources = Sources(parser.parse_args(argv).sources or installed())
    except ValueError as error:
        print(f"megatron_names: error: {error}", file=sys.stderr)
        return 2
    found = uses()
    problems = [f"{use.where}: {problem}" for use in found if (problem := sources.problem(use))]
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{len({str(use) for use in found})} names of Megatron in {len(found)} places, {len(problems)} not there")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
