"""Whole models between Hugging Face directories and Megatron's distributed checkpoints (torch_dist).

The checkpoints are written and read by Megatron's own save_checkpoint and load_checkpoint, at any
parallel layout. Imports of Megatron wait until the CPU platform is active, which open_model does.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from qtarget_megatron import output_lock
from qtarget_megatron.checkpoint import (
    CORRECTION,
    Architecture,
    HFReader,
    check_tensors,
    copied_files,
    hf_tensor_shapes,
    read_config,
)
from qtarget_megatron.data import compare_tokenizers, load_tokenizer
from qtarget_megatron.megatron import cpu_platform, launch, wheel_repairs
from qtarget_megatron.megatron.arguments import (
    check_experts,
    check_flags,
    check_layout,
    check_whole_stages,
    implementation_flags,
)
from qtarget_megatron.megatron.commands import is_first_rank, on_first_rank
from qtarget_megatron.megatron.gpu_flags import check_gpu_flags
from qtarget_megatron.megatron.progress import Progress
from qtarget_megatron.megatron.saved_model import SavedModel, checkpoint_directory
from qtarget_megatron.megatron.shape import megatron_flags, record_architecture
from qtarget_megatron.resumable import ResumableDirectory, check_space, directory_digest

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True)
class OpenModel:
    """This rank's part of a model in Megatron, without optimizer and data.

    chunks: the bare GPT models, one for each virtual pipeline stage. wrapped: the same, as
    Megatron's loops take them.
    """

    args: argparse.Namespace
    arch: Architecture
    chunks: list[GPTModel]
    wrapped: list[torch.nn.Module]


def import_hf(hf_model: Path, save: Path, words: list[str], *, cpu: bool = False) -> None:
    """Hugging Face directory to Megatron checkpoint; call it on every rank.

    words: Megatron flags. The weights keep the widest dtype found in the directory, unless words
    hold --bf16 or --fp16. The checkpoint is a "release": it starts a training at iteration 0,
    without optimizer and random state. It appears under its name when it is complete; what an interrupted
    import left in the hidden folder beside it is replaced. ValueError for bad input, before anything is written.
    """
    directory = ResumableDirectory(save)
    directory.check()
    dtype = widest_dtype(hf_model)
    if is_first_rank():
        directory.reserve()
        element = 2 if {"--bf16", "--fp16"}.intersection(words) else dtype.itemsize
        numbers = sum(math.prod(shape) for shape in hf_tensor_shapes(Architecture.from_hf(hf_model)).values())
        check_space(Path(save).absolute().parent, numbers * element)
    model = open_model(hf_model, words, save=directory.folder, dtype=dtype, cpu=cpu, progress="import: reading")
    from megatron.training.checkpointing import save_checkpoint

    from qtarget_megatron.megatron.fingerprint import Fingerprints

    def begin() -> None:
        directory.open()
        values = sum(math.prod(shape) for shape in hf_tensor_shapes(model.arch).values())
        check_space(directory.folder, values * model.args.params_dtype.itemsize)

    on_first_rank(begin)
    for chunk in model.chunks:
        chunk.sharded_state_dict = partial(_without_views, chunk.sharded_state_dict)
    Fingerprints(model.args, model.arch).record(model.chunks, None)
    launch.prepare_saves()
    save_checkpoint(0, model.wrapped, None, None, 0, release=True)
    on_first_rank(directory.finish)


def _without_views(sharded_state_dict: Callable[..., dict], *arguments: Any, **keywords: Any) -> dict:
    """A chunk's sharded state, to be saved: tensors that are part of a larger one become ones of their own, in the same
    memory. Megatron would copy them, all at once: the two halves of every gated layer."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = sharded_state_dict(*arguments, **keywords)
    apply_factories(state)
    for sharded in nested_values(state):
        if isinstance(sharded, ShardedTensor) and sharded.data is not None and sharded.data.device.type == "cpu":
            data = sharded.data.detach()
            if data.is_contiguous() and data.numel():
                alias = torch.from_numpy(data.view(-1).view(torch.uint8).numpy())
                sharded.data = alias.view(data.dtype).view(data.shape)
    return state


def export_hf(
    hf_model: Path, load: Path, save_hf: Path, words: list[str], *, checksums: Path | None = None, cpu: bool = False
) -> None:
    """Megatron checkpoint to Hugging Face directory; call it on every rank.

    hf_model: config.json says the architecture, tokenizer files are copied; its weights are not
    read. The tensors keep the checkpoint's dtype, unless words hold --bf16 or --fp16. Of an interrupted export of the
    same checkpoint at as many pipeline stages the complete files are kept. checksums: a file for the SHA-256 of each
    file, as sha256sum writes them. ValueError for bad input, before anything is written.
    """
    if checksums is not None and not checksums.absolute().parent.is_dir():
        raise ValueError(f"--checksums {checksums}: there is no directory {checksums.parent}: create it")
    read_config(hf_model)
    made_from = {"--hf-model": directory_digest(hf_model)}
    copied_files(hf_model)
    directory = ResumableDirectory(save_hf, made_from)
    directory.check()
    if is_first_rank():
        directory.reserve()
        if checksums is not None:
            output_lock.probe(checksums.absolute().parent, f"--checksums {checksums}")
    model = open_model(hf_model, words, load=load, cpu=cpu)
    from qtarget_megatron.megatron.hf_weights import save_hf_weights

    made_from |= {"--load": directory_digest(Path(checkpoint_directory(load, model.args.ckpt_step)))}

    def progress(total: int):
        return Progress("export: writing", total, unit="GB", scale=1e9).add

    digests = save_hf_weights(
        model.chunks,
        model.arch,
        Path(hf_model),
        Path(save_hf),
        dtype=model.args.params_dtype,
        made_from=made_from,
        progress=progress,
    )
    if checksums is not None and dist.get_rank() == 0:
        checksums.write_text("".join(f"{digest}  {file}\n" for file, digest in digests.items()), encoding="utf-8")


def open_model(
    hf_model: Path,
    words: list[str],
    *,
    load: Path | None = None,
    save: Path | None = None,
    dtype: torch.dtype | None = None,
    seq_length: int | None = None,
    reference: Path | None = None,
    cpu: bool = False,
    progress: str | None = None,
) -> OpenModel:
    """Initialise Megatron and build the model of hf_model's config.json; call it on every rank.

    words: Megatron flags, layout above all. load: take the weights from this Megatron checkpoint,
    not from hf_model. save: where Megatron shall save. dtype: of the parameters, where words hold
    neither --bf16 nor --fp16; default the checkpoint's, else float32. seq_length: cut to what the
    model and the layout allow. reference: Hugging Face directory of a second, frozen model over the
    same vocabulary, stacked on the first: each chunk's teacher. cpu: insist on the CPU. Runs under
    torchrun or as a single process. ValueError for bad input. Collectives: those of Megatron's
    initialisation and loading, and object gathers of tensor names.
    """
    launch.check_version()
    launch.check_launcher()
    on_cpu = cpu_platform.activate(requested=cpu)
    arch = Architecture.from_hf(hf_model)
    arch_flags = megatron_flags(arch)
    check_flags(words, arch_flags)
    _refuse(words, "--save", "--load")
    # Every parameter is filled afterwards, so Megatron need not draw random ones.
    flags = [*arch_flags, *implementation_flags(on_cpu=on_cpu), "--no-initialization", *words]
    args = launch.parse_arguments(flags, lambda parser: parser)
    check_gpu_flags(words, args, on_cpu=on_cpu)
    saved = None
    if load is not None:
        args.load, args.finetune, args.exit_on_missing_checkpoint = str(load), True, True
        saved = SavedModel.read(args.load, args.ckpt_step)
        dtype = dtype or saved.dtype
    else:
        check_tensors(HFReader(hf_model), arch)
    _complete(args, arch, hf_model, save, dtype, seq_length)
    second = None
    if reference is not None:
        second = check_second_model(args, load_model_tokenizer(hf_model, arch), reference, "--reference-hf")
        if second.vocab_size != arch.vocab_size:
            raise ValueError(
                f"--reference-hf {reference} has a vocabulary of {second.vocab_size}, --hf-model one of "
                f"{arch.vocab_size}: log-probabilities are compared over one vocabulary, use a model of the same size"
            )
        args.teacher_hf = str(reference)

    wheel_repairs.repair_megatron_wheel()
    launch.initialize(args)
    return _build(args, arch, second, saved, progress)


def widest_dtype(hf_model: Path) -> torch.dtype:
    """The dtype that holds every weight of the directory exactly: the common one, float32 where they differ."""
    reader = HFReader(hf_model)
    apart = ("rotary_emb.inv_freq", CORRECTION)
    return _common({reader.dtype(name) for name in reader.names if not name.endswith(apart)})


def _common(dtypes: set[torch.dtype]) -> torch.dtype:
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def text_tokens(hf_model: Path, text: Path | str) -> list[int]:
    """Token ids of a text, or of a UTF-8 file where text is a Path, by the tokenizer of hf_model.

    ValueError for a file that cannot be read, a text without tokens, and a tokenizer of another
    model.
    """
    if isinstance(text, Path):
        try:
            text = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{text}: expected a UTF-8 text file, got: {error}") from None
    vocab_size = Architecture.from_hf(hf_model).vocab_size
    tokens = load_tokenizer(hf_model)(text)["input_ids"]
    if not tokens:
        raise ValueError("expected a text with at least one token, got an empty one: give another file")
    if max(tokens) >= vocab_size:
        raise ValueError(
            f"{hf_model}: expected token ids below the vocabulary's {vocab_size}, got {max(tokens)} "
            "from the tokenizer: config.json and tokenizer do not belong together"
        )
    return tokens


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


def check_second_model(
    args: argparse.Namespace, tokenizer: Any, directory: Path, flag: str, *, with_weights: bool = True
) -> Architecture:
    """The architecture of a second model to stack on the first, given by flag; of its weights headers only.

    tokenizer: the first model's. Embeddings may be padded to different sizes, and the number of layers need not suit
    the stages. with_weights: the directory holds them. ValueError where tensor parallelism cannot cut the second model
    as well, or where a token id means different tokens.
    """
    second = Architecture.from_hf(directory)
    check_layout(args, second, f"model of {flag}")
    check_experts(args, second, f"model of {flag}")
    if with_weights:
        check_tensors(HFReader(directory), second)
    compare_tokenizers(tokenizer, load_tokenizer(directory))
    return second


def _refuse(words: list[str], *flags: str) -> None:
    given = sorted({word.partition("=")[0] for word in words}.intersection(flags))
    if given:
        raise ValueError(f"{', '.join(given)} has no meaning for this command: drop it")


def _complete(args: argparse.Namespace, arch: Architecture, hf_model, save, dtype, seq_length) -> None:
    """Check the layout, and set what Megatron requires and a conversion does not depend on."""
    if args.ckpt_format != "torch_dist" or args.async_save:
        raise ValueError("expected --ckpt-format torch_dist without --async-save: drop those flags")
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ranks = tp * pp * args.context_parallel_size
    limit = arch.max_position_embeddings
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
    args.hf_model = str(hf_model)
    args.save = None if save is None else str(save)
    args.save_interval = args.save_interval or 1
    args.no_save_optim = args.no_save_rng = args.no_load_optim = args.no_load_rng = True
    if not (args.bf16 or args.fp16):
        args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16


def _build(
    args: argparse.Namespace,
    arch: Architecture,
    second: Architecture | None,
    saved: SavedModel | None,
    progress: str | None,
) -> OpenModel:
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model

    from qtarget_megatron.megatron.hf_weights import load_hf_weights, weights
    from qtarget_megatron.megatron.model import ModelProvider

    # A single process needs no address to meet the others at.
    initialize_megatron(store=dist.HashStore() if args.world_size == 1 else None)
    provider = ModelProvider(args, arch, second, load_weights=False)
    wrapped = get_model(provider, wrap_with_ddp=False)
    if saved is not None:
        saved.check_fits(provider.built, arch, f"the model in {args.hf_model}")
        saved.load_into(provider.built, args, arch)
    else:
        total = sum(tensor.nbytes for chunk in provider.built for _, tensor in weights(chunk))
        report = Progress(progress, total, unit="GB", scale=1e9).add if progress else lambda nbytes: None
        with HFReader(args.hf_model) as reader:
            for chunk in provider.built:
                load_hf_weights(chunk, reader, arch, report)
    return OpenModel(args, arch, provider.built, wrapped)
