"""From the flags of a fine-tuning to those of its verification: a small model, two steps, data of its own.

The flags of the layout stay as they are. The reference is given those that make a difference to the mathematics and no
other; what is computed in the user's precision on one rank, those of the precision besides.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qtarget_megatron.command_line import Parser
from qtarget_megatron.data import alignment
from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.megatron.runtime.layout_checks import (
    check_experts,
    check_layout,
    check_whole_stages,
    states_stages,
)
from qtarget_megatron.megatron.runtime.prepare import Purpose, Run, prepare
from qtarget_megatron.megatron.training.arguments import TRAINING, add_arguments, check_numbers
from qtarget_megatron.megatron.verify.shrink import Cuts

STEPS = 2
_ROW, _BATCH = 64, 8
# Adam divides an entry of the gradient by its own size: with an epsilon above the rounding of the gradients it is a
# smooth function of them. A larger rate would move the scores of experts, which have a margin.
_RATE, _EPSILON = 1e-3, 1e-3

# Groups of Megatron's flags that have no part in two steps on data of another kind.
_LEFT_OUT_GROUPS = {
    "profiling", "learning rate and weight decay", "checkpointing", "validation", "data and dataloader", "tokenizer",
    "autoresume", "logging", "Logits Distillation", "straggler", "workload inspector", "one logger",
    "In-process restart", "ft_package", "rerun engine", "msc", "fault injector", "rl", "inference",
}  # fmt: skip
_LEFT_OUT = {
    "--hf-model", "--teacher-hf", "--teacher-load", "--teacher-ckpt-step", "--sft-train", "--sft-valid",
    "--data-format", "--max-tokens-per-row", "--long-samples", "--epochs", "--data-date", "--save-hf",
    "--save-hf-dtype", "--log-arguments", "--print-arguments", "--objective-file", "--train-iters", "--train-samples",
    "--global-batch-size", "--rampup-batch-size", "--step-batch-size-schedule", "--decrease-batch-size-if-needed",
    "--exit-interval", "--exit-duration-in-mins", "--iterations-to-skip", "--adam-eps", "--hidden-dropout",
    "--attention-dropout", "--moe-input-jitter-eps", "--initial-loss-scale", "--distributed-timeout-minutes",
    "--distributed-timeout-seconds-after-init", "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers", "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split", "--pipeline-model-parallel-layout",
    "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank", "--lora-from", "--lora-merge",
    "--lora-dropout", "--metrics-jsonl",
}  # fmt: skip
# Whoever trains gives them: their absence is no news.
_ALWAYS = {
    "--hf-model", "--teacher-hf", "--sft-train", "--seq-length", "--train-iters", "--epochs", "--lr",
    "--global-batch-size", "--objective-file", "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank", "--lora-from",
}  # fmt: skip
_KEPT = {"--num-workers", "--logging-level"}
_REFUSED = {
    "--mtp-num-layers": "heads are not compared: drop it",
    "--skip-train": "nothing would be trained: drop it",
    "--teacher-cache": "a cache belongs to its data: give --teacher-hf DIR in its place",
    "--use-megatron-fsdp": "it keeps gradients in a form of its own, which is not verified",
    "--use-torch-fsdp2": "it keeps gradients in a form of its own, which is not verified",
    "--fake-process-group": "ranks that are not there compute nothing",
    "--moe-expert-capacity-factor": "which tokens an expert drops depends on the layout: verify without it",
    "--moe-router-force-load-balancing": "it chooses experts at random: drop it",
}
_MATHEMATICS = {
    "--lora-rank", "--lora-alpha", "--lora-rslora", "--lora-targets", "--teacher-self",
    "--objective", "--objective-args", "--objective-schedule", "--pack", "--no-pack", "--optimizer", "--seed",
    "--micro-batch-size",
    "--moe-aux-loss-coeff", "--moe-z-loss-coeff", "--moe-router-load-balancing-type", "--moe-router-bias-update-rate",
}  # fmt: skip
_MATHEMATICS_GROUP = "regularization"
_PRECISION = {
    "--bf16", "--fp16", "--fp32-residual-connection", "--attention-softmax-in-fp32", "--loss-scale",
    "--min-loss-scale", "--loss-scale-window", "--hysteresis", "--grad-reduce-in-bf16", "--moe-router-dtype",
    "--disable-bf16-reduced-precision-matmul", "--first-last-layers-bf16", "--num-layers-at-start-in-bf16",
    "--num-layers-at-end-in-bf16", "--te-precision-config-file",
}  # fmt: skip
_PRECISION_BEGINNINGS = ("--fp8-", "--no-fp8-", "--fp4-", "--moe-router-padding-for-")
# What computes it, without which some precisions are not to be had.
_IMPLEMENTATION = {
    "--transformer-impl", "--attention-backend", "--moe-grouped-gemm", "--qtarget-backend", "--qtarget-chunk-size",
    "--qtarget-materialize-logits",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The layout, and what a verification trains at it.

    replicas:       data-parallel ranks.
    virtual_stages: model chunks of each pipeline rank.
    row_length:     tokens of a row.
    batch:          rows of a step.
    unit:           that lengths of samples are multiples of.
    """

    replicas: int
    virtual_stages: int
    row_length: int
    batch: int
    unit: int

    @classmethod
    def of(cls, args: argparse.Namespace, student: Architecture) -> Sizes:
        """Those of a command line. ValueError where the ranks do not divide, or the layers of the user's model."""
        tensor, pipeline, context = (
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.context_parallel_size,
        )
        if args.world_size % (ranks := tensor * pipeline * context):
            raise ValueError(
                f"tensor {tensor} x pipeline {pipeline} x context {context} takes a multiple of {ranks} ranks, got "
                f"{args.world_size}: start as many ranks as training will have, under a launcher such as torchrun"
            )
        replicas = args.world_size // ranks
        row_length = math.lcm(_ROW, 16 * tensor * context)
        at_once = (args.micro_batch_size or 1) * replicas * pipeline
        # At other sizes of context parallelism rows would hold other samples than those of one rank.
        same_rows = alignment(row_length, context) == alignment(row_length, 1)
        return cls(
            replicas=replicas,
            virtual_stages=_virtual_stages(args, student),
            row_length=row_length,
            batch=-(-_BATCH // at_once) * at_once,
            unit=1 if same_rows else math.lcm(8, 2 * context),
        )


@dataclass(frozen=True)
class TrainingWords:
    """A fine-tuning that is to be verified.

    run:            of the user's own model, of which config.json has been read.
    sizes, cuts:    what is trained, and what the small model has to divide into.
    kept:           the user's words that the verified training gets.
    mathematics:    those of them that the reference gets.
    precision:      those of the precision, and of what computes in it.
    roundoff:       unit roundoff of the precision.
    left_out:       flags that were replaced, or have no part in it.
    timeout:        seconds that ranks wait for each other.
    """

    run: Run
    sizes: Sizes
    cuts: Cuts
    kept: tuple[str, ...]
    mathematics: tuple[str, ...]
    precision: tuple[str, ...]
    roundoff: float
    left_out: tuple[str, ...]
    timeout: float

    def of_layout(self, paths: Mapping[str, Path]) -> list[str]:
        """The words of the verified training. paths: flag -> what it names."""
        words = [*self.kept, *self._own(paths)]
        if self.sizes.virtual_stages > 1:
            words += ["--num-virtual-stages-per-pipeline-rank", str(self.sizes.virtual_stages)]
        return words

    def of_reference(self, paths: Mapping[str, Path]) -> list[str]:
        """The words of the same on one rank in float32: with torch's operations, and Megatron's own output layer."""
        return [*self.mathematics, "--qtarget-backend", "reference", "--qtarget-materialize-logits", *self._own(paths)]

    def of_precision(self, paths: Mapping[str, Path]) -> list[str]:
        """The words of the same on one rank in the precision of the layout, by its kernels."""
        return [*self.mathematics, *self.precision, *self._own(paths)]

    def _own(self, paths: Mapping[str, Path]) -> list[str]:
        numbers: dict[str, object] = {
            "--data-format": "tokens",
            "--seq-length": self.sizes.row_length,
            "--global-batch-size": self.sizes.batch,
            "--train-iters": STEPS,
            "--lr": _RATE,
            "--min-lr": _RATE,
            "--lr-decay-style": "constant",
            "--adam-eps": _EPSILON,
            "--log-interval": 1,
            "--tensorboard-log-interval": 1,
            "--distributed-timeout-minutes": math.ceil(self.timeout / 60),
            # The first steps are not to overflow under --fp16.
            "--initial-loss-scale": 1024,
        }
        return [str(word) for pair in [*numbers.items(), *paths.items()] for word in pair]

    def in_words(self) -> str:
        """The layout, in a line."""
        args = self.run.args
        found = {
            "TP": args.tensor_model_parallel_size,
            "PP": args.pipeline_model_parallel_size,
            "VP": self.sizes.virtual_stages,
            "CP": args.context_parallel_size,
            "EP": args.expert_model_parallel_size,
            "ETP": 1 if args.expert_tensor_parallel_size == self.cuts.tensor else args.expert_tensor_parallel_size or 1,
            "DP": self.sizes.replicas,
        }
        named = {"--sequence-parallel": "sequence parallel", "--use-distributed-optimizer": "distributed optimizer"}
        parts = [f"{name} {size}" for name, size in found.items() if size > 1]
        return ", ".join([*parts, *(words for flag, words in named.items() if flag in self.kept)]) or "one rank"


def read_training_words(words: Sequence[str], timeout: float) -> TrainingWords:
    """Read the flags of a fine-tuning. The CPU platform is active afterwards where there is no GPU.

    timeout: seconds that ranks wait for each other. Raises ValueError for flags that fine-tuning refuses, a layout that
    the user's model cannot be cut into, and what cannot be verified.
    """
    # What is missing is said in a line, before anything is imported.
    add_arguments(Parser(allow_abbrev=False, add_help=False)).parse_known_args(words)
    parsers: list[argparse.ArgumentParser] = []

    def adding(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(add_arguments(parser))
        return parser

    run = prepare(list(words), Purpose(add_arguments=adding, flags=TRAINING.flags))
    args, given = run.args, _given(parsers[-1], words)
    _refuse(args, given)
    check_numbers(args)
    sizes = Sizes.of(args, run.student)
    # Rows of another length are trained than those of --seq-length.
    args.seq_length = None
    check_whole_stages(args, run.student, "student")
    models = {"student": run.student}
    if args.teacher_hf is not None:
        models["model of --teacher-hf"] = Architecture.from_hf(args.teacher_hf)
    for name, arch in models.items():
        check_layout(args, arch, name)
        check_experts(args, arch, name)
    tensor = args.tensor_model_parallel_size
    cuts = Cuts(
        tensor=tensor,
        stages=args.pipeline_model_parallel_size * sizes.virtual_stages,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or tensor,
    )

    def chosen(is_chosen: Callable[[_Given], bool]) -> tuple[str, ...]:
        return tuple(word for one in given if is_chosen(one) for word in one.words)

    return TrainingWords(
        run=run,
        sizes=sizes,
        cuts=cuts,
        kept=chosen(lambda one: not _is_left_out(one)),
        mathematics=chosen(lambda one: one.flag in _MATHEMATICS or one.group == _MATHEMATICS_GROUP),
        precision=chosen(lambda one: _is_precision(one) or one.flag in _IMPLEMENTATION),
        roundoff=_roundoff(args, on_cpu=run.on_cpu),
        left_out=tuple(dict.fromkeys(one.flag for one in given if _is_left_out(one) and one.flag not in _ALWAYS)),
        timeout=timeout,
    )


@dataclass(frozen=True)
class _Given:
    """A flag of a command line. group: of the parser that knows it; words: it and its values."""

    flag: str
    group: str | None
    words: tuple[str, ...]


def _given(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[_Given]:
    """The flags among words that a parser has taken."""
    groups = {action: group.title for group in parser._action_groups for action in group._group_actions}
    found: list[_Given] = []
    for word in words:
        flag = word.partition("=")[0]
        if flag in parser._option_string_actions:
            found.append(_Given(flag, groups.get(parser._option_string_actions[flag]), (word,)))
        else:
            # A value: words that are none have been refused.
            found[-1] = replace(found[-1], words=(*found[-1].words, word))
    return found


def _is_left_out(one: _Given) -> bool:
    return one.flag in _LEFT_OUT or (one.group in _LEFT_OUT_GROUPS and one.flag not in _KEPT)


def _is_precision(one: _Given) -> bool:
    return one.flag in _PRECISION or one.flag.startswith(_PRECISION_BEGINNINGS)


def _roundoff(args: argparse.Namespace, *, on_cpu: bool) -> float:
    """Half the distance from 1 to the next number, of the coarsest numbers that are multiplied."""
    if args.fp4:
        return 2.0**-2
    if args.fp8:
        return 2.0**-4
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    # A GPU may multiply float32 in TensorFloat-32.
    return torch.finfo(dtype).eps / 2 if on_cpu or dtype != torch.float32 else 2.0**-11


def _refuse(args: argparse.Namespace, given: Sequence[_Given]) -> None:
    """ValueError for what cannot be verified."""
    for one in given:
        if one.flag in _REFUSED:
            raise ValueError(f"{one.flag}: {_REFUSED[one.flag]}")
    if args.optimizer not in ("adam", "sgd") and args.use_distributed_optimizer:
        raise ValueError(
            f"--optimizer {args.optimizer} with --use-distributed-optimizer keeps gradients in a form "
            "of its own, which is not verified: drop one of them"
        )


def _virtual_stages(args: argparse.Namespace, student: Architecture) -> int:
    """Model chunks of each pipeline rank, in whichever way they are given."""
    # Seconds of imports.
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    pipeline, layers = args.pipeline_model_parallel_size, student.num_layers
    if args.pipeline_model_parallel_layout is not None:
        return PipelineParallelLayerLayout.get_num_stages_from_str(args.pipeline_model_parallel_layout) // pipeline
    if args.num_layers_per_virtual_pipeline_stage is not None:
        stages, rest = divmod(layers, args.num_layers_per_virtual_pipeline_stage * pipeline)
        flag = f"--num-layers-per-virtual-pipeline-stage {args.num_layers_per_virtual_pipeline_stage}"
    else:
        stages = args.num_virtual_stages_per_pipeline_rank or 1
        flag, rest = f"--num-virtual-stages-per-pipeline-rank {stages}", layers % (stages * pipeline)
    if rest and not states_stages(args):
        raise ValueError(f"{flag} at {pipeline} pipeline ranks does not divide the {layers} layers of the student")
    return stages
