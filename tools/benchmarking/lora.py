"""What adapters save: training steps and memory of LoRA next to those of all weights, by what is the teacher."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from tools.benchmarking import figures, packing, step

WHOLE, LORA = "all weights", "LoRA"
COPY, ITSELF, NONE = "a copy", "itself", "none"
# What is trained, and the teacher.
WAYS = [(WHOLE, COPY), (LORA, COPY), (LORA, ITSELF), (WHOLE, NONE), (LORA, NONE)]
# Parts of a row's memory: what is there all the time, and what a step takes beside it.
PARTS = ("weights", "teacher", "gradients", "optimizer", "step")


def measure(*, say: Callable[[str], None], shape: dict[str, Any], rank: int) -> list[dict[str, Any]]:
    """One row for each way: seconds of its steps, which the ways take in turn in this process, of one rank; bytes of
    what it holds, and of a step beside that at its peak.

    shape: of packing.Shape. rank: of the adapters. Raises RuntimeError where two ways that are the same training
    compute different losses or gradients.
    """
    import torch

    # Megatron is imported behind this.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    from qtarget_megatron.megatron.runtime.prepare import prepare
    from qtarget_megatron.megatron.training.arguments import TRAINING
    from tools.benchmarking.measure import Subject, alternate, memory

    sizes, cpu = packing.Shape(**shape), torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="qtarget-benchmark-") as folder:
        model = Path(folder, "model")
        packing.write_model(sizes, model)
        run = prepare(_words(sizes, model), TRAINING)
        _initialize(run)
        batches, trainings = _micro_batches(sizes), {}
        for way in WAYS:
            trainings[way] = _Training(run, *way, rank, batches)
            say(f"{way[0]}, teacher {way[1]}: {trainings[way].trained:,} numbers are trained")
    losses = {way: [training.step() for _ in range(step.WARM_UP_STEPS)] for way, training in trainings.items()}
    _check_agreement(trainings, losses)
    subjects = {way: Subject(training.step) for way, training in trainings.items()}
    extra = {way: memory(subject, cpu)[0].extra for way, subject in subjects.items()}
    times = alternate(subjects, device=cpu, seconds=0, min_rounds=sizes.steps)
    rows = []
    for (trained, teacher), training in trainings.items():
        seconds = times[trained, teacher]
        say(f"{trained}, teacher {teacher}: {figures.summary(seconds)['median']:.2f} s per step")
        row = {"trained": trained, "teacher": teacher, "rank": rank, "threads": torch.get_num_threads()}
        row |= {"trained_numbers": training.trained, "supervised": step.SUPERVISED, **asdict(sizes)}
        row["bytes"] = training.held() | {"step": extra[trained, teacher]}
        rows.append(row | {"seconds": seconds, **figures.summary(seconds)})
    return rows


def _words(shape: packing.Shape, model: Path) -> list[str]:
    words = ["--cpu", "--hf-model", str(model), "--teacher-hf", str(model), "--no-pack"]
    words += ["--seq-length", str(shape.seq_length), "--micro-batch-size", "1"]
    return [*words, "--global-batch-size", str(shape.global_batch), "--train-iters", str(shape.steps), "--lr", "1e-3"]


def _initialize(run: Any) -> None:
    """Megatron's global state, which serves all trainings: they have the same arguments but for the adapters."""
    from megatron.training.initialize import initialize_megatron

    from qtarget_megatron.megatron.runtime import launch, wheel_repairs
    from qtarget_megatron.megatron.runtime.architecture_flags import record_architecture
    from qtarget_megatron.megatron.training.arguments import fill_in

    fill_in(run)
    run.args.calculate_per_token_loss = True
    record_architecture(run.args, run.student)
    wheel_repairs.repair_megatron_wheel()
    launch.initialize(run.args)
    initialize_megatron(store=None)


def _micro_batches(shape: packing.Shape) -> list[dict[str, Any]]:
    """Those of a step: rows of tokens at random, the last of which are supervised."""
    import torch

    from qtarget_megatron.data import IGNORE_INDEX

    draw = random.Random(5)
    positions = torch.arange(shape.seq_length)[None]
    found = []
    for number in range(shape.global_batch):
        text = torch.tensor([draw.choices(range(shape.vocabulary), k=shape.seq_length + 1)])
        labels = text[:, 1:].clone()
        labels[:, : -round(step.SUPERVISED * shape.seq_length)] = IGNORE_INDEX
        rest = {"padding": torch.zeros_like(labels, dtype=torch.bool), "sample": torch.tensor([number])}
        found.append({"tokens": text[:, :-1], "labels": labels, "position_ids": positions, **rest})
    return found


class _Training:
    """A model in training, with its optimizer. trained: how many numbers are."""

    def __init__(self, run: Any, trained: str, teacher: str, rank: int, batches: list[dict[str, Any]]):
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.enums import ModelType
        from megatron.core.utils import get_model_config
        from megatron.training.training import setup_model_and_optimizer

        from qtarget_megatron import objectives
        from qtarget_megatron.huggingface import InitialFactors, Lora, default_targets
        from qtarget_megatron.megatron.attach import attach
        from qtarget_megatron.megatron.model.build import ModelProvider
        from qtarget_megatron.megatron.training.step import StepSettings, forward_step

        arch, objective = run.student, objectives.from_arguments("sft" if teacher == NONE else "target-sft", [])
        lora = Lora(rank, targets=default_targets(arch)) if trained == LORA else None
        provider = ModelProvider(
            run.args,
            arch,
            arch if teacher == COPY else None,
            load_weights=True,
            lora=lora,
            factors=None if lora is None else InitialFactors(arch, lora, run.args.seed),
            teaches_itself=teacher == ITSELF,
            finish=partial(
                attach, objective=objective, vocab_size=arch.vocab_size, second_model=objective.needs_teacher
            ),
        )
        self._args, self._data = run.args, cycle(batches)
        self._forward_step = partial(forward_step, StepSettings(objective), None)
        self._wrapped, self._optimizer, _ = setup_model_and_optimizer(ModelType.encoder_or_decoder, provider)
        config = get_model_config(self._wrapped[0])
        config.finalize_model_grads_func = finalize_model_grads
        (self._model,) = provider.built
        self.trained = sum(parameter.numel() for parameter in self._model.parameters() if parameter.requires_grad)

    def step(self) -> float:
        """A training step; its loss."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=self._data,
            model=self._wrapped,
            num_microbatches=get_num_microbatches(),
            seq_length=self._args.seq_length,
            micro_batch_size=self._args.micro_batch_size,
            forward_only=False,
        )
        self._optimizer.step()
        total, count = sum(report["lm loss"] for report in reports)
        return (total / count).item()

    def gradients(self) -> list[Any]:
        """The buffers of gradients, as the last step has left them."""
        buffers = [[*chunk.buffers, *chunk.expert_parallel_buffers] for chunk in self._wrapped]
        return [buffer.grad_data for of_chunk in buffers for buffer in of_chunk]

    def held(self) -> dict[str, int]:
        """Bytes of what is there between two steps, by PARTS."""
        teacher = self._model.teacher
        return {
            "weights": _bytes(self._model.parameters()),
            "teacher": 0 if teacher is None else _bytes(teacher.parameters()),
            "gradients": _bytes(self.gradients()),
            "optimizer": _bytes(self._optimizer_states()),
        }

    def _optimizer_states(self) -> Iterable[Any]:
        import torch

        # In float32 the parameters that it steps are the model's own.
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _check_agreement(trainings: dict[tuple[str, str], _Training], losses: dict[tuple[str, str], list[float]]) -> None:
    """RuntimeError unless LoRA starts with the loss of all weights, and goes the same way whichever teacher it has."""
    import torch

    def same(a: Any, b: Any) -> bool:
        return bool(torch.linalg.vector_norm(a - b) <= 1e-3 * torch.linalg.vector_norm(a))

    for teacher in (COPY, NONE):
        first, other = losses[WHOLE, teacher][0], losses[LORA, teacher][0]
        if not same(torch.tensor(first), torch.tensor(other)):
            raise RuntimeError(f"with teacher {teacher} the first loss of LoRA is {other}, of all weights {first}")
    copied, itself = (trainings[LORA, teacher].gradients() for teacher in (COPY, ITSELF))
    of_losses = same(torch.tensor(losses[LORA, COPY]), torch.tensor(losses[LORA, ITSELF]))
    if not (of_losses and all(map(same, copied, itself))):
        raise RuntimeError("LoRA computes other losses or gradients with itself as teacher than with a copy")
