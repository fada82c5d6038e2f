"""Flags of the schedule: whether they fit together, and what changing them means when a training resumes.

Megatron compares them with the checkpoint's when the model is there, by assertions, and counts its schedule in samples.
Here they are compared before anything is built, and a change means what was asked for from the next step on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from qtarget_megatron.megatron.runtime import launch
from qtarget_megatron.megatron.weights.checkpoint_folder import checkpoint_directory

_KEEP = "--use-checkpoint-opt-param-scheduler"
_SCHEDULE = (
    *("train_iters", "train_samples", "lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "lr_warmup_init", "lr_wsd_decay_style"),
    *("lr_wsd_decay_iters", "lr_wsd_decay_samples", "start_weight_decay", "end_weight_decay"),
    *("weight_decay_incr_style", "global_batch_size"),
)
# Not the schedule's: kept by Megatron as they were saved, whatever the flags say.
_ADAM = ("adam_beta1", "adam_beta2", "adam_eps")
_FIXED = ("decoupled_lr", "decoupled_min_lr", "optimizer")


def check_schedule(args: argparse.Namespace) -> None:
    """ValueError for lengths, batch sizes and rates that do not fit together; args as they were given."""
    _check_batch(args)
    if args.skip_train:
        return
    for key in ("train_iters", "train_samples", "lr_decay_iters", "lr_decay_samples", "global_batch_size"):
        if (value := getattr(args, key)) is not None and value < 1:
            more = "; to evaluate only, give --skip-train" if key.startswith("train") else ""
            raise ValueError(f"{_flag(key)}: expected 1 or more, got {value}{more}")
    _check_rates(args)
    check_lengths(args)
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise ValueError(f"--override-opt-param-scheduler and {_KEEP} contradict each other: give one of them")


def _check_batch(args: argparse.Namespace) -> None:
    if args.rampup_batch_size is not None or args.step_batch_size_schedule or args.decrease_batch_size_if_needed:
        return
    model_size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    replicas = max(args.world_size // model_size, 1)
    step = args.micro_batch_size * replicas
    if args.global_batch_size is not None and args.global_batch_size % step:
        below = args.global_batch_size // step * step
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} cannot be shared by {replicas} data-parallel rank(s) at "
            f"--micro-batch-size {args.micro_batch_size}: give a multiple of {step}, as {below or step}"
        )
    samples, batch = args.train_samples, args.global_batch_size or step
    if samples is not None and samples < batch and not args.skip_train:
        raise ValueError(f"--train-samples {samples} is less than one step of {batch} samples: give more")


def _check_rates(args: argparse.Namespace) -> None:
    for key in ("lr", "min_lr", "lr_warmup_init", "weight_decay", "start_weight_decay", "end_weight_decay"):
        if (value := getattr(args, key)) is not None and not value >= 0:
            raise ValueError(f"{_flag(key)}: expected 0 or more, got {value}")
    for key in ("min_lr", "lr_warmup_init"):
        if (value := getattr(args, key)) is not None and args.lr is not None and value > args.lr:
            raise ValueError(f"{_flag(key)} {value} is above --lr {args.lr}: give at most that")
    ends = (args.start_weight_decay, args.end_weight_decay)
    if args.weight_decay_incr_style == "constant":
        if ends != (None, None):
            raise ValueError(
                "--start-weight-decay and --end-weight-decay have no meaning with --weight-decay-incr-style constant: "
                "give --weight-decay, or another style"
            )
    elif None in ends or ends[0] > ends[1]:
        raise ValueError(
            f"--weight-decay-incr-style {args.weight_decay_incr_style}: expected --start-weight-decay and an "
            f"--end-weight-decay that is not below it, got {ends[0]} and {ends[1]}"
        )


def check_lengths(args: argparse.Namespace) -> None:
    """ValueError for a warm-up or decay that does not fit into the schedule, as far as its length is known."""
    unit = "iters" if args.train_iters is not None else "samples"
    length_key = f"lr_decay_{unit}" if getattr(args, f"lr_decay_{unit}") is not None else f"train_{unit}"
    length, warmup = getattr(args, length_key), getattr(args, f"lr_warmup_{unit}")
    if length is None:
        return
    if (share := args.lr_warmup_fraction) is not None and not 0 <= share < 1:
        raise ValueError(f"--lr-warmup-fraction: expected at least 0 and below 1, got {share}")
    if warmup >= length:
        raise ValueError(
            f"--lr-warmup-{unit} {warmup} does not fit into {_flag(length_key)} {length}: give a shorter warm-up"
        )
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise ValueError(f"--lr-decay-style WSD: --lr-wsd-decay-{unit} is missing: give it")


class ResumedFlags:
    """How the flags of a training that resumes differ from those that its checkpoint was saved with.

    lines: about it, for the user. The optimizer's groups are led through Megatron's loading, which knows them by the
    saved rates: before_load, then after_load.
    """

    def __init__(self, args: argparse.Namespace, saved: argparse.Namespace | None):
        """args: validated; override_opt_param_scheduler is set where the schedule changes. saved: None where nothing is
        resumed. ValueError for a change that cannot be made."""
        self._args, self._saved = args, saved
        self.lines: list[str] = []
        if saved is None:
            return
        self._check()
        now, before = _effective(args), _effective(saved)
        changes = [_change(key, before[key], now[key]) for key in now if _differ(before[key], now[key])]
        if changes and args.use_checkpoint_opt_param_scheduler:
            self.lines.append(f"{_KEEP}: the schedule stays as it was saved, without {', '.join(changes)}")
        elif changes:
            args.override_opt_param_scheduler = True
            self.lines.append(f"going on with {', '.join(changes)}; {_KEEP} would keep the schedule that was saved")
        adam = [_change(key, getattr(saved, key), getattr(args, key)) for key in self._changed(_ADAM)]
        if adam:
            self.lines.append(f"going on with {', '.join(adam)}")
        changed = self._changed(
            ("seed", "sft_train", "pack", "seq_length", "sample_length", "long_samples", "data_format")
        )
        data = [_change(key, getattr(saved, key), getattr(args, key)) for key in changed]
        if data:
            self.lines.append(
                f"going on with {', '.join(data)}: the data come in another order from here on, so that some samples "
                "of this epoch may come again and others not"
            )

    def _changed(self, keys: tuple[str, ...]) -> Iterator[str]:
        for key in keys:
            if hasattr(self._saved, key) and _differ(getattr(self._saved, key), getattr(self._args, key)):
                yield key

    def _check(self) -> None:
        args, saved = self._args, self._saved
        for key in self._changed(_FIXED):
            raise ValueError(
                f"--load {args.load} was saved with {_flag(key)} {getattr(saved, key)}, got {getattr(args, key)}: this "
                "cannot be changed on the way: give the same, or take the weights alone with --no-load-optim"
            )
        for key in self._changed(("global_batch_size",)):
            uneven = args.rampup_batch_size is not None or bool(args.step_batch_size_schedule)
            if uneven or args.train_iters is None or args.train_samples is not None:
                raise ValueError(
                    f"--load {args.load} was saved with {_flag(key)} {getattr(saved, key)}, got {getattr(args, key)}: "
                    "it can be changed only where --train-iters counts the steps, all of one size: give the same"
                )
        layout = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        bound = getattr(saved, "use_distributed_optimizer", False) and not (
            getattr(saved, "dist_ckpt_optim_fully_reshardable", False) or getattr(saved, "no_save_optim", False)
        )
        if bound and list(self._changed(layout)):
            sizes = " ".join(f"{_flag(key)} {getattr(saved, key)}" for key in layout)
            raise ValueError(
                f"--load {args.load} was saved without --dist-ckpt-optim-fully-reshardable: its optimizer states load "
                f"at their own layout only: give {sizes}, or take the weights alone with --no-load-optim"
            )

    def before_load(self, optimizer: Any) -> None:
        """The groups by which Megatron finds those of the checkpoint get the rates that are saved there."""
        self._exchange(optimizer, self._args, self._saved)

    def after_load(self, optimizer: Any, scheduler: Any, iteration: int) -> None:
        """The state that was loaded goes on with the flags of this run."""
        args, saved = self._args, self._saved
        if saved is None or optimizer is None or scheduler is None:
            return
        if not args.use_checkpoint_opt_param_scheduler:
            self._exchange(optimizer, saved, args)
        for group in optimizer.param_groups if list(self._changed(_ADAM)) else []:
            if "betas" in group:
                group.update(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_eps)
        if list(self._changed(("global_batch_size",))):
            # Megatron counts in samples, the flags in steps of this many.
            scheduler.num_steps = iteration * args.global_batch_size
            if args.use_checkpoint_opt_param_scheduler:
                for key in ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps"):
                    steps = getattr(scheduler, key) / saved.global_batch_size
                    setattr(scheduler, key, steps * args.global_batch_size)
        scheduler.step(0)

    @staticmethod
    def _exchange(optimizer: Any, old: argparse.Namespace | None, new: argparse.Namespace | None) -> None:
        if optimizer is None or None in (old, new):
            return
        for group in optimizer.param_groups:
            for key, flag in (("max_lr", "lr"), ("min_lr", "min_lr")):
                if group.get(key) == getattr(old, flag):
                    group[key] = getattr(new, flag)


def read_saved(args: argparse.Namespace) -> argparse.Namespace | None:
    """The arguments of the checkpoint from which args resume a training with its optimizer; None where they do not.

    The CPU platform must have been activated."""
    from megatron.core import dist_checkpointing

    alone = args.finetune or args.no_load_optim or args.skip_train
    if alone or args.ckpt_format != "torch_dist" or not launch.has_checkpoint(args.load):
        return None
    directory = checkpoint_directory(args.load, args.ckpt_step)
    if directory.endswith("release"):
        return None
    return dist_checkpointing.load_common_state_dict(directory).get("args")


def samples_to_train(args: argparse.Namespace) -> int:
    """Length of the training data in order that a training needs which has consumed some and goes on to train_iters."""
    return args.consumed_train_samples + (args.train_iters - args.iteration) * args.global_batch_size


def _effective(args: argparse.Namespace) -> dict[str, Any]:
    """The schedule's flags, with what Megatron takes where they are not given."""
    values = {key: getattr(args, key, None) for key in _SCHEDULE}
    for unit in ("iters", "samples"):
        if values[f"lr_decay_{unit}"] == values[f"train_{unit}"]:
            # Said once.
            values[f"lr_decay_{unit}"] = None
    if values["train_samples"] is not None:
        values["train_iters"] = None
    return values


def _differ(before: Any, now: Any) -> bool:
    return before != now and str(before) != str(now)


def _change(key: str, before: Any, now: Any) -> str:
    return f"{_flag(key)} {now} ({before} until now)"


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"
