"""What a training will write, looked at before it starts: folders, room for it, files that the export copies.

One rank does so, before Megatron is initialised; nothing is left behind where it refuses.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtarget_megatron import output_lock
from qtarget_megatron.data import training_sources
from qtarget_megatron.huggingface import Architecture, adapter_numbers, copied_files, export_bytes, hf_tensor_shapes
from qtarget_megatron.huggingface.adapters.peft_directory import adapter_bytes
from qtarget_megatron.megatron.faults.resume_point import newest_iteration
from qtarget_megatron.megatron.runtime.lora_flags import saved_lora
from qtarget_megatron.megatron.training.metrics import check_metrics_file
from qtarget_megatron.resumable import ResumableDirectory

_log = logging.getLogger("qtarget_megatron")
LOCK = ".lock"
_EXPORTED = ".exported.json"
# Bytes of one number, by what --main-params-dtype and its like are called.
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def steps_of(args: argparse.Namespace) -> int:
    """How many steps the training has; 0 where that is not known yet."""
    if args.train_iters:
        return args.train_iters
    return (args.train_samples or 0) // args.global_batch_size if args.global_batch_size else 0


def reserve(args: argparse.Namespace) -> None:
    """Make --save and keep other trainings out of it, until output_lock.release_all(); nothing where it is not given.

    Call it on one rank before anything there is read or changed. ValueError where it cannot be written, or another
    process trains into it.
    """
    if args.save is None or args.skip_train:
        return
    save = Path(args.save)
    if os.path.exists(save) and not save.is_dir():
        raise ValueError(f"--save {save}: expected a directory or a new name, got a file: choose another")
    output_lock.claim(save / LOCK, f"--save {save}")


def check_outputs(args: argparse.Namespace, student: Architecture, iteration: int | None) -> bool:
    """Whether nothing is left to do: all steps are trained, and --save-hf holds their export.

    iteration: that the training continues from. Otherwise ValueError where --save-hf cannot be written, or a file that
    it copies not be read, or where there is no room for one checkpoint and the export. Warns where there is
    not enough for all checkpoints.
    """
    if is_exported(args, iteration):
        return True
    if args.save_hf is not None:
        if not _is_adapters(args):
            copied_files(args.hf_model)
        directory = ResumableDirectory(args.save_hf)
        directory.check()
        directory.reserve()
    _check_room(args, student, iteration or 0)
    return False


def check_board(args: argparse.Namespace) -> None:
    """ValueError where --tensorboard-dir, --metrics-jsonl or Weights & Biases cannot log. Call it on the last rank,
    which does."""
    if args.metrics_jsonl is not None:
        check_metrics_file(args.metrics_jsonl)
    if args.tensorboard_dir:
        folder = Path(args.tensorboard_dir)
        if os.path.exists(folder) and not folder.is_dir():
            raise ValueError(f"--tensorboard-dir {folder}: expected a directory or a new name, got a file")
        output_lock.probe(folder, f"--tensorboard-dir {folder}")
    if args.wandb_project:
        _check_wandb(args)


def _check_wandb(args: argparse.Namespace) -> None:
    flag = f"--wandb-project {args.wandb_project}"
    if not args.wandb_exp_name:
        raise ValueError(f"{flag} needs the name of the run: give --wandb-exp-name NAME")
    if not args.tensorboard_dir:
        raise ValueError(f"{flag}: Megatron logs there only what it writes to TensorBoard: give --tensorboard-dir DIR")
    if not (args.wandb_save_dir or args.save):
        raise ValueError(f"{flag} needs a folder for its files: give --wandb-save-dir DIR or --save DIR")
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"{flag} needs the package wandb: pip install wandb ({error})") from error
    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return
    if not getattr(getattr(wandb, "api", None), "api_key", "unknown to this version"):
        raise ValueError(
            f"{flag}: this machine is not logged in: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
        )


# ---- room


def checkpoint_bytes(args: argparse.Namespace, student: Architecture) -> int:
    """Bytes of one checkpoint, at least: weights, or adapters alone, and the optimizer's states of each."""
    numbers = sum(map(math.prod, hf_tensor_shapes(student).values()))
    if (lora := saved_lora(args)) is not None:
        numbers = adapter_numbers(student, lora)
    weight = 2 if args.bf16 or args.fp16 else 4
    if args.no_save_optim:
        return numbers * weight
    states = 2 if args.optimizer == "adam" else int(args.optimizer != "sgd" or args.sgd_momentum != 0)
    state, main = [4] * states, 4 if weight < 4 else 0
    if args.use_precision_aware_optimizer:
        state = [_number_bytes(args.exp_avg_dtype), _number_bytes(args.exp_avg_sq_dtype)][:states]
        main = min(main, _number_bytes(args.main_params_dtype))
    return numbers * (weight + main + sum(state))


def _number_bytes(dtype: str | torch.dtype) -> int:
    return dtype.itemsize if isinstance(dtype, torch.dtype) else _BYTES.get(dtype, 1)


def checkpoints_to_come(args: argparse.Namespace, iteration: int) -> int:
    """How many checkpoints there will be besides those that are there; of those that are deleted again none."""
    steps = steps_of(args)
    interval = args.save_retain_interval or args.save_interval
    if args.save is None or args.skip_train or iteration >= steps > 0:
        return 0
    count = max(steps // interval - iteration // interval + (steps % interval != 0), 1) if steps else 1
    # The last one stays until the next is written.
    return count + 1 if args.save_retain_interval and args.save_retain_interval != args.save_interval else count


def _check_room(args: argparse.Namespace, student: Architecture, iteration: int) -> None:
    count = checkpoints_to_come(args, iteration)
    items = []
    if count:
        items.append(Item("--save", Path(args.save), checkpoint_bytes(args, student), count))
    if args.save_hf is not None:
        lora, folder = saved_lora(args), Path(args.save_hf).absolute().parent
        if _is_adapters(args):
            own = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
            dtype = getattr(torch, args.save_hf_dtype) if args.save_hf_dtype else own
            items.append(Item("--save-hf", folder, adapter_bytes(student, lora, dtype)))
        else:
            dtype = getattr(torch, args.save_hf_dtype) if args.save_hf_dtype else student.dtype
            items.append(Item("--save-hf", folder, export_bytes(student, dtype)))
    if warning := check_room(items):
        _log.warning(warning)


@dataclass(frozen=True)
class Item:
    """What will be written below a folder: count times so many bytes; flag: that names it."""

    flag: str
    folder: Path
    nbytes: int
    count: int = 1


def check_room(items: Iterable[Item]) -> str | None:
    """A warning where a disk holds each item once, but not as often as it comes. ValueError where not even that."""
    disks: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        disks[item.folder.stat().st_dev].append(item)
    warning = None
    for on_disk in disks.values():
        free = shutil.disk_usage(on_disk[0].folder).free
        once, all_of_them = sum(i.nbytes for i in on_disk), sum(i.nbytes * i.count for i in on_disk)
        if once > free:
            what = " and ".join(f"{_gigabytes(i.nbytes)} for {i.flag} {i.folder}" for i in on_disk)
            raise ValueError(
                f"expected room for {what}, found {_gigabytes(free)} free: make room, or write to another disk"
            )
        if all_of_them > free:
            many = next(i for i in on_disk if i.count > 1)
            fit = 1 + (free - once) // many.nbytes
            warning = (
                f"{many.flag} {many.folder}: {many.count} checkpoints of {_gigabytes(many.nbytes)} are to come, there "
                f"is room for {fit}: raise --save-interval, give --save-retain-interval, or make room meanwhile"
            )
    return warning


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


# ---- an export that is complete


def record_export(args: argparse.Namespace, digests: Mapping[str, str]) -> None:
    """Note beside the checkpoints which of them --save-hf was made from, and its files with their digests."""
    if args.save is None:
        return
    out = Path(args.save_hf).absolute()
    record = {
        "--save-hf": str(out.resolve()),
        "--save-hf-dtype": args.save_hf_dtype,
        "--lora-merge": args.lora_merge,
        "iteration": newest_iteration(args.save),
        "end": args.end,
        "files": {name: [(out / name).stat().st_size, digest] for name, digest in digests.items()},
    }
    path, new = Path(args.save) / _EXPORTED, Path(args.save) / f"{_EXPORTED}.new"
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def end_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the last step of --epochs follows from; None where steps are given."""
    if args.epochs is None:
        return None
    keys = ("epochs", "data_digest", "global_batch_size", "seed", "pack", "long_samples")
    rows = {"sample": args.sample_length or args.seq_length, "row": args.max_tokens_per_row or args.seq_length}
    weights = [source.weight for source in training_sources(args.sft_train)]
    return {key: getattr(args, key) for key in keys} | rows | {"weights": weights}


def _is_adapters(args: argparse.Namespace) -> bool:
    """Whether --save-hf becomes a PEFT directory."""
    return args.lora_rank is not None and not args.lora_merge


def is_exported(args: argparse.Namespace, iteration: int | None) -> bool:
    """Whether --save-hf holds what record_export() noted of this very iteration, by names and sizes, and the training
    ends there."""
    if None in (args.save, args.save_hf, iteration) or args.skip_train or args.finetune:
        return False
    if args.epochs is None and not 0 < steps_of(args) <= iteration:
        return False
    out = Path(args.save_hf).absolute()
    try:
        record = json.loads((Path(args.save) / _EXPORTED).read_text(encoding="utf-8"))
        expected = {name: size for name, (size, _) in record["files"].items()}
        same = (record["--save-hf"], record["--save-hf-dtype"], record["iteration"]) == (
            str(out.resolve()),
            args.save_hf_dtype,
            iteration,
        )
        same = same and record.get("--lora-merge", False) == args.lora_merge
        if args.epochs is not None:
            same = same and record["end"] == args.end
        found = {p.relative_to(out).as_posix(): p.stat().st_size for p in out.rglob("*") if p.is_file()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return same and bool(expected) and found == expected
