"""The families of Hugging Face decoders, one file each; a new family is a new file in this folder.

Every file declares one ``FAMILY``; nothing else knows a family by its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache

from qtarget_megatron.huggingface.config.config_file import shown
from qtarget_megatron.huggingface.config.family import Family


@lru_cache(maxsize=1)
def all_families() -> tuple[Family, ...]:
    """Every declared family, refused ones too, in the order of their files' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)
    for key in ("name", "architecture"):
        values = [getattr(family, key) for family in found]
        if repeated := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"expected each {key} in one file of {__name__}, got {repeated} in several")
    return found


def by_name(name: str) -> Family:
    """The family of this name. ValueError where there is none."""
    for family in all_families():
        if family.name == name:
            return family
    raise ValueError(f"expected a family of {[family.name for family in all_families()]}, got {name!r}")


def by_architecture(architectures: object) -> Family:
    """The family that config.json's ``architectures`` names.

    ValueError where it is not a list of one known architecture, or where that one is not supported.
    """
    for family in all_families():
        if architectures == [family.architecture]:
            if family.refused is not None:
                raise ValueError(f"expected a family that is supported, got {family.name}: {family.refused}")
            return family
    known = ", ".join(family.architecture for family in all_families() if family.refused is None)
    raise ValueError(
        f"expected architectures to hold one of {known}, got {shown(architectures)}; others cannot be converted"
    )
