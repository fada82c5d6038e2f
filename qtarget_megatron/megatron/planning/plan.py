"""The plan of a fine-tuning: memory per rank and traffic, from a config.json and the flags of its layout."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

from qtarget_megatron.huggingface import CORRECTION, Architecture, adapter_numbers, hf_tensor_shapes
from qtarget_megatron.loss.linear_cross_entropy import tokens_at_a_time
from qtarget_megatron.loss.memory import cached_teacher_bytes, fused_loss_bytes, loss_transfers, whole_loss_bytes
from qtarget_megatron.megatron.planning.report import (
    GIB,
    CachedTeacher,
    Plan,
    Stage,
    memory_problem,
    padding_note,
    pipeline_transfers,
)
from qtarget_megatron.megatron.planning.sizes import Parameters, RefusedError, Sizes
from qtarget_megatron.megatron.runtime import cpu_platform, launch
from qtarget_megatron.megatron.runtime.architecture_flags import (
    record_architecture,
)
from qtarget_megatron.megatron.runtime.layout_checks import layout_of_experts, states_stages
from qtarget_megatron.megatron.runtime.prepare import Run, prepare
from qtarget_megatron.megatron.training.arguments import (
    TRAINING,
    check_head,
    check_numbers,
    check_trained,
    fill_in,
)
from qtarget_megatron.megatron.training.second_model_flags import check_second_model_flags
from qtarget_megatron.parallel_layout import Layout, division_problems, expert_problems, layout_problems, stage_problems
from qtarget_megatron.teacher_cache import CacheHeader

_DEFAULT_ENTRIES = 64
# Layers or optimizer states of another size than what is planned here.
_NOT_PLANNED = (
    "use_megatron_fsdp", "use_torch_fsdp2", "use_precision_aware_optimizer", "optimizer_cpu_offload",
    "fp8", "fp4", "mtp_num_layers", "cpu_offloading",
)  # fmt: skip


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is made for. ValueError for what is not above 0.

    world_size: ranks of the training.
    memory_gib: of a device, None: no limit.
    entries:    of a cached teacher per token, None: the default.
    """

    world_size: int
    memory_gib: float | None = None
    entries: int | None = None

    def __post_init__(self):
        given = {
            "--world-size": self.world_size,
            "--memory-gib": self.memory_gib,
            "--teacher-cache-k": self.entries,
        }
        for flag, value in given.items():
            if value is not None and not value > 0:
                raise ValueError(f"{flag} must be above 0, got {value}")


def make_plan(options: PlanOptions, words: list[str]) -> Plan:
    """The plan for finetune with these words. ValueError for bad input; what does not fit or divide is in the plan."""
    launch.check_version()
    # What Megatron and the CPU platform say of this machine means nothing for the plan.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        cpu_platform.activate()
        run, entries = _read(options, words)
        args, layout = run.args, _layout(run.args)
        plan = Plan(_summary(run, layout))
        shared = dict(tensor=layout.tensor, seq_length=layout.seq_length)
        if not states_stages(args):
            plan.problems += stage_problems(run.student, "student", pipeline=layout.pipeline)
        for arch, who in ((run.student, "student"), (run.teacher, "teacher")):
            if arch is not None and not (who == "teacher" and arch is run.student):
                plan.problems += division_problems(arch, who, **shared)
                plan.problems += expert_problems(arch, who, world_size=layout.world_size, **layout_of_experts(args))
        plan.problems += layout_problems(layout)
        try:
            if not plan.problems:
                _fill(plan, Sizes(run, layout), run.objective, entries, options)
        except RefusedError as error:
            plan.problems.append(str(error))
    return plan


def _read(options: PlanOptions, words: list[str]) -> tuple[Run, int | None]:
    """What finetune would be asked for, and the entries of a cached teacher (None: none)."""
    run = prepare(words, replace(TRAINING, elsewhere=True))
    args = run.args
    for key in _NOT_PLANNED:
        if getattr(args, key, None):
            raise ValueError(f"--{key.replace('_', '-')} changes sizes that no plan is made for: drop it here")
    if args.optimizer not in ("adam", "sgd"):
        raise ValueError(f"expected --optimizer adam or sgd for a plan, got {args.optimizer}")
    check_head(args)
    is_cached = options.entries is not None or args.teacher_cache is not None
    is_live = args.teacher_hf is not None or args.teacher_self
    given = any(word.partition("=")[0] == "--objective" for word in words)
    if not given and (is_live or is_cached):
        args.objective = "target-sft"
    objective = run.objective
    if objective.refresh:
        if options.entries is not None:
            raise ValueError(
                f"objective {objective} reads the trained model of an earlier step: drop --teacher-cache-k"
            )
        check_second_model_flags(args, objective)
        run.teacher, is_live = run.student, True
    if objective.needs_teacher and not (is_live or is_cached):
        own = " or --teacher-self" if run.lora is not None else ""
        raise ValueError(
            f"objective {objective} reads a second model: give --teacher-hf DIR or --teacher-cache-k K{own}"
        )
    if not objective.needs_teacher and (is_live or is_cached):
        raise ValueError(
            f"objective {objective} reads no second model: drop --teacher-hf and --teacher-cache-k or choose another"
        )
    entries = options.entries or (_DEFAULT_ENTRIES if objective.needs_teacher and not objective.refresh else None)
    if args.teacher_hf is not None:
        run.teacher = Architecture.from_hf(args.teacher_hf)
    args.world_size, args.rank = options.world_size, 0
    # A plan depends neither on the length of a training, nor on its data, which need not be here.
    args.train_iters, args.epochs = args.train_iters or (None if args.train_samples else 1), None
    args.lr = 1e-5 if args.lr is None else args.lr
    check_numbers(args)
    fill_in(run)
    args.calculate_per_token_loss = True
    record_architecture(args, run.student)
    check_trained(args, run.student)
    return run, entries


def _layout(args: argparse.Namespace) -> Layout:
    return Layout(
        world_size=args.world_size,
        **layout_of_experts(args),
        context=args.context_parallel_size,
        # Megatron turns it off for one rank.
        sequence_parallel=args.sequence_parallel and args.tensor_model_parallel_size > 1,
        seq_length=args.max_tokens_per_row or args.seq_length,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
    )


def _summary(run: Run, layout: Layout) -> str:
    args, student, teacher = run.args, run.student, run.teacher

    def model(arch: Architecture) -> str:
        count = sum(math.prod(shape) for name, shape in hf_tensor_shapes(arch).items() if CORRECTION not in name)
        return f"{arch.family}, {count / 1e9:.3g} B parameters in {arch.num_layers} layers"

    parts = [model(student), f"objective {run.objective}"]
    if run.lora is not None:
        count = adapter_numbers(student, run.lora) / 1e6
        parts.insert(1, f"adapters of rank {run.lora.rank}, {count:.3g} M parameters on {' '.join(run.lora.targets)}")
    if teacher is not None or args.teacher_self:
        whose = "its own teacher" if teacher is None else f"teacher {model(teacher)}"
        parts.insert(1, "the model of an earlier step beside it" if run.objective.refresh else whose)
    tensor = f"TP {layout.tensor}{' with sequence parallelism' if layout.sequence_parallel else ''}"
    data = layout.world_size / layout.model_ranks
    spread = (
        f" (experts: EP {layout.expert_parallel} x TP {layout.expert_tensor})" if student.experts is not None else ""
    )
    parts += [
        f"{tensor} x PP {layout.pipeline} x CP {layout.context} x DP {data:g} = {layout.world_size} ranks{spread}",
        "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        f"micro-batches of {layout.micro_batch_size} x {layout.seq_length} tokens",
    ]
    return "; ".join(parts)


def _fill(plan: Plan, sizes: Sizes, objective, entries: int | None, options: PlanOptions) -> None:
    """Everything of a plan whose layout divides."""
    args, layout = sizes.args, sizes.layout
    chunk = tokens_at_a_time(args.qtarget_chunk_size, "cpu" if args.cpu else "cuda")
    fused = not args.qtarget_materialize_logits
    form = "fused" if fused else "whole"
    modes = {}
    if sizes.teaches_itself:
        modes["self"] = sizes.loss_shape(objective)
    elif sizes.teacher is not None:
        modes["live"] = sizes.loss_shape(objective)
    if entries is not None:
        modes["cached"] = sizes.loss_shape(objective, entries=entries)
    modes = modes or {"none": sizes.loss_shape(objective)}
    plan.counted, shape = next(iter(modes.items()))
    plan.losses = {
        mode: {"fused": fused_loss_bytes(s, chunk), "whole": whole_loss_bytes(s)} for mode, s in modes.items()
    }
    if entries is not None:
        on_device = cached_teacher_bytes(modes["cached"])
        plan.cached = CachedTeacher(entries, on_device, _disk_bytes(args, sizes.student, entries))
    for rank in range(layout.pipeline):
        layers = list(itertools.chain(*sizes.layers(rank)))
        parameters, adapters = sizes.parameters(rank, sizes.student, layers), sizes.adapters(layers)
        count, trained = sum(parameters) + sum(adapters), parameters if sizes.lora is None else adapters
        items = {
            "weights": count * sizes.element,
            "gradients": sum(trained) * sizes.gradient_element(),
            "optimizer": sizes.optimizer_bytes(trained),
            "activations": sizes.activations(rank),
            "loss": 0,
        }
        if plan.counted in ("live", "self"):
            items |= sizes.teacher_items(rank)
        elif plan.counted == "cached":
            items["cached teacher"] = 0
        if rank == layout.pipeline - 1:
            items["loss"] = plan.losses[plan.counted][form]
            if plan.counted == "cached":
                items["cached teacher"] = plan.cached.bytes
        # The loss is over before the first layer's backward: the larger one counts.
        items["backward beyond the loss"] = max(sizes.backward(rank) - items["loss"], 0)
        plan.stages.append(Stage(rank, len(layers), count, items))
    plan.transfers = loss_transfers(shape, fused=fused)
    plan.transfers += pipeline_transfers(layout, sizes.element, shape.hidden, shape.teacher_hidden)
    row = sizes.student.hidden_size * (1 if sizes.student.tied else 2)
    trained_row = 0 if sizes.lora is not None else row
    note = padding_note(
        sizes.student.vocab_size,
        args.padded_vocab_size,
        layout.tensor,
        args.make_vocab_size_divisible_by,
        row_bytes=row * sizes.element
        + trained_row * sizes.gradient_element()
        + sizes.optimizer_bytes(Parameters(0, trained_row)),
        who="student",
    )
    plan.notes += [] if note is None else [note]
    if options.memory_gib is not None:
        problem = memory_problem(plan.stages, round(options.memory_gib * GIB), _advice(sizes, fused))
        plan.problems += [] if problem is None else [problem]


def _disk_bytes(args: argparse.Namespace, student: Architecture, entries: int) -> int:
    unknown: dict[str, Any] = dict.fromkeys(
        ("data", "tokenizer", "chat_template", "teacher", "teacher_files", "precision"), ""
    )
    header = CacheHeader(**unknown, num_samples=0, vocab_size=student.vocab_size, seq_length=args.seq_length, k=entries)
    return header.bytes_per_token


def _advice(sizes: Sizes, fused: bool) -> dict[str, str]:
    """What to change against a large item."""
    args, layout = sizes.args, sizes.layout
    cut = "more tensor or pipeline parallelism"
    optimizer, activations = cut, "more tensor, pipeline or context parallelism"
    if not args.use_distributed_optimizer and layout.data * layout.context > 1:
        optimizer = "--use-distributed-optimizer"
    if layout.tensor > 1 and not layout.sequence_parallel:
        activations = "--sequence-parallel"
    elif args.recompute_granularity != "full":
        activations = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        if args.transformer_impl == "local" and args.recompute_granularity is None:
            activations = "--recompute-granularity selective, or full"
    elif layout.micro_batch_size > 1:
        activations = f"--micro-batch-size below {layout.micro_batch_size}"
    return {
        "weights": cut,
        "gradients": cut,
        "optimizer": optimizer,
        "activations": activations,
        "backward": activations,
        "loss": "a smaller --qtarget-chunk-size or more tensor parallelism"
        if fused
        else "drop --qtarget-materialize-logits (fused head)",
        "teacher": "a cached teacher: qtarget cache-teacher, then --teacher-cache",
        "cached": "a smaller --teacher-cache-k",
    }
