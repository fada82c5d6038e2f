"""``qtarget verify`` by the path of a checkout, from any folder."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("qtarget_megatron.commands.verify_parallel", run_name="__main__", alter_sys=True)
