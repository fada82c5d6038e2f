"""A fine-tuning in which torch warns of each wait of the host for the GPU: ``python -m`` this, finetune's flags.

The warnings stand in the log between Megatron's lines of steps, so that those of a step can be counted.
"""

from __future__ import annotations

import re
import runpy
import warnings
from collections import Counter

_WAIT = re.compile(r"^(\S+):(\d+): UserWarning: called a synchronizing CUDA operation", re.MULTILINE)
_STEP = re.compile(r"^.*\biteration +\d+/ *\d+ \|.*$", re.MULTILINE)


def waits(text: str) -> Counter[str] | None:
    """How often each line of code has waited in the last whole step of a log; None where there are not two steps."""
    steps = list(_STEP.finditer(text))
    if len(steps) < 2:
        return None
    between = text[steps[-2].end() : steps[-1].start()]
    return Counter(f"{_short(path)}:{line}" for path, line in _WAIT.findall(between))


def _short(path: str) -> str:
    """From the package on, be it installed or in a checkout; else the last three parts."""
    if "/site-packages/" in path:
        return path.rpartition("/site-packages/")[2]
    of_checkout = path.rpartition("/qtarget_megatron/")
    return f"qtarget_megatron/{of_checkout[2]}" if of_checkout[1] else "/".join(path.split("/")[-3:])


def main() -> None:
    import torch

    # Each of them, not the first one of a line.
    warnings.filterwarnings("always", message="called a synchronizing CUDA operation")
    torch.cuda.set_sync_debug_mode("warn")
    runpy.run_module("qtarget_megatron.finetune", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
