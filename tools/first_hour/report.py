"""benchmarks/GPU.md, from the results that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tools.benchmarking.report import table
from tools.first_hour.steps import Step

DIRTY = ", with uncommitted changes"
_NOT_YET = {"verdict": "not run", "reason": "not reached yet", "figures": []}


def markdown(steps: Sequence[Step], results: Mapping[str, dict[str, Any]], about: Mapping[str, str]) -> str:
    """The report; about: machine, versions, commit and date of this run. A result of another commit or machine says
    so."""
    found = {step.name: results.get(step.name, _NOT_YET) for step in steps}
    counts = Counter(result["verdict"] for result in found.values())
    lines = ["# The first hour on a GPU", "", _INTRODUCTION, "", *table(["machine and versions", ""], about.items())]
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("passed", "failed", "not run"))
    lines += ["", f"{len(found)} steps: {verdicts}.", ""]
    cells = [
        [f"`{name}`", result["verdict"], _seconds(result), _cell(_note(result, about))]
        for name, result in found.items()
    ]
    lines += table(["step", "verdict", "s", ""], cells)
    for step in steps:
        result = found[step.name]
        if result["figures"]:
            lines += ["", f"## {step.name}", "", f"{step.title[0].upper()}{step.title[1:]}.", ""]
            lines += result["figures"]
    return "\n".join(lines) + "\n"


def first_line(text: str) -> str:
    return text.strip().split("\n")[0]


def _note(result: dict[str, Any], about: Mapping[str, str]) -> str:
    notes = [first_line(result["reason"])] if result["reason"] else []
    commit = f"{result.get('commit', '')}{DIRTY if result.get('dirty') else ''}"
    if commit and commit != about["commit"]:
        notes.append(f"at commit {commit}")
    if result.get("on") and result["on"] != about["GPU"]:
        notes.append(f"on {result['on']}")
    if result.get("date") and result["date"][:10] != about["date"][:10]:
        notes.append(f"on {result['date'][:10]}")
    return "; ".join(notes)


def _seconds(result: dict[str, Any]) -> str:
    return f"{result['seconds']:.0f}" if "seconds" in result else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_INTRODUCTION = """\
Written by `make gpu` (`tools/gpu.py`; `--help` says what it does, `--list` names the steps). *Not run* is no verdict on
the code: the reason says what the machine lacks."""
