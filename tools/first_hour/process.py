"""A step in a process of its own: what it prints is its log, what it found is in result.json."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from tools.first_hour.work import NotRun, Work


def main(argv: list[str]) -> int:
    """argv: the step as JSON, as driver.run_step writes it."""
    given = json.loads(argv[0])
    folder = Path(given["folder"])
    work = Work(folder, Path(given["log"]), given["limit"], given["gpus"], tuple(given["capability"]))
    module, _, name = given["function"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        found = outcome("passed", figures=function(work, **given["arguments"]))
    except NotRun as error:
        found = outcome("not run", str(error))
    except Exception as error:
        traceback.print_exc()
        found = outcome("failed", str(error) or type(error).__name__)
    (folder / "result.json").write_text(json.dumps(found))
    return 0


def outcome(verdict: str, reason: str = "", figures: list[str] | None = None) -> dict[str, Any]:
    """verdict: passed, failed or not run. figures: lines of Markdown."""
    return {"verdict": verdict, "reason": reason, "figures": figures or []}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
