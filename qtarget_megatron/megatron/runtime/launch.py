"""The one place that knows Megatron's entry points, whose signatures change between releases.

Written for megatron-core 0.19: arguments are parsed and validated before pretrain(), which takes a config container.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import Store

from qtarget_megatron.command_line import refuse
from qtarget_megatron.megatron.runtime import cpu_platform, logs, wheel_repairs

SUPPORTED = "megatron-core >= 0.19.2, < 0.21"


def check_version() -> None:
    """ValueError unless the installed megatron-core is one this module was written for."""
    version = importlib.metadata.version("megatron-core")
    numbers = [int(number) for number in re.findall(r"[0-9]+", version)[:3]]
    if not [0, 19, 2] <= numbers < [0, 21]:
        raise ValueError(f"this version of qtarget_megatron needs {SUPPORTED}, found {version}: install that")


def tell_version() -> None:
    """A line for a megatron-core that the tests do not run with."""
    version = importlib.metadata.version("megatron-core")
    if not version.startswith("0.19."):
        logs.of(logs.NAME).warning(
            "megatron-core %s: releases of 0.19 are tested; compare your layout with one rank first: qtarget verify "
            "--train",
            version,
        )


def check_launcher(*, meets: bool = True) -> None:
    """ValueError unless the environment is that of a lone process, or one that a launcher such as torchrun has made.

    meets: the ranks will meet at an address.
    """
    numbers = {}
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(least))
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise ValueError(f"{name} must be a number from {least} on, got {text!r}: start with torchrun, or unset it")
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= size:
        raise ValueError(f"RANK is {rank}, WORLD_SIZE {size}: start with torchrun, or unset RANK for a single process")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing and meets:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {missing[0]} is not set: start with torchrun, or unset WORLD_SIZE for a single "
            "process"
        )
    if "WORLD_SIZE" not in os.environ:
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            # Each of them would train alone, and write over the others.
            if (tasks := os.environ.get(name, "1")) not in ("", "0", "1"):
                raise ValueError(
                    f"{name} says that {tasks} processes were started, but WORLD_SIZE is not set: each would be on its "
                    "own. Start torchrun on each node, or set WORLD_SIZE=1 where only one was started"
                )


def parse_arguments(argv: list[str], add_arguments: Callable) -> argparse.Namespace:
    """Megatron's arguments and ours, not yet validated. ValueError for an unknown flag or a value that is none of its
    kind."""
    from megatron.training.arguments import parse_args

    def extended(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_arguments(parser)
        # argparse calls it through the instance.
        parser.error = lambda message: refuse(message, parser._option_string_actions)  # type: ignore[method-assign]
        return parser

    saved = sys.argv
    sys.argv = [saved[0], *argv]
    try:
        return parse_args(extended)
    finally:
        sys.argv = saved


def print_flags() -> None:
    """Print Megatron's command-line flags with their help."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(usage="Megatron's flags:", add_help=False))
    for action in parser._actions:
        # Some of Megatron's texts hold a bare %, at which argparse's own formatting gives up.
        action.help = action.help and action.help.replace("%", "%%")
    parser.print_help()


def validate(args: argparse.Namespace) -> None:
    """Megatron's validation, which completes args. Raises AssertionError or ValueError, as Megatron does."""
    from megatron.training.arguments import validate_args

    # Megatron insists on it for tensor parallelism on GPUs before Blackwell.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    validate_args(args)


def refusal(error: AssertionError | ValueError) -> str:
    """One line about flags that Megatron's code does not accept."""
    reason = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
    return f"Megatron refuses these flags: {reason}"


def initialize(args: argparse.Namespace) -> None:
    """Megatron's validation of args, and its global state. ValueError for flags that Megatron refuses."""
    from megatron.training.global_vars import set_global_variables

    try:
        with logs.without_arguments(shown=_shows_arguments(args)):
            validate(args)
    except AssertionError as error:
        raise ValueError(refusal(error)) from error
    set_global_variables(args)
    if not cpu_platform.is_active():
        logs.name_what_is_missing()
    if args.exit_signal_handler:
        # Before the first step there is nothing to save, and a rank would wait for others that are gone.
        _exit_handlers[args.exit_signal] = signal.signal(args.exit_signal, signal.SIG_DFL)


def initialize_distributed(store: Store | None) -> None:
    """The process group of all ranks, as pretrain() would make it, which then finds it there.

    store: that the ranks meet at. Megatron's global state must be there; nothing is done where the group is.
    """
    from megatron.training.initialize import _initialize_distributed

    if not dist.is_initialized():
        _initialize_distributed(None, None, store, skip_model_parallel_init=True)


def _shows_arguments(args: argparse.Namespace) -> bool:
    level = logging.INFO if args.logging_level is None else args.logging_level
    return getattr(args, "log_arguments", False) or level <= logging.DEBUG


# Megatron's handler of --exit-signal, while it is not on yet.
_exit_handlers: dict[int, Any] = {}


def _handling_exit_signal(args: argparse.Namespace, forward_step: Callable) -> Callable:
    """Megatron's handler is on from the first forward step of a training on."""

    def handling(*arguments, **keywords):
        while _exit_handlers and not args.skip_train:
            signal.signal(*_exit_handlers.popitem())
        return forward_step(*arguments, **keywords)

    return handling


def prepare_saves(*, in_background: bool = False) -> None:
    """Give Megatron the queue through which the outcome of a write comes to the save. Call it before the first save.

    in_background (--async-save): another process writes, so the queue is one between processes. It lies in a process of
    its own, which is deaf to SIGTERM and ends with this one. (torchrun sends SIGTERM to the process group of each rank:
    the save that --exit-signal-handler makes then needs the queue.) Otherwise one process writes and reads. Megatron
    would start a process for that as well: one more on each rank that has imported torch, and outlives a killed rank.
    """
    if not in_background:
        wheel_repairs.set_write_results_queue(queue.Queue())
        return
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        manager.start(end_with_parent)
        wheel_repairs.set_write_results_queue(manager.Queue())
    finally:
        signal.signal(signal.SIGTERM, previous)


def end_with_parent(parent: int | None = None) -> None:
    """For a process that a rank has started: it would outlive a rank that is killed, with all that it imported.

    parent: the rank's number; None: of a process that multiprocessing has started.
    """
    if parent is None:
        known = multiprocessing.parent_process()  # not yet, while the main module is imported
        parent = os.getppid() if known is None else known.pid

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def leave_at_once(code: int) -> NoReturn:
    """End this process, and those it has started. The ordinary way may wait for ranks that are gone, and for data
    workers, which do not heed SIGTERM under --exit-signal-handler."""
    with contextlib.suppress(OSError):
        flush_writer()
    kill_children()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def flush_writer() -> None:
    """Have what Megatron has logged written, where it logs to files."""
    if "megatron.training.global_vars" in sys.modules:
        from megatron.training.global_vars import get_tensorboard_writer

        if writer := get_tensorboard_writer():
            writer.flush()


def kill_children() -> None:
    """End the processes that multiprocessing has started here: data workers, and Megatron's for saves."""
    for child in multiprocessing.active_children():
        child.kill()


def exit_signal_received() -> bool:
    """Whether any rank has received --exit-signal; collective over all ranks."""
    from megatron.training.global_vars import get_signal_handler

    return any(get_signal_handler().signals_received())


def forget() -> None:
    """Return Megatron to where it was before it was initialised, for another training in this process; collective.

    Its arguments, timers, calculators, parallel state and process groups go; the default process group and the CPU
    platform stay. Models that were built keep their (now closed) groups: drop them.
    """
    from megatron.training.training import destroy_global_state

    # A rank that still communicates must not lose its groups.
    dist.barrier()
    destroy_global_state()
    # Megatron only forgets its groups; their sockets and threads would pile up.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def is_bad_input(error: ValueError) -> bool:
    """True for a ValueError that this package raised; one from inside Megatron or torch is a fault."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parents[2])


def has_checkpoint(directory: str | None) -> bool:
    """True where a Megatron checkpoint can be loaded from the directory."""
    from megatron.training.checkpointing import checkpoint_exists

    return directory is not None and checkpoint_exists(directory)


def run_pretrain(
    args: argparse.Namespace,
    *,
    datasets: Callable,
    model_provider: Callable,
    forward_step: Callable,
):
    """Megatron's training loop, with this package's data, model and forward step."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets,
        ModelType.encoder_or_decoder,
        _handling_exit_signal(args, forward_step),
        model_provider=model_provider,
    )
