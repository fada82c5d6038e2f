"""Which folder of a Megatron checkpoint is asked for, and the arguments that it was saved with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qtarget_megatron.megatron.runtime import launch


def saved_argument(folder: Path, name: str) -> Any:
    """An argument that was saved with the distributed checkpoint in the folder of an iteration; None where there is
    none. No collective, so that one rank may ask alone. The CPU platform must have been activated."""
    return getattr(saved_arguments(folder), name, None)


def saved_arguments(folder: Path) -> argparse.Namespace:
    """All of them, as saved_argument() has one; empty where there are none."""
    from megatron.core import dist_checkpointing

    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        return argparse.Namespace()
    return dist_checkpointing.load_common_state_dict(str(folder)).get("args") or argparse.Namespace()


def checkpoint_directory(load: str | Path, step: int | None = None, *, flag: str = "--load") -> str:
    """Where the iteration lies that load and step ask for; step: default the newest.

    ValueError where that is no distributed checkpoint. The CPU platform must have been activated.
    """
    from megatron.core import dist_checkpointing
    from megatron.training.checkpointing import get_load_checkpoint_path_by_args

    where = argparse.Namespace(load=str(load), ckpt_step=step)
    directory = get_load_checkpoint_path_by_args(where) if launch.has_checkpoint(where.load) else None
    if directory is None or not dist_checkpointing.check_is_distributed_checkpoint(directory):
        raise ValueError(
            f"{flag} {load}: expected a Megatron checkpoint in torch_dist format "
            "(latest_checkpointed_iteration.txt and the folder it names), found none: check the path"
        )
    return directory
