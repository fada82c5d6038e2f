"""The import graph of a package: modules, arrows, floors, circles, and the arrows between its folders that run back.

    python tools/import_graph.py [FOLDER] [--arrows]

A module's floor is one above the highest floor that it imports from; a circle stands on one floor. An arrow between two
folders runs back where the other folder, or what it needs, imports from this one too.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

Graph = dict[str, set[str]]


def modules_of(folder: Path) -> Graph:
    """Every module of the package in folder, and which of its modules it imports, also inside of functions."""
    files = {_name(folder, path): path for path in sorted(folder.rglob("*.py"))}
    return {name: set(_imported(name, path, set(files), folder.name)) - {name} for name, path in files.items()}


def _name(folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


def _imported(name: str, path: Path, known: set[str], package: str) -> Iterator[str]:
    above = [] if name == "__init__" else name.split(".")
    if path.name != "__init__.py":
        above = above[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [package, *above[: len(above) + 1 - node.level]] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] != package:
                continue
            # The longest beginning that is a module: the rest is a name in it.
            ends = (".".join(target[1:end]) or "__init__" for end in range(len(target), 0, -1))
            found = next((end for end in ends if end in known), None)
            if found:
                yield found


def circles_of(graph: Graph) -> list[list[str]]:
    """The sets of nodes that reach one another, of more than one node."""
    reached = {node: _reached(graph, node) for node in graph}
    groups = {
        tuple(sorted({other for other in graph if other in reached[node] and node in reached[other]})) for node in graph
    }
    return sorted(list(group) for group in groups if len(group) > 1)


def _reached(graph: Graph, node: str) -> set[str]:
    seen, waiting = set(), [node]
    while waiting:
        for other in graph[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def floors_of(graph: Graph) -> dict[str, int]:
    """The floor of every node, 0 for those that import nothing of the graph."""
    circle = {node: tuple(group) for group in circles_of(graph) for node in group}
    floors: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in floors:
            together = set(circle.get(node, (node,)))
            below = {other for one in together for other in graph[one]} - together
            level = 1 + max(map(floor, below), default=-1)
            floors.update(dict.fromkeys(together, level))
        return floors[node]

    for node in graph:
        floor(node)
    return floors


def folders_of(graph: Graph) -> Graph:
    """The graph between folders; a module at the top is a folder of its own."""
    names = set(graph)

    def folder(module: str) -> str:
        return module if any(name.startswith(module + ".") for name in names) else module.rpartition(".")[0] or module

    between: Graph = {}
    for module, imported in graph.items():
        between.setdefault(folder(module), set()).update(map(folder, imported))
    return {name: imported - {name} for name, imported in between.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "qtarget_megatron"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="of the package (this one's)")
    parser.add_argument("--arrows", action="store_true", help="name the arrows between folders")
    args = parser.parse_args()
    graph = modules_of(args.folder)
    for title, nodes in (("modules", graph), ("folders", folders_of(graph))):
        floors, circles = floors_of(nodes), circles_of(nodes)
        back = sum(other in group for group in circles for node in group for other in nodes[node])
        print(
            f"{len(nodes)} {title}: {sum(map(len, nodes.values()))} arrows, {max(floors.values()) + 1} floors, "
            f"{len(circles)} circles, {back} arrows within circles"
        )
        for group in circles:
            print("    circle:", ", ".join(group))
    if args.arrows:
        folders = folders_of(graph)
        floors = floors_of(folders)
        for name in sorted(folders, key=lambda name: (floors[name], name)):
            print(f"{floors[name]:3}  {name}: {', '.join(sorted(folders[name]))}")


if __name__ == "__main__":
    main()
