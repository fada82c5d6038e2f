"""Does a layout train as one rank does? Two steps of a small model at the layout, and the same on one rank in float32,
compared tensor by tensor."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from qtarget_megatron import output_lock
from qtarget_megatron.huggingface import Architecture, hf_tensor_shapes, read_config
from qtarget_megatron.huggingface.adapters.peft_directory import WEIGHTS, planned_tensors
from qtarget_megatron.megatron.faults.explained import Fault
from qtarget_megatron.megatron.runtime import cpu_platform, launch
from qtarget_megatron.megatron.runtime.logs import is_first_rank
from qtarget_megatron.megatron.verify.comparison import (
    CHANGE,
    Bounds,
    Difference,
    OneRankTrainings,
    Reference,
    Training,
    compare_scalars,
    compare_tensors,
    gradient_of,
    read_scalars,
)
from qtarget_megatron.megatron.verify.one_rank import PRECISION, REFERENCE, REORDERED, Job, OneRank
from qtarget_megatron.megatron.verify.shrink import shrunk_config
from qtarget_megatron.megatron.verify.small_model import (
    VOCAB_SIZE,
    reordered,
    write_samples,
    write_small_adapters,
    write_small_model,
)
from qtarget_megatron.megatron.verify.training_words import STEPS, TrainingWords, read_training_words

# finetune.fine_tune, which stands above this module.
FineTune = Callable[[list[str], Any], None]
_BOARD, _ADAPTERS = "--tensorboard-dir", "--lora-from"


@dataclass(frozen=True)
class Verdict:
    """The same on every rank.

    arch:     of the small model.
    tensors:  in the model's order, kind by kind.
    scalars:  of each step.
    is_sound: whether one rank in the precision of the layout is within the bounds of tensors.
    """

    words: TrainingWords
    arch: Architecture
    tensors: tuple[Difference, ...]
    scalars: tuple[Difference, ...]
    is_sound: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is further off than rounding explains."""
        return all(difference.ok for difference in (*self.tensors, *self.scalars))


def verify_training(
    words: Sequence[str],
    fine_tune: FineTune,
    *,
    timeout: float,
    keep: Path | None,
    begin: Callable[[TrainingWords, Architecture, bool], None],
) -> Verdict:
    """Verify a fine-tuning of these words; call it on every rank of the launch.

    timeout: seconds that ranks wait for each other, and for what is computed on one rank.
    keep:    a folder for what one rank computes, which a later verification takes from there; None: a temporary one.
    begin:   called before anything is trained, with whether that is known already.

    Raises ValueError for bad input, Fault where a training fails. What Megatron prints at the layout is shown on stderr
    where it fails there.
    """
    if not timeout > 0:
        raise ValueError(f"--timeout must be above 0 seconds, got {timeout:g}")
    request = read_training_words(words, timeout)
    with _workplace(keep if is_first_rank() else None) as folder:
        problem = _Problem.write(request, folder)
        if not is_first_rank():
            begin(request, problem.arch, False)
            return _compare(problem, problem.train_here(fine_tune), None)
        with OneRank(folder, problem.jobs(), timeout) as alone:
            begin(request, problem.arch, alone.is_known)
            return _compare(problem, problem.train_here(fine_tune), alone)


def run_job(path: str, fine_tune: FineTune) -> None:
    """Be the process of a job: train on one rank."""
    from qtarget_megatron import objectives

    job = Job.read(path)
    launch.end_with_parent(job.parent)
    if job.on_cpu:
        for name in ("transformer_engine", "apex"):
            sys.modules[name] = None  # found to be missing
    if job.objective_file is not None:
        objectives.register_from_file(job.objective_file)
    for name, words in job.runs.items():
        model = Path(words[words.index("--hf-model") + 1])
        initial = load_file(model / "model.safetensors")
        if _ADAPTERS in words:
            initial |= load_file(Path(words[words.index(_ADAPTERS) + 1]) / WEIGHTS)
        _train(words, initial, fine_tune).save(job.result(name), job.keys[name])
        launch.forget()


def _train(words: list[str], initial: Mapping[str, Tensor], fine_tune: FineTune) -> Training:
    """One training in this process group. initial: its first weights."""
    cpu_platform.activate()
    # Imports Megatron, before which the CPU platform must act.
    from qtarget_megatron.megatron.verify.recording import Recording

    recording, board = Recording(), Path(words[words.index(_BOARD) + 1])
    shutil.rmtree(board, ignore_errors=True)
    fine_tune(words, recording)
    tensors = {gradient_of(step): gradients for step, gradients in enumerate(recording.gradients, 1)}
    tensors[CHANGE] = [(name, tensor - initial[name].float()) for name, tensor in recording.weights]
    return Training(read_scalars(board), recording.losses, tensors)


@dataclass(frozen=True)
class _Problem:
    """What is trained. order: of the hidden dimension in the second training on one rank."""

    request: TrainingWords
    folder: Path
    arch: Architecture
    initial: dict[str, Tensor]
    config: dict[str, Any]
    order: Tensor

    @classmethod
    def write(cls, request: TrainingWords, folder: Path) -> _Problem:
        """Write model, second model and data into a folder."""
        args, sizes = request.run.args, request.sizes

        def small(directory: Path) -> dict[str, Any]:
            raw = read_config(directory)
            return shrunk_config(raw, request.cuts, vocab_size=VOCAB_SIZE, positions=sizes.row_length)

        config = small(request.run.hf_model)
        initial = write_small_model(folder / "model", config, args.seed)
        arch, lora = Architecture.from_config(config), request.run.lora
        if lora is not None:
            initial |= write_small_adapters(folder / "model" / "adapters", arch, lora, args.seed + 3)
        if args.teacher_hf is not None:
            write_small_model(folder / "teacher", small(args.teacher_hf), args.seed + 1)
        write_samples(
            folder / "data.jsonl",
            4 * STEPS * sizes.batch,
            row_length=sizes.row_length,
            unit=sizes.unit,
            inputs=request.run.objective.token_inputs,
            seed=args.seed,
        )
        generator = torch.Generator().manual_seed(args.seed + 2)
        order = torch.randperm(config["hidden_size"], generator=generator)
        return cls(request, folder, arch, initial, config, order)

    def jobs(self) -> list[Job]:
        """What is trained on one rank: the reference, the same reordered, the same in the precision of the layout."""
        request, on_cpu = self.request, self.request.run.on_cpu
        folder, seed, lora = self.folder / REORDERED, request.run.args.seed, request.run.lora
        write_small_model(folder, self.config, seed, self.order)
        if lora is not None:
            write_small_adapters(folder / "adapters", self.arch, lora, seed + 3, self.order)
        alone = {
            REFERENCE: request.of_reference(self._paths("model", REFERENCE)),
            REORDERED: request.of_reference(self._paths(REORDERED, REORDERED)),
        }
        in_precision = {PRECISION: request.of_precision(self._paths("model", PRECISION))}
        if on_cpu:
            # In float32 the same operations again, in another order of their own.
            is_lower = request.roundoff > 2.0**-24
            return [self._job(alone | (in_precision if is_lower else {}), on_cpu=True)]
        return [self._job(alone, on_cpu=True), self._job(in_precision, on_cpu=False)]

    def _job(self, runs: dict[str, list[str]], *, on_cpu: bool) -> Job:
        file = self.request.run.args.objective_file
        return Job(os.getpid(), str(self.folder), runs, None if file is None else str(file.absolute()), on_cpu)

    def _paths(self, model: str, board: str) -> dict[str, Path]:
        found = {
            "--hf-model": self.folder / model,
            "--sft-train": self.folder / "data.jsonl",
            _BOARD: self.folder / f"board-{board}",
        }
        if self.request.run.lora is not None:
            found[_ADAPTERS] = self.folder / model / "adapters"
        return found | ({} if self.request.run.args.teacher_hf is None else {"--teacher-hf": self.folder / "teacher"})

    def train_here(self, fine_tune: FineTune) -> Training:
        """Train at the layout, in this process group; what is printed meanwhile goes to a file."""
        words = self.request.of_layout(self._paths("model", "layout"))
        log = self.folder / f"rank-{os.environ.get('RANK', '0')}.log"
        try:
            with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                return _train(words, self.initial, fine_tune)
        except BaseException:
            text = log.read_text(encoding="utf-8", errors="replace")
            print(f"--- printed at the layout\n{text[-3000:]}\n---", file=sys.stderr, flush=True)
            raise

    def yardstick(self, found: Mapping[str, Training]) -> _Yardstick:
        """From what one rank has computed, by name."""
        back, other = self.order.argsort(), found[REORDERED]
        tensors = {kind: list(reordered(dict(named), back).items()) for kind, named in other.tensors.items()}
        back_in_order = Training(other.scalars, other.losses, tensors)
        alone = OneRankTrainings(found[REFERENCE], back_in_order, found.get(PRECISION, back_in_order))
        lora = self.request.run.lora
        order = hf_tensor_shapes(self.arch) if lora is None else planned_tensors(self.arch, lora, torch.float32)
        reference = Reference.of(alone.reference, list(order))
        bounds = Bounds.of(alone, reference, self.initial, self.request.roundoff)
        in_precision = reference.distances(alone.precision.tensors)
        return _Yardstick(
            reference,
            bounds,
            alone.reference.scalars,
            all(difference.ok for difference in compare_tensors(reference, bounds, [in_precision])),
        )


@dataclass(frozen=True)
class _Yardstick:
    """What a layout is compared with. is_sound: one rank in the precision of the layout is within the bounds."""

    reference: Reference
    bounds: Bounds
    scalars: dict[str, list[float]]
    is_sound: bool


def _compare(problem: _Problem, found: Training, alone: OneRank | None) -> Verdict:
    """Compare what all ranks have found with one rank's, which the first of them knows. Collective."""
    outcome: list[Any] = [None]
    error: Fault | None = None
    if alone is not None:
        try:
            outcome = [problem.yardstick(alone.results())]
        except Fault as fault:
            error = fault
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is None:
        raise error or Fault("training on one rank has failed", already_reported=True)
    known: _Yardstick = outcome[0]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (known.reference.distances(found.tensors), found.scalars))
    last = len(everyone) - 1
    return Verdict(
        problem.request,
        problem.arch,
        tuple(compare_tensors(known.reference, known.bounds, [distances for distances, _ in everyone])),
        tuple(compare_scalars(known.scalars, everyone[last][1], known.bounds, last)),
        known.is_sound,
    )


@contextlib.contextmanager
def _workplace(keep: Path | None) -> Iterator[Path]:
    """A folder for models, data and results: the one that is kept, or one that is removed afterwards."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="qtarget-verify-") as folder:
            yield Path(folder)
        return
    keep = keep.absolute()
    output_lock.claim(keep / ".lock", f"--keep {keep}")
    yield keep
