"""Imports go one way, torch and Megatron stay as they are, and the kernels know no framework."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "qtarget_megatron"
REPLACERS = tuple(f"{PACKAGE}/megatron/runtime/{name}.py" for name in ("cpu_platform", "wheel_repairs"))
MEGATRON = f"{PACKAGE}.megatron"

# Part of the package -> the parts of the package it may import, besides itself. A part is a module or a folder; of a
# folder's modules those that are parts of their own are not of the folder's.
ALLOWED = {
    "_source_tree": set(),
    "_version": set(),
    "statistics": set(),
    "collectives": set(),
    "output_lock": set(),
    "resumable": {"output_lock"},
    "cache_folder": set(),
    "command_line": set(),
    "objectives": {"statistics"},
    "kernels.backend": {"statistics"},
    "kernels": {"statistics", "kernels.backend", "_C", "_source_tree"},
    "loss": set(),
    "loss.per_token": {"objectives", "statistics", "kernels.backend", "loss.samples"},
    "loss.sparse_teacher": {"statistics", "kernels", "kernels.backend", "loss.per_token"},
    "loss.second_model": {
        "objectives", "statistics", "kernels", "kernels.backend", "loss.per_token", "loss.sparse_teacher",
    },
    "loss.samples": {"collectives"},
    "loss.cross_entropy": {
        "objectives", "statistics", "kernels", "kernels.backend", "collectives", "loss.per_token",
        "loss.samples", "loss.sparse_teacher", "loss.second_model",
    },
    "loss.linear_cross_entropy": {
        "objectives", "statistics", "kernels", "kernels.backend", "collectives", "loss.per_token",
        "loss.samples", "loss.sparse_teacher", "loss.second_model",
    },
    "loss.linear_top_k": {"statistics", "kernels", "collectives", "loss.per_token"},
    "loss.memory": {"loss.linear_cross_entropy"},
    "inspection": {"objectives", "statistics", "loss.cross_entropy", "loss.samples"},
    "data": {"cache_folder", "resumable", "statistics"},
    "teacher_cache": {"data", "output_lock"},
    "teacher_sources": {"data", "teacher_cache"},
    "huggingface": {"huggingface.config", "huggingface.weights", "huggingface.compare", "huggingface.adapters"},
    "huggingface.config": set(),
    "huggingface.weights": {"huggingface.config", "resumable"},
    "huggingface.adapters": {"huggingface.config", "huggingface.weights"},
    "huggingface.compare": {"huggingface.config", "huggingface.weights"},
    "parallel_layout": {"huggingface"},
    "__init__": {
        "objectives", "statistics", "loss.cross_entropy", "loss.linear_cross_entropy", "loss.samples",
        "loss.sparse_teacher", "inspection", "_source_tree", "_version",
    },
    # The wings of the plug-in, each above those that it imports.
    "megatron": {
        "collectives", "data", "objectives", "statistics", "loss.cross_entropy", "loss.linear_cross_entropy",
        "loss.samples", "loss.sparse_teacher", "megatron.model",
    },
    "megatron.runtime": {
        "command_line", "data", "huggingface", "huggingface.adapters", "objectives", "parallel_layout"
    },
    "megatron.faults": {
        "_version", "command_line", "data", "huggingface", "output_lock", "resumable", "megatron.runtime",
    },
    "megatron.weights": {"huggingface", "huggingface.adapters", "resumable", "megatron.runtime", "megatron.faults"},
    "megatron.model": {"huggingface", "megatron.runtime", "megatron.weights"},
    "megatron.training": {
        "cache_folder", "data", "huggingface", "huggingface.adapters", "kernels", "objectives", "output_lock",
        "resumable", "statistics", "teacher_cache", "loss.linear_cross_entropy", "loss.samples", "loss.sparse_teacher",
        "megatron", "megatron.runtime", "megatron.faults", "megatron.weights", "megatron.model",
    },
    "megatron.jobs": {
        "collectives", "data", "huggingface", "kernels", "objectives", "output_lock", "resumable", "teacher_cache",
        "teacher_sources",
        "loss.linear_cross_entropy", "loss.linear_top_k",
        "megatron.runtime", "megatron.weights", "megatron.model", "megatron.training",
    },
    "megatron.planning": {
        "huggingface", "objectives", "parallel_layout", "teacher_cache", "loss.linear_cross_entropy", "loss.memory",
        "megatron.runtime", "megatron.model", "megatron.training",
    },
    "megatron.verify": {
        "_version", "collectives", "command_line", "data", "huggingface", "huggingface.config", "huggingface.adapters",
        "kernels", "objectives", "output_lock", "statistics", "loss.cross_entropy", "loss.linear_cross_entropy",
        "loss.samples", "loss.sparse_teacher",
        "megatron.runtime", "megatron.faults", "megatron.weights", "megatron.training",
    },
    "commands": {
        "_version", "command_line", "data", "finetune", "huggingface", "inspection", "objectives", "teacher_cache",
        "teacher_sources",
        "megatron.runtime", "megatron.faults", "megatron.jobs", "megatron.planning", "megatron.verify",
    },
    "commands.main": {"_version", "commands.completion"},
    "commands.completion": {"commands", "finetune"},
    **dict.fromkeys(
        (
            "__main__", "import", "export", "check", "score", "generate", "cache_teacher", "import_teacher", "plan",
            "verify", "inspect",
        ),
        {"commands.main"},
    ),
    "finetune": {
        "_version", "command_line", "data", "huggingface", "huggingface.adapters", "objectives", "output_lock",
        "resumable", "teacher_cache", "loss.second_model", "megatron", "megatron.runtime",
        "megatron.faults", "megatron.weights", "megatron.model", "megatron.training", "megatron.jobs",
        "megatron.verify",
    },
}  # fmt: skip
TORCH_ONLY = {
    "statistics", "collectives", "objectives", "kernels", "loss", "inspection", "__init__", "_source_tree", "_version",
}  # fmt: skip
WITH_COLLECTIVES = {"collectives", "megatron", "finetune"}
# Benchmarks time Megatron's own losses and convert several times in one process; the examples stand for scripts of
# Megatron's users.
EXEMPT = {
    ("tools/benchmarking/peers.py", "megatron"),
    ("tools/benchmarking/convert.py", "megatron"),
    ("tools/benchmarking/lora.py", "megatron"),
    ("examples/plugging_in/core_loop.py", "megatron"),
    ("examples/plugging_in/nemo_rl_loss.py", "megatron"),
    ("examples/plugging_in/pretrain_script.py", "megatron"),
    ("examples/plugging_in/verl_sft.py", "megatron"),
}


# ---- the checker


def violations(root: Path, files: list[Path] | None = None) -> list[str]:
    """Every broken rule in files, or in all under root, as ``path:line: what is wrong``."""
    found = []
    for path in _files(root) if files is None else files:
        name = path.relative_to(root).as_posix()
        problems = _cpp_problems(path) if name.startswith("csrc/") else _problems(root, path, name)
        found += [f"{name}:{line}: {problem}" for line, problem in problems]
    return found


def _files(root: Path) -> list[Path]:
    folders = [root / name for name in (PACKAGE, "tools", "examples")]
    python = [root / "setup.py", *sorted(p for folder in folders for p in folder.rglob("*.py"))]
    return python + sorted(path for path in (root / "csrc").rglob("*") if path.is_file())


def _cpp_problems(path: Path) -> Iterator[tuple[int, str]]:
    for line, text in enumerate(path.read_text().splitlines(), 1):
        if re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/|\b(at|torch|c10)::", text):
            yield line, f"the kernels know no torch: {text.strip()}"


def _problems(root: Path, path: Path, name: str) -> list[tuple[int, str]]:
    tree = ast.parse(path.read_text(), name)
    return [*_import_problems(root, name, tree), *_patches(name, tree)]


def _import_problems(root: Path, name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    part = _part(name)
    wing = part and part.split(".")[0]
    for line, module in _imports(root, name, tree):
        top = module.split(".")[0]
        own = _longest(module.removeprefix(f"{PACKAGE}.")) if module.startswith(f"{PACKAGE}.") else None
        if (name, top) in EXEMPT or (name, module) in EXEMPT:
            continue
        if top == "megatron" and wing != "megatron":
            yield line, f"only {MEGATRON} imports Megatron, not {module}"
        if part is None:
            # setup.py, tools and examples.
            if own is not None and own.startswith("_"):
                yield line, f"{module} is private"
            continue
        if top in ("tests", "tools", "examples"):
            yield line, f"the package does not import {module}"
        if own is not None and own not in ALLOWED[part] | {part}:
            yield line, f"{part} does not import {module}"
        if wing in TORCH_ONLY and top not in {"torch", PACKAGE, *sys.stdlib_module_names}:
            yield line, f"{part} imports torch only, not {module}"
        if module.startswith("torch.distributed") and wing not in WITH_COLLECTIVES:
            yield line, f"{part} has no collectives, so it does not import {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _dotted(node) == "torch.distributed":
            if wing is not None and wing not in WITH_COLLECTIVES:
                yield node.lineno, f"{part} has no collectives, so no torch.distributed"


def _part(name: str) -> str | None:
    folder, _, rest = name.partition("/")
    if folder != PACKAGE:
        return None
    part = _longest(rest.removesuffix(".py").replace("/", "."))
    assert part in ALLOWED, f"{name} is new: say in {Path(__file__).name} what it may import"
    return part


def _longest(module: str) -> str:
    """The part that a module of the package is of, or what it is called where it is of none."""
    names = module.split(".")
    beginnings = [".".join(names[:end]) for end in range(len(names), 0, -1)]
    return next((part for part in beginnings if part in ALLOWED), names[0])


def _imports(root: Path, name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and absolute module of every import, also those inside functions and by name."""
    package = name.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, _module_of(root, module, alias.name)
        elif isinstance(node, ast.Call):
            called = _dotted(node.func) or ""
            if called.split(".")[-1] in ("import_module", "__import__"):
                literal = node.args and isinstance(node.args[0], ast.Constant)
                yield node.lineno, str(node.args[0].value) if literal else "<computed>"


def _module_of(root: Path, module: str, name: str) -> str:
    """``from module import name`` imports a submodule or takes a name out of the module."""
    folder = root / module.replace(".", "/")
    own = module.split(".")[0] == PACKAGE
    if own and not ((folder / name).is_dir() or (folder / f"{name}.py").exists() or name == "_C"):
        return module
    return f"{module}.{name}"


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def _patches(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Assignments into torch or Megatron, by statement, setattr/delattr or mock.patch."""
    if name in REPLACERS:
        return
    foreign = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if _is_foreign(node, alias)
    }
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call):
            called = (_dotted(node.func) or "").split(".")
            if called[-1] in ("setattr", "delattr", "__setattr__") and node.args:
                if _root(node.args[0]) in foreign:
                    yield node.lineno, f"only {' and '.join(REPLACERS)} changes torch or Megatron"
            if "patch" in called:
                yield node.lineno, "mock.patch has no place outside of the tests"
        for target in targets:
            for part in ast.walk(target):
                stored = isinstance(getattr(part, "ctx", None), ast.Store | ast.Del)
                if stored and isinstance(part, ast.Attribute | ast.Subscript):
                    if _root(part) in foreign:
                        yield node.lineno, f"only {' and '.join(REPLACERS)} changes torch or Megatron"


def _is_foreign(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> bool:
    module = alias.name if isinstance(node, ast.Import) else node.module or ""
    level = 0 if isinstance(node, ast.Import) else node.level
    return level == 0 and module.split(".")[0] in ("torch", "megatron")


def _root(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


# ---- the tests


def test_the_rules_hold():
    assert violations(REPOSITORY) == []


def test_the_rules_have_no_circle():
    """Every part stands above those that it may import."""
    lowest, above = set(), dict(ALLOWED)
    while above:
        free = {part for part, needs in above.items() if needs - {"_C"} <= lowest}
        assert free, f"one of these imports another in a circle: {sorted(above)}"
        lowest |= free
        above = {part: needs for part, needs in above.items() if part not in free}


def test_the_package_is_imported_without_megatron():
    """What the parsed imports promise, once for real."""
    program = (
        f"import sys, {PACKAGE}, {PACKAGE}.data, {PACKAGE}.huggingface\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'megatron'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=800)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("copy").resolve()
    shutil.copy(REPOSITORY / "setup.py", root)
    for folder in (PACKAGE, "tools", "examples", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.so.new")
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=ignore)
    return root


INSIDE = "def f():\n    "


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("statistics.py", f"from {PACKAGE} import objectives", "statistics does not import"),
        ("statistics.py", "import numpy", "statistics imports torch only"),
        ("objectives/published.py", f"from {PACKAGE}.loss import x", "objectives does not import"),
        ("objectives/published.py", "from ..kernels import select", "objectives does not import"),
        ("objectives/published.py", "import torch.distributed as dist", "objectives has no collectives"),
        ("objectives/published.py", INSIDE + "torch.distributed.barrier()", "objectives has no collectives"),
        ("kernels/reference.py", f"import {PACKAGE}.objectives", "kernels does not import"),
        ("kernels/reference.py", "from .. import loss", "kernels does not import"),
        ("kernels/__init__.py", "from torch import distributed", "kernels has no collectives"),
        ("loss/cross_entropy.py", f"from {PACKAGE} import _C", "loss.cross_entropy does not import"),
        ("loss/cross_entropy.py", f"from {PACKAGE} import data", "loss.cross_entropy does not import"),
        ("loss/cross_entropy.py", "import torch.distributed", "loss.cross_entropy has no collectives"),
        ("loss/cross_entropy.py", f"import {MEGATRON}.training.step", "loss.cross_entropy does not import"),
        ("loss/cross_entropy.py", INSIDE + "import megatron.core", "imports Megatron, not megatron.core"),
        ("__init__.py", f"from {PACKAGE} import data", "__init__ does not import"),
        ("data/dataset.py", "from megatron.core import parallel_state", "imports Megatron"),
        ("data/dataset.py", f"from {MEGATRON}.runtime import launch", "data does not import"),
        ("data/dataset.py", "import torch.distributed", "data has no collectives"),
        ("huggingface/weights/parameter_map.py", INSIDE + "import megatron", "imports Megatron"),
        ("huggingface/weights/parameter_map.py", f"from {PACKAGE} import data", "huggingface.weights does not import"),
        (
            "huggingface/weights/parameter_map.py",
            "import importlib\nimportlib.import_module('megatron')",
            "Megatron",
        ),
        ("finetune.py", "from megatron.training import pretrain", "imports Megatron"),
        ("finetune.py", f"from {PACKAGE} import commands", "finetune does not import"),
        ("megatron/jobs/convert.py", f"from {PACKAGE}.commands import convert_hf", "megatron.jobs does not import"),
        # Between the wings of the plug-in no arrow runs back.
        ("megatron/runtime/launch.py", f"from {MEGATRON}.faults import ending", "megatron.runtime does not import"),
        (
            "megatron/faults/limits.py",
            INSIDE + f"import {MEGATRON}.weights.bit_sums",
            "megatron.faults does not import",
        ),
        ("megatron/weights/saved_model.py", f"from {MEGATRON} import model", "megatron.weights does not import"),
        ("megatron/model/build.py", f"from {MEGATRON}.training import step", "megatron.model does not import"),
        ("megatron/training/step.py", f"from {MEGATRON}.jobs import score", "megatron.training does not import"),
        ("megatron/jobs/score.py", f"from {MEGATRON}.planning import plan", "megatron.jobs does not import"),
        ("megatron/planning/plan.py", f"from {MEGATRON}.jobs import score", "megatron.planning does not import"),
        ("megatron/verify/layout.py", f"from {MEGATRON}.model import build", "megatron.verify does not import"),
        ("huggingface/config/rope.py", f"import {PACKAGE}.huggingface.weights", "huggingface.config does not import"),
        ("commands/plan.py", f"from {PACKAGE} import kernels", "commands does not import"),
        ("commands/plan.py", INSIDE + "import megatron.core", "imports Megatron"),
        ("finetune.py", f"from {PACKAGE} import kernels", "finetune does not import"),
        ("megatron/training/step.py", "from examples.demo import run", "does not import examples.demo.run"),
        ("../tools/extra.py", "import megatron", "imports Megatron"),
        ("../tools/extra.py", f"from {PACKAGE} import _C", "_C is private"),
        ("../examples/demo/run.py", "import megatron.core", "imports Megatron"),
        ("megatron/training/step.py", "torch.cuda.synchronize = None", "only .* changes torch"),
        ("megatron/training/step.py", INSIDE + "torch.backends.x.y += 1", "only .* changes torch"),
        ("megatron/training/step.py", "parallel_state._GROUP, other = 1, 2", "only .* changes torch"),
        ("megatron/training/step.py", "del parallel_state.get_rank", "only .* changes torch"),
        ("megatron/training/step.py", "setattr(torch, 'x', 1)", "only .* changes torch"),
        ("megatron/training/step.py", "torch._dynamo.config['x'] = 1", "only .* changes torch"),
        ("megatron/model/stacked_teacher.py", "GPTModel.forward = None", "only .* changes torch"),
        ("collectives.py", "dist.all_reduce = None", "only .* changes torch"),
        ("../examples/demo/run.py", "import torch as t\nt.load = None", "only .* changes torch"),
        ("data/dataset.py", "from unittest import mock\nmock.patch('torch.load')", "mock.patch"),
        ("../csrc/core.h", "#include <torch/extension.h>", "know no torch"),
        ("../csrc/cuda/rows.cuh", "# include <ATen/cuda/CUDAContext.h>", "know no torch"),
        ("../csrc/binding.cpp", "at::Tensor tensor;", "know no torch"),
    ],
)
def test_a_broken_rule_is_found(copy, file, text, problem):
    path = (copy / PACKAGE / file).resolve()
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\n{text}\n")
    try:
        found = violations(copy, [path])
    finally:
        path.write_text(before) if before is not None else path.unlink()
    # The file itself keeps the rules (tested above), so what is found is the line added here.
    assert any(re.search(problem, one) for one in found), found


def test_an_unknown_part_of_the_package_asks_for_a_rule(copy):
    path = copy / PACKAGE / "misc.py"
    path.write_text("")
    try:
        with pytest.raises(AssertionError, match="misc.py is new"):
            violations(copy, [path])
    finally:
        path.unlink()
