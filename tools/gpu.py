"""The first hour on a GPU in one command, `make gpu`; the steps are in tools/first_hour/."""

import sys
from pathlib import Path

# Run by its path, a script finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.first_hour.driver import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
