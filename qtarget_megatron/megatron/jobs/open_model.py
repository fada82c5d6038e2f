"""A model in Megatron, without optimizer and data, from a Hugging Face directory or a Megatron checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from qtarget_megatron.huggingface import Architecture, HFReader, further_reader
from qtarget_megatron.megatron.runtime import launch, wheel_repairs
from qtarget_megatron.megatron.runtime.architecture_flags import (
    record_architecture,
)
from qtarget_megatron.megatron.runtime.layout_checks import check_experts, check_layout, check_whole_stages
from qtarget_megatron.megatron.runtime.lora_flags import saved_lora
from qtarget_megatron.megatron.runtime.prepare import Purpose, Run, prepare
from qtarget_megatron.megatron.runtime.progress import Progress
from qtarget_megatron.megatron.weights.saved_model import SavedModel

if TYPE_CHECKING:
    from megatron.core.models.common.language_module.language_module import LanguageModule


# Every parameter is filled afterwards, so Megatron need not draw random ones.
_FROZEN = Purpose(flags=("--no-initialization",), refused=("--save", "--load", "--mtp-num-layers"))


@dataclass(frozen=True)
class OpenModel:
    """This rank's part of a model in Megatron, without optimizer and data.

    run:     what was asked for, with Megatron's arguments, which Megatron has completed.
    chunks:  the bare models, one for each virtual pipeline stage.
    wrapped: the same, as Megatron's loops take them.
    """

    run: Run
    chunks: list[LanguageModule]
    wrapped: list[torch.nn.Module]

    @property
    def args(self) -> argparse.Namespace:
        return self.run.args

    @property
    def arch(self) -> Architecture:
        return self.run.student


def open_model(
    hf_model: Path,
    words: list[str],
    *,
    load: Path | None = None,
    save: Path | None = None,
    dtype: torch.dtype | None = None,
    seq_length: int | None = None,
    reference: Path | None = None,
    further: bool = False,
    cpu: bool = False,
    progress: str | None = None,
) -> OpenModel:
    """Initialise Megatron and build the model of hf_model's config.json; call it on every rank.

    words:      Megatron flags, layout above all.
    load:       take the weights from this Megatron checkpoint, not from hf_model; of one of adapters those, beside the
                weights of hf_model.
    save:       where Megatron shall save.
    dtype:      of the parameters, where words hold neither --bf16 nor --fp16; default the checkpoint's, else float32.
    seq_length: cut to what the model and the layout allow.
    reference:  Hugging Face directory of a second, frozen model over the same vocabulary, stacked on the first: each
                chunk's teacher.
    further:    with the layers that predict further tokens, where the weights are there.
    cpu:        insist on the CPU.

    Runs under torchrun or as a single process. ValueError for bad input. Collectives: those of Megatron's
    initialisation and loading, and object gathers of tensor names.
    """
    run = prepare(words, _FROZEN, hf_model=Path(hf_model), cpu=cpu)
    args, saved = run.args, None
    if load is not None:
        args.load, args.finetune, args.exit_on_missing_checkpoint = str(load), True, True
        saved = SavedModel.read(args.load, args.ckpt_step)
        dtype = dtype or saved.dtype
        run.lora = saved_lora(saved.args)
        if run.lora is not None:
            # The checkpoint has the adapters alone.
            run.check_weights()
        if further and run.student.further_layers and saved.has_further and not run.take_further():
            raise ValueError(
                f"--load {load} has layers that predict further tokens, for which a HybridModel has no place: drop "
                "--model-class hybrid"
            )
    else:
        if further and further_reader(run.hf_model, run.student) is not None:
            run.take_further()
        run.check_weights("a HybridModel has none" if further else None)
    _complete(run, save, dtype, seq_length)
    if reference is not None:
        run.add_teacher(reference, "--reference-hf")
        if run.teacher.vocab_size != run.student.vocab_size:
            raise ValueError(
                f"--reference-hf {reference} has a vocabulary of {run.teacher.vocab_size}, --hf-model one of "
                f"{run.student.vocab_size}: log-probabilities are compared over one vocabulary, use a model of the "
                "same size"
            )
        args.teacher_hf = str(reference)

    wheel_repairs.repair_megatron_wheel()
    launch.initialize(args)
    return _build(run, saved, progress)


def _complete(run: Run, save: Path | None, dtype: torch.dtype | None, seq_length: int | None) -> None:
    """Check the layout, and set what Megatron requires and a conversion does not depend on."""
    args, arch = run.args, run.student
    if args.ckpt_format != "torch_dist" or args.async_save:
        raise ValueError("expected --ckpt-format torch_dist without --async-save: drop those flags")
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ranks = tp * pp * args.context_parallel_size
    limit = arch.max_sequence_length
    length = min(seq_length or limit, args.seq_length or limit)
    args.seq_length = length - length % tp if args.sequence_parallel else length
    check_layout(args, arch, "model")
    check_experts(args, arch, "model")
    check_whole_stages(args, arch, "model")
    if args.world_size % ranks != 0:
        raise ValueError(
            f"expected a multiple of {ranks} processes for tensor x pipeline x context parallel = {tp} "
            f"x {pp} x {args.context_parallel_size}, got {args.world_size}: start with torchrun "
            f"--nproc-per-node {ranks}"
        )
    args.micro_batch_size = args.micro_batch_size or 1
    record_architecture(args, arch)
    args.hf_model = str(run.hf_model)
    args.save = None if save is None else str(save)
    args.save_interval = args.save_interval or 1
    args.no_save_optim = args.no_save_rng = args.no_load_optim = args.no_load_rng = True
    if not (args.bf16 or args.fp16):
        args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16


def _build(run: Run, saved: SavedModel | None, progress: str | None) -> OpenModel:
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model

    from qtarget_megatron.megatron.model.build import ModelProvider
    from qtarget_megatron.megatron.weights.adapters import check_base
    from qtarget_megatron.megatron.weights.hf_weights import load_hf_weights, weights

    args, arch = run.args, run.student
    # A single process needs no address to meet the others at.
    initialize_megatron(store=dist.HashStore() if args.world_size == 1 else None)
    provider = ModelProvider(args, arch, run.teacher, load_weights=run.lora is not None, lora=run.lora)
    wrapped = get_model(provider, wrap_with_ddp=False)
    if saved is not None:
        saved.check_fits(provider.built, arch, f"the model in {args.hf_model}")
        saved.load_into(provider.built, args, arch)
        if run.lora is not None:
            check_base(args, arch, provider.built, getattr(saved.args, "lora_base", None), f"--load {args.load}")
    else:
        total = sum(tensor.nbytes for chunk in provider.built for _, tensor in weights(chunk, arch))
        report = Progress(progress, total, unit="GB", scale=1e9).add if progress else lambda nbytes: None
        with HFReader(args.hf_model) as reader:
            for chunk in provider.built:
                load_hf_weights(chunk, reader, arch, report)
    return OpenModel(run, provider.built, wrapped)
