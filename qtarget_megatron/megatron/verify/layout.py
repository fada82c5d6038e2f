"""Does every objective compute at a layout, over Megatron's own process groups, what one process computes?"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qtarget_megatron import kernels
from qtarget_megatron._version import versions
from qtarget_megatron.megatron.faults.same_start import difference
from qtarget_megatron.megatron.runtime import launch
from qtarget_megatron.megatron.verify.problem import (
    KEPT,
    LOSS_BOUND,
    MAX_HIDDEN,
    Errors,
    Problem,
    Setting,
    gradient_bound,
    measure,
)
from qtarget_megatron.objectives import Objective


@dataclass(frozen=True)
class VerifyOptions:
    """A layout, and the size of the problem that is drawn. timeout: seconds that a rank waits for the others."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    vocab_size: int = 151_936
    hidden: int = 64
    tokens: int = 64
    seed: int = 1
    backend: str = "auto"
    timeout: float = 120.0

    def check(self, world_size: int) -> None:
        """ValueError for a layout that does not fit the number of ranks, or a problem that cannot be drawn."""
        sizes = {
            "--tensor-model-parallel-size": self.tensor,
            "--pipeline-model-parallel-size": self.pipeline,
            "--context-parallel-size": self.context,
        }
        for flag, value in sizes.items():
            if value < 1:
                raise ValueError(f"{flag} must be 1 or more, got {value}")
        model = self.tensor * self.pipeline * self.context
        if world_size % model:
            raise ValueError(
                f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context} takes a multiple of {model} "
                f"ranks, got {world_size}: start as many ranks as training will have, under a launcher such as torchrun"
            )
        if self.tokens < 8:
            raise ValueError(f"--tokens must be 8 or more, got {self.tokens}")
        if self.sequence_parallel and self.tokens % self.tensor:
            raise ValueError(
                f"--sequence-parallel cuts the tokens into {self.tensor} equal parts: give --tokens a multiple of "
                f"{self.tensor}, got {self.tokens}"
            )
        if self.vocab_size < 2 * KEPT:
            raise ValueError(f"--vocab-size must be {2 * KEPT} or more, got {self.vocab_size}")
        if not 16 <= self.hidden <= MAX_HIDDEN:
            raise ValueError(
                f"--hidden must be 16 to {MAX_HIDDEN}, where all logits are exact in 16 bits, got {self.hidden}"
            )
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}")
        if not self.timeout > 0:
            raise ValueError(f"--timeout must be above 0 seconds, got {self.timeout:g}")


@dataclass(frozen=True)
class Row:
    """One kind of loss of one objective: each worst error over all ranks with the rank that has it, and its bound.

    gradient_of: the gradient with the worst error. problem: what else is wrong, or nothing.
    """

    objective: str
    kind: str
    loss: float
    loss_rank: int
    gradient: float
    gradient_rank: int
    gradient_of: str
    loss_bound: float
    gradient_bound: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.loss <= self.loss_bound and self.gradient <= self.gradient_bound and not self.problem


@dataclass(frozen=True)
class Verdict:
    """The same on every rank that is still reached. failure: what ended the run early, or nothing; verified: in words,
    what was computed."""

    rows: tuple[Row, ...]
    verified: str
    failure: str = ""

    @property
    def ok(self) -> bool:
        return not self.failure and all(row.ok for row in self.rows)


def verify(options: VerifyOptions, objectives: Sequence[Objective], on_row: Callable[[Row], None]) -> Verdict:
    """Compare every objective at the layout with a dense float64 computation; call it on every rank of the launch.

    Joins the ranks where torch.distributed has not been initialised (NCCL with CUDA, else gloo) and makes Megatron's
    process groups for the layout. on_row: called on every rank as rows are known.

    An exception on a rank is printed there and ends the run on all ranks: it is in Verdict.failure with the rank. A
    rank that hangs or dies ends it after options.timeout to three times that.

    Collectives: those of the losses, over Megatron's tensor-parallel and data-parallel (with context-parallel) groups;
    outcomes travel as objects over a gloo group of all ranks. Raises ValueError for bad input, before anything is
    computed.
    """
    options.check(int(os.environ.get("WORLD_SIZE", "1")))
    launch.check_version()
    launch.tell_version()
    launch.check_launcher()
    device = _device()
    backend = _backend_name(options, device)
    _join(device, options.timeout)
    control = _Control(options.timeout)
    rows: list[Row] = []
    failure = ""
    try:
        mine = {"versions": versions(), "options": f"{options} {backend}", "objectives": " ".join(map(str, objectives))}
        if (found := difference(control.gather("the start", mine))) is not None:
            raise _Ended(found)
        for row in _rows(options, objectives, device, control):
            rows.append(row)
            on_row(row)
    except _Ended as ended:
        failure = str(ended)
    return Verdict(tuple(rows), _in_words(options, backend, device), failure)


def _rows(options: VerifyOptions, objectives: Sequence[Objective], device: torch.device, control: _Control):
    setting = control.everywhere("making the process groups", lambda: _open(options))
    problem = control.everywhere(
        "drawing the problem",
        lambda: Problem.draw(
            vocab_size=options.vocab_size,
            hidden=options.hidden,
            tokens=options.tokens,
            seed=options.seed,
            dtype=options.dtype,
            device=device,
            ranks=options.tensor,
        ),
    )
    team = dist.get_process_group_ranks(setting.tensor_group)
    for objective in objectives:
        for sparse in (False, True) if objective.needs_teacher else (False,):
            name = f"{objective}{', sparse teacher' if sparse else ''}"
            found = control.everywhere(name, lambda o=objective, s=sparse: measure(problem, o, setting, sparse=s))
            outcomes = control.gather(name, (team, found))
            for kind in found:
                yield _row(options, objective, kind, [(ranks, errors[kind]) for ranks, errors in outcomes])


def _open(options: VerifyOptions) -> Setting:
    """Megatron's process groups for the layout."""
    # Seconds of imports.
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        options.tensor,
        options.pipeline,
        context_parallel_size=options.context,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=options.timeout / 60,
    )
    return Setting(
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        sequence_parallel=options.sequence_parallel,
        backend=options.backend,
    )


def _row(options: VerifyOptions, objective: Objective, kind: str, outcomes: list[tuple[list[int], Errors]]) -> Row:
    errors = [found for _, found in outcomes]
    loss_rank = max(range(len(errors)), key=lambda rank: errors[rank].loss)
    gradient_rank = max(range(len(errors)), key=lambda rank: errors[rank].gradient)
    return Row(
        objective=str(objective),
        kind=kind,
        loss=errors[loss_rank].loss,
        loss_rank=loss_rank,
        gradient=errors[gradient_rank].gradient,
        gradient_rank=gradient_rank,
        gradient_of=errors[gradient_rank].of,
        loss_bound=LOSS_BOUND,
        gradient_bound=gradient_bound(options.dtype, options.tensor),
        problem=_different_bits(outcomes),
    )


def _different_bits(outcomes: list[tuple[list[int], Errors]]) -> str:
    """What is wrong where the loss is not bitwise the same on every rank."""
    for rank, (team, errors) in enumerate(outcomes):
        first = team[0]
        if errors.loss_bits != outcomes[first][1].loss_bits:
            return f"the loss of ranks {first} and {rank} of one tensor-parallel group differs in its bits"
    for rank, (_, errors) in enumerate(outcomes):
        if errors.loss_bits != outcomes[0][1].loss_bits:
            return f"the loss of ranks 0 and {rank}, replicas of each other, differs in its bits"
    return ""


class _Ended(Exception):
    """The run cannot go on; raised on all ranks that are reached."""


class _Control:
    """Outcomes of all ranks, over a gloo group of their own: it works while the others' collectives are out of step."""

    def __init__(self, timeout: float):
        # A rank that failed waits here until the others' collectives have given up.
        self._timeout = timedelta(seconds=2 * timeout)
        self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def gather(self, step: str, value):
        """The value of every rank, in rank order."""
        values = [None] * dist.get_world_size()
        try:
            # Names the ranks that do not arrive.
            dist.monitored_barrier(self._group, timeout=self._timeout, wait_all_ranks=True)
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise _Ended(f"{step}: not all ranks answered: {_first_line(error)}") from error
        return values

    def everywhere(self, step: str, function: Callable):
        """What function() returns, once it has returned on every rank; _Ended on all where it fails on any."""
        result, failure = None, None
        try:
            result = function()
        except Exception as error:
            print(f"rank {dist.get_rank()}: {step}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            failure = f"{type(error).__name__}: {_first_line(error)}"
        failures = [f"rank {rank}: {found}" for rank, found in enumerate(self.gather(step, failure)) if found]
        if failures:
            raise _Ended(f"{step}: {'; '.join(failures)}")
        return result


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", int(os.environ.get("RANK", "0")) % torch.cuda.device_count()))
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _backend_name(options: VerifyOptions, device: torch.device) -> str:
    """The backend that serves; ValueError where the one that was asked for cannot."""
    return kernels.name(kernels.choose(options.backend, device.type, options.dtype), device.type)


def _join(device: torch.device, timeout: float) -> None:
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    lone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    alone: dict[str, Any] = dict(store=dist.HashStore(), rank=0, world_size=1) if lone else {}
    dist.init_process_group(
        backend,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
        **alone,
    )


def _in_words(options: VerifyOptions, backend: str, device: torch.device) -> str:
    world = dist.get_world_size()
    replicas = world // (options.tensor * options.pipeline * options.context)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (
        f"TP {options.tensor}{' with sequence parallel' if options.sequence_parallel else ''}, PP {options.pipeline}, "
        f"CP {options.context}, DP {replicas} on {world} rank(s) over {dist.get_backend()}; backend {backend}, "
        f"{str(options.dtype).removeprefix('torch.')} on {hardware}; vocabulary {options.vocab_size}, {options.tokens} "
        f"tokens, seed {options.seed}; {versions()}"
    )
