"""setup.py's functions, without what running it would build."""

import os
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from launching import REPOSITORY


def load() -> SimpleNamespace:
    with patch("setuptools.setup"):
        return SimpleNamespace(**runpy.run_path(str(REPOSITORY / "setup.py")))


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, timeout=800, env=env)
