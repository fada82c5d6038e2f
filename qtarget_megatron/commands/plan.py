"""Plan a fine-tuning before renting for it: memory per rank, traffic of the loss, and what does not fit or divide.

    qtarget plan --hf-model DIR --teacher-hf TEACHER_DIR --teacher-cache-k 64 \\
        --world-size 64 --memory-gib 80 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 \\
        --sequence-parallel --bf16 --use-distributed-optimizer --seq-length 4096 \\
        --micro-batch-size 1 --global-batch-size 128

Takes the flags of finetune and Megatron's, reads config.json of each directory and nothing else, builds nothing and
needs no GPU. For the layers of Transformer Engine; --transformer-impl local plans Megatron's own, --cpu those of a run
on the CPU.

Weights, gradients, optimizer state, loss and the teacher's weights are what is allocated. The activations of local
layers are counted, within 5% of what is kept on the CPU; those of Transformer Engine's layers are Megatron's own
estimate, close for Llama shapes by count. Experts are taken to be chosen equally often.
Leave room for NCCL, CUDA and the allocator. Every token counts as supervised: the fused head takes less where prompts
are masked.

Exit code: 0 it fits and divides, 1 it does not, 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from qtarget_megatron.commands.parsers import command_parser


def main(argv: list[str] | None = None) -> int:
    """Print one plan; returns the process's exit code: 0 it fits and divides, 1 it does not, 2 bad input."""
    from qtarget_megatron.megatron.faults.ending import exit_code

    return exit_code("plan", lambda: _run(*command_line().parse_known_args(argv)))


def _run(ours: argparse.Namespace, words: list[str]) -> int:
    from qtarget_megatron.megatron.planning.plan import PlanOptions, make_plan

    plan = make_plan(PlanOptions(ours.world_size, ours.memory_gib, ours.teacher_cache_k), words)
    if ours.json:
        stages = [dataclasses.asdict(stage) | {"total": stage.total} for stage in plan.stages]
        print(json.dumps(dataclasses.asdict(plan) | {"stages": stages}, indent=2))
    else:
        print("\n".join(_text(plan, ours.memory_gib)))
    return 1 if plan.problems else 0


def _text(plan, memory_gib: float | None) -> list[str]:
    lines = [f"plan: {plan.summary}"]
    if plan.stages:
        lines += ["", *_memory(plan, memory_gib), "", *_losses(plan), "", *_transfers(plan), ""]
    lines += [f"note: {note}" for note in plan.notes]
    return lines + [f"PROBLEM: {problem}" for problem in plan.problems]


def _memory(plan, memory_gib: float | None) -> list[str]:
    shown = plan.shown_stages()
    lines = [_row("GiB per rank of a pipeline stage", [f"{name} ({s.rank})" for name, s in shown.items()])]
    lines.append(_row("layers", [str(stage.layers) for stage in shown.values()]))
    lines.append(_row("million parameters", [f"{stage.parameters / 1e6:.0f}" for stage in shown.values()]))
    for item in plan.stages[0].items:
        lines.append(_row(item, [_gib(stage.items[item]) for stage in shown.values()]))
    lines.append(_row("total", [_gib(stage.total) for stage in shown.values()]))
    if memory_gib is not None:
        free = [memory_gib * 2**30 - stage.total for stage in shown.values()]
        lines.append(_row(f"left of {memory_gib:g}", [_gib(value) for value in free]))
    return lines


def _losses(plan) -> list[str]:
    names = {"none": "no second model", "live": "live teacher", "self": "itself as teacher", "cached": "cached teacher"}
    lines = [_row("loss on the last stage, GiB", ["fused head", "whole logits"])]
    for mode, sizes in plan.losses.items():
        counted = " (counted above)" if mode == plan.counted and len(plan.losses) > 1 else ""
        lines.append(_row(f"{names[mode]}{counted}", [_gib(sizes["fused"]), _gib(sizes["whole"])]))
    if plan.cached is not None:
        cached = plan.cached
        lines.append(
            f"a cached teacher's {cached.entries} entries: {_gib(cached.bytes)} GiB on the last stage, and "
            f"{cached.disk_bytes_per_token} MB on disk per million supervised tokens"
        )
    return lines


def _transfers(plan) -> list[str]:
    if not plan.transfers:
        return ["the loss and the pipeline need no communication"]
    lines = ["sent for each micro-batch"]
    for transfer in plan.transfers:
        lines.append(
            _row(f"{transfer.what}: {transfer.operation}", [transfer.group, f"{transfer.bytes / 1e6:,.2f} MB"])
        )
    return lines


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<58}" + "".join(f"{cell:>14}" for cell in cells)


def _gib(count: float) -> str:
    # Small models have digits too.
    return f"{count / 2**30:{'.2f' if abs(count) >= 2**30 / 10 else '.2g'}}" if count else "-"


def command_line() -> argparse.ArgumentParser:
    """The parser of its own flags."""
    parser = command_parser(
        "plan",
        __doc__,
        others="the flags of finetune and Megatron's as well: --hf-model DIR (needed), layout, precision, ...",
    )
    parser.add_argument("--world-size", type=int, required=True, metavar="RANKS", help="ranks of the training")
    parser.add_argument("--memory-gib", type=float, metavar="GIB", help="memory of a device (default: no limit)")
    parser.add_argument(
        "--teacher-cache-k",
        type=int,
        metavar="K",
        help="entries of a cached teacher per token; counted where there is no --teacher-hf (default: 64)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, of every stage, in bytes")
    return parser


if __name__ == "__main__":
    from qtarget_megatron.megatron.faults import ending

    ending.run("plan", main)
