"""The one way from a command line to a run: Megatron's arguments, the models' architectures, tokenizer and objective.

What fine-tuning, its plan and the jobs of frozen models do alike is done here, in one order; what is particular to one
of them is its Purpose.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qtarget_megatron import objectives
from qtarget_megatron.data import compare_tokenizers, load_tokenizer
from qtarget_megatron.huggingface import Architecture, HFReader, Lora, check_tensors, further_reader
from qtarget_megatron.megatron.runtime import cpu_platform, launch
from qtarget_megatron.megatron.runtime.architecture_flags import check_flags, implementation_flags, megatron_flags
from qtarget_megatron.megatron.runtime.gpu_flags import check_gpu_flags
from qtarget_megatron.megatron.runtime.layout_checks import check_experts, check_layout
from qtarget_megatron.megatron.runtime.lora_flags import read_lora
from qtarget_megatron.megatron.runtime.model_class import HYBRID, add_model_class, choose_model_class
from qtarget_megatron.objectives import Objective, ScheduledObjective

_log = logging.getLogger("qtarget_megatron")


@dataclass(frozen=True)
class Purpose:
    """What a command line is read for.

    add_arguments: adds this package's own flags to a parser, --model-class among them; so is --hf-model, or prepare()
                   is given it.
    flags:         of Megatron's, which the user's own may overrule.
    refused:       flags that have no meaning for this purpose.
    elsewhere:     the run takes place on another machine, which has a GPU and Transformer Engine unless --cpu is given:
                   this one's launcher, GPU and extension modules do not matter.
    """

    add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] = add_model_class
    flags: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    elsewhere: bool = False


@dataclass
class Run:
    """What a command line asks for, as far as it can be known before Megatron is initialised.

    words:           as the user gave them.
    args:            Megatron's arguments and ours.
    on_cpu:          it takes place on the CPU, over gloo.
    student:         architecture of the model, which is trained or not.
    teacher:         architecture of a live second model, see add_teacher().
    teacher_weights: SavedModel, where a Megatron checkpoint has the second model's weights.
    lora:            adapters of the model, which is frozen then; None where its weights are trained.
    """

    words: list[str]
    args: argparse.Namespace
    on_cpu: bool
    student: Architecture
    hf_model: Path
    teacher: Architecture | None = None
    teacher_weights: Any = field(default=None, repr=False)
    lora: Lora | None = None

    @cached_property
    def objective(self) -> Objective:
        """The objective that --objective names; of one with schedules, see ScheduledObjective.widest. ValueError for an
        unknown name or parameter."""
        if self.schedule is not None:
            return self.schedule.widest
        return objectives.from_arguments(self.args.objective, self.args.objective_args)

    @cached_property
    def schedule(self) -> ScheduledObjective | None:
        """The objective with its schedules, where --objective-schedule gives some."""
        words = getattr(self.args, "objective_schedule", None)
        return ScheduledObjective(self.args.objective, self.args.objective_args, words) if words else None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's. ValueError where there is none, or one of a larger vocabulary than the model's."""
        return load_model_tokenizer(self.hf_model, self.student)

    def take_further(self) -> bool:
        """Have Megatron's model hold the layers that predict further tokens, as heads of multi-token prediction, if its
        class can; whether it does."""
        if self.args.model_class != HYBRID:
            self.student = self.student.with_further()
            self.args.mtp_num_layers = self.student.further_layers
        return self.student.has_further

    def check_weights(self, fate: str | None = None) -> None:
        """ValueError unless the model's directory holds its weights; headers only.

        fate: what becomes of layers that predict further tokens which the model does not hold, for a line.
        """
        left_out = check_tensors(HFReader(self.hf_model), self.student)
        if left_out and fate is not None:
            _log.warning(
                "%s: %d tensors of layers that predict further tokens (%s, ...) are not in the model: %s",
                *(self.hf_model, len(left_out), left_out[0], fate),
            )

    def add_teacher(self, directory: Path, flag: str, *, weights: Any = None) -> None:
        """Stack a second model, given by flag, on the first; of its weights headers only.

        weights: a Megatron checkpoint that has them in place of the directory. Embeddings may be padded to different
        sizes, and the number of layers need not suit the stages. ValueError where tensor parallelism cannot cut the
        second model as well, or where a token id means different tokens.
        """
        second = Architecture.from_hf(directory)
        check_layout(self.args, second, f"model of {flag}")
        check_experts(self.args, second, f"model of {flag}")
        if weights is None:
            check_tensors(HFReader(directory), second)
        compare_tokenizers(self.tokenizer, load_tokenizer(directory))
        self.teacher, self.teacher_weights = second, weights


def prepare(words: list[str], purpose: Purpose, *, hf_model: Path | None = None, cpu: bool = False) -> Run:
    """Read a command line. The CPU platform is active afterwards where there is no GPU; Megatron is imported.

    hf_model, cpu: as --hf-model and --cpu, for a purpose whose own flags are not among the words. ValueError for bad
    input: a launcher or version that does not serve, a model without a family, flags that contradict it, unknown
    flags, and those that this machine cannot serve.
    """
    own = purpose.add_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    ours, _ = own.parse_known_args(words)
    if getattr(ours, "objective_file", None) is not None:
        objectives.register_from_file(ours.objective_file)
    launch.check_version()
    launch.tell_version()
    if not purpose.elsewhere:
        launch.check_launcher(meets="--fake-process-group" not in words)
    cpu = cpu or getattr(ours, "cpu", False)
    on_cpu = cpu_platform.activate(requested=cpu and not purpose.elsewhere)
    if purpose.elsewhere:
        on_cpu = cpu
    hf_model = hf_model or ours.hf_model
    student = Architecture.from_hf(hf_model)
    arch_flags = megatron_flags(student)
    check_flags(words, arch_flags)
    refused = sorted({word.partition("=")[0] for word in words}.intersection(purpose.refused))
    if refused:
        raise ValueError(f"{', '.join(refused)} has no meaning for this command: drop it")
    flags = [*arch_flags, *implementation_flags(on_cpu=on_cpu, elsewhere=purpose.elsewhere), *purpose.flags, *words]
    args = launch.parse_arguments(flags, purpose.add_arguments)
    choose_model_class(args, student)
    if not purpose.elsewhere:
        check_gpu_flags(words, args, on_cpu=on_cpu)
    run = Run(words, args, on_cpu, student, hf_model)
    if hasattr(args, "lora_rank"):
        run.lora = read_lora(args, student)
    if args.mtp_num_layers and further_reader(hf_model, student) is not None:
        if args.mtp_num_layers != student.further_layers:
            raise ValueError(
                f"--mtp-num-layers {args.mtp_num_layers}: {hf_model} has {student.further_layers} layer(s) that "
                f"predict further tokens: give --mtp-num-layers {student.further_layers}, or drop the flag"
            )
        run.take_further()
    return run


def load_model_tokenizer(hf_model: Path, arch: Architecture) -> Any:
    """The tokenizer of hf_model. ValueError where there is none, or one of a larger vocabulary than the model's."""
    tokenizer = load_tokenizer(hf_model)
    largest = max(tokenizer.get_vocab().values())
    if largest >= arch.vocab_size:
        raise ValueError(
            f"{hf_model}: the tokenizer has ids up to {largest}, the model a vocabulary of "
            f"{arch.vocab_size}: config.json and tokenizer do not belong together"
        )
    return tokenizer
