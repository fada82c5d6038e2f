"""The version, for Python and for the build, and those of what the package stands on."""

import importlib.metadata

__version__ = "0.1.0"


def versions() -> str:
    """The packages that must be the same on all ranks, with their versions, in one line."""
    import torch

    try:
        megatron = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        megatron = "not installed"
    return f"qtarget_megatron {__version__}, torch {torch.__version__}, megatron-core {megatron}"
