"""The second model that a training's flags name: what contradicts its objective, and its caches."""

from __future__ import annotations

import argparse
from pathlib import Path

from qtarget_megatron import objectives
from qtarget_megatron.data import held_out_sets, training_sources
from qtarget_megatron.loss.sparse_teacher import check_residuals
from qtarget_megatron.megatron.runtime.prepare import Run
from qtarget_megatron.teacher_cache import TeacherCache


def data_paths(args: argparse.Namespace) -> dict[str, list[Path]]:
    """The sources of each flag."""
    return {
        "sft_train": [source.path for source in training_sources(args.sft_train or [])],
        "sft_valid": [held_out.path for held_out in held_out_sets(args.sft_valid or [])],
    }


def check_second_model_flags(args: argparse.Namespace, objective: objectives.Objective) -> None:
    caches = [f for f in ("teacher_cache", "teacher_cache_valid") if getattr(args, f) is not None]
    paths = data_paths(args)
    live = [flag for flag in ("teacher_hf", "teacher_self") if getattr(args, flag)]
    given = [f"--{key.replace('_', '-')}" for key in live + caches]
    if args.teacher_load is not None and args.teacher_hf is None:
        raise ValueError(
            f"--teacher-load {args.teacher_load} holds weights only: give --teacher-hf DIR as well, with that model's "
            "config.json and tokenizer"
        )
    if objective.refresh:
        _check_old_policy(args, objective, given)
        return
    if not objective.needs_teacher:
        if given:
            raise ValueError(
                f"objective {objective} reads no second model: drop {given[0]} or choose another objective"
            )
        return
    if not given:
        own = " or --teacher-self" if args.lora_rank is not None else ""
        raise ValueError(
            f"objective {objective} reads a second model: give --teacher-hf DIR or --teacher-cache DIR{own}"
        )
    if len(live) + bool(caches) > 1:
        raise ValueError(f"expected one second model: drop {given[0]} or {given[1]}")
    if caches:
        check_residuals(objective.request, args.teacher_tail)
    for data, cache in (("sft_train", "teacher_cache"), ("sft_valid", "teacher_cache_valid")):
        if caches and (getattr(args, data) is None) != (getattr(args, cache) is None):
            missing, present = (cache, data) if getattr(args, cache) is None else (data, cache)
            raise ValueError(
                f"--{present.replace('_', '-')} without --{missing.replace('_', '-')}: a cache belongs to one data "
                "file, written by qtarget cache-teacher"
            )
        if caches and len(getattr(args, cache) or ()) != len(paths[data]):
            raise ValueError(
                f"--{cache.replace('_', '-')}: expected {len(paths[data])} directories, one for each source of "
                f"--{data.replace('_', '-')} in their order, got {len(getattr(args, cache))}"
            )


def _check_old_policy(args: argparse.Namespace, objective: objectives.Objective, given: list[str]) -> None:
    """ValueError where the trained model of an earlier step cannot be the second model. given: flags of another."""
    what = f"objective {objective} reads the trained model as it was up to {objective.refresh} steps ago"
    if given:
        raise ValueError(f"{what}: drop {given[0]}")
    for key in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, key, False):
            raise ValueError(f"{what}, whole: drop --{key.replace('_', '-')}")
    if args.ckpt_format != "torch_dist":
        raise ValueError(f"{what}, which --ckpt-format {args.ckpt_format} would not save: drop the flag")
    if args.mtp_num_layers and args.pipeline_model_parallel_layout is not None:
        raise ValueError(f"{what}, without its --mtp-num-layers: drop --pipeline-model-parallel-layout")
    args.objective_refresh = objective.refresh


def open_caches(run: Run) -> dict[Path, TeacherCache]:
    """Data file -> its teacher cache, checked against everything that training reads it with."""
    args, caches = run.args, {}
    for flag, directories in (("sft_train", args.teacher_cache), ("sft_valid", args.teacher_cache_valid)):
        for path, digest, directory in zip(
            data_paths(args)[flag], args.data_digest.get(flag, []), directories or (), strict=False
        ):
            caches[path] = TeacherCache(directory)
            caches[path].check(
                data_digest=digest,
                tokenizer=run.tokenizer,
                seq_length=args.seq_length,
                vocab_size=run.student.vocab_size,
                date=args.data_date,
            )
    return caches
