"""setup.py's functions, without what running it would build."""

import runpy
from types import SimpleNamespace
from unittest.mock import patch

from launching import REPOSITORY


def load() -> SimpleNamespace:
    with patch("setuptools.setup"):
        return SimpleNamespace(**runpy.run_path(str(REPOSITORY / "setup.py")))
