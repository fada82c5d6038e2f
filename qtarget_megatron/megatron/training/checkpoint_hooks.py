"""What happens around Megatron's saving and loading of checkpoints in a training."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron.core.models.common.language_module.language_module import LanguageModule

from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.megatron.runtime.launch import has_checkpoint
from qtarget_megatron.megatron.runtime.ranks import on_first_rank
from qtarget_megatron.megatron.runtime.wheel_repairs import around_checkpoints
from qtarget_megatron.megatron.training.resume_flags import ResumedFlags
from qtarget_megatron.megatron.weights.adapters import check_base, record_base
from qtarget_megatron.megatron.weights.checkpoint_folder import checkpoint_directory, saved_argument
from qtarget_megatron.megatron.weights.fingerprint import Fingerprints, saved_fingerprint

_log = logging.getLogger("qtarget_megatron")


def watch_checkpoints(
    args: argparse.Namespace,
    arch: Architecture,
    chunks: Sequence[LanguageModule],
    flags: ResumedFlags,
) -> None:
    """Have every checkpoint of the training saved with its fingerprint, and compared with it when it is loaded.

    chunks: of this rank, without wrappers; the list is filled before Megatron loads. flags: what they change in what is
    loaded. Checkpoints of adapters belong to the weights that they were trained beside.
    """
    prints = Fingerprints(args, arch)
    known = args.ckpt_format == "torch_dist" and not (args.use_megatron_fsdp or args.use_torch_fsdp2)
    if not known and (args.save is not None or has_checkpoint(args.load)):
        _log.info(
            "checkpoints of --ckpt-format %s have no fingerprint: what is loaded is not compared with what was saved",
            args.ckpt_format,
        )

    def save(proceed, optimizer):
        if chunks[0].adapters is not None:
            record_base(args, arch, chunks)
        if known:
            prints.record(chunks, optimizer)
        return proceed()

    def load(proceed, optimizer, scheduler):
        flags.before_load(optimizer)
        if chunks[0].adapters is not None and has_checkpoint(args.load):
            folder = checkpoint_directory(args.load, args.ckpt_step)
            base = on_first_rank(lambda: saved_argument(Path(folder), "lora_base"))
            check_base(args, arch, chunks, base, f"--load {args.load}")
        keeps_teacher = chunks[0].keeps_teacher
        if keeps_teacher and has_checkpoint(args.load):
            folder = checkpoint_directory(args.load, args.ckpt_step)
            refresh = on_first_rank(lambda: saved_argument(Path(folder), "objective_refresh"))
            if not refresh:
                _log.info("%s holds no model of an earlier step: it is taken from the first step on", folder)
            for chunk in chunks:
                chunk.keeps_teacher = bool(refresh)
        try:
            iteration, operations = proceed()
        except AssertionError as error:
            if "per_bucket_numel" not in str(error) and "elements in each bucket" not in str(error):
                raise
            raise ValueError(
                f"--load {args.load} was saved without --dist-ckpt-optim-fully-reshardable: its optimizer states load "
                "at their own number of data-parallel ranks only: start as many, or take the weights alone with "
                "--no-load-optim"
            ) from error
        for chunk in chunks:
            chunk.keeps_teacher = keeps_teacher
        flags.after_load(optimizer, scheduler, iteration)
        if known and has_checkpoint(args.load):
            directory = checkpoint_directory(args.load, args.ckpt_step)
            if args.finetune or args.no_load_optim:
                saved, _ = on_first_rank(lambda: saved_fingerprint(directory))
                prints.compare_weights(chunks, saved, directory)
            else:
                prints.compare(chunks, optimizer, directory)
        return iteration, operations

    around_checkpoints(save, load)
