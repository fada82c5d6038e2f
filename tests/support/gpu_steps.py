"""Steps in the place of the GPU's, each called in a process of its own, which imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import time

from tools.first_hour.work import Failed, needs


def passes(work, **arguments):
    print("its log")
    with (work.folder.parent / "order").open("a") as file:
        file.write(f"{work.folder.name}\n")
    return [f"- {json.dumps(arguments)}, {work.gpus} GPU, {work.capability}"]


def fails(work):
    print("its last words")
    raise Failed("it is wrong\nand this is how")


def is_not_run(work):
    needs("no_such_module_anywhere", "No such package", "pip install it")


def hangs(work):
    child = subprocess.Popen(["sleep", "602"], start_new_session=True)
    (work.folder.parent / "child").write_text(str(child.pid))
    time.sleep(602)


def dies(work):
    os._exit(3)
