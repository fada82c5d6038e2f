"""Whole models between Hugging Face directories and Megatron's distributed checkpoints (torch_dist).

The checkpoints are written and read by Megatron's own save_checkpoint and load_checkpoint, at any
parallel layout. Imports of Megatron wait until the CPU platform is active, which open_model does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qtarget_megatron import output_lock
from qtarget_megatron.data import load_tokenizer
from qtarget_megatron.huggingface import (
    CORRECTION,
    Architecture,
    HFReader,
    copied_files,
    further_reader,
    hf_tensor_shapes,
    read_config,
)
from qtarget_megatron.megatron.jobs.open_model import open_model
from qtarget_megatron.megatron.runtime import launch, logs
from qtarget_megatron.megatron.runtime.logs import is_first_rank
from qtarget_megatron.megatron.runtime.progress import Progress
from qtarget_megatron.megatron.runtime.ranks import on_first_rank
from qtarget_megatron.megatron.weights.checkpoint_folder import checkpoint_directory
from qtarget_megatron.resumable import ResumableDirectory, check_space, directory_digest

_log = logs.of("export")


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
        arch = Architecture.from_hf(hf_model)
        arch = arch if further_reader(hf_model, arch) is None else arch.with_further()
        numbers = sum(math.prod(shape) for shape in hf_tensor_shapes(arch).values())
        check_space(Path(save).absolute().parent, numbers * element)
    model = open_model(
        hf_model, words, save=directory.folder, dtype=dtype, further=True, cpu=cpu, progress="import: reading"
    )
    from megatron.training.checkpointing import save_checkpoint

    from qtarget_megatron.megatron.weights.fingerprint import Fingerprints

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
    hf_model: Path,
    load: Path,
    save_hf: Path,
    words: list[str],
    *,
    merge: bool = False,
    checksums: Path | None = None,
    cpu: bool = False,
) -> None:
    """Megatron checkpoint to Hugging Face directory, one of adapters to a PEFT directory; call it on every rank.

    hf_model: config.json says the architecture, tokenizer files are copied; its weights are not
    read, but for layers that predict further tokens where the checkpoint has none. The tensors keep the checkpoint's
    dtype, unless words hold --bf16 or --fp16. Of an interrupted export of the same checkpoint at as many pipeline
    stages the complete files are kept. merge: add the adapters to the weights of hf_model, and export the whole model.
    checksums: a file for the SHA-256 of each file, as sha256sum writes them. ValueError for bad input, before anything
    is written.
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
    model = open_model(hf_model, words, load=load, further=True, cpu=cpu)
    from qtarget_megatron.megatron.model.lora import merge_adapters
    from qtarget_megatron.megatron.weights.adapters import record_base, save_adapters
    from qtarget_megatron.megatron.weights.hf_weights import save_hf_weights

    arch, reader, lora, dtype = model.arch, None, model.run.lora, model.args.params_dtype
    if merge and lora is None:
        raise ValueError(f"--lora-merge: --load {load} holds a whole model, no adapters: drop the flag")
    if not arch.has_further:
        reader = further_reader(hf_model, arch)
        arch = arch if reader is None else arch.with_further()
        if arch.further_layers:
            _log.warning(
                "%s has no layers that predict further tokens: %s",
                load,
                f"those of {hf_model} are copied" if reader else f"nor has {hf_model}: the export has none either",
            )

    made_from |= {"--load": directory_digest(Path(checkpoint_directory(load, model.args.ckpt_step)))}

    def progress(total: int):
        return Progress("export: writing", total, unit="GB", scale=1e9).add

    made_from["--lora-merge"] = str(merge)
    if lora is not None and not merge:
        base = record_base(model.args, arch, model.chunks)
        digests = save_adapters(
            model.chunks, arch, lora, Path(save_hf), dtype, base=base, base_name=str(hf_model), made_from=made_from
        )
    else:
        for chunk in model.chunks if merge else ():
            merge_adapters(chunk)
        digests = save_hf_weights(
            model.chunks,
            arch,
            Path(hf_model),
            Path(save_hf),
            dtype=dtype,
            made_from=made_from,
            further=reader,
            progress=progress,
        )
    if checksums is not None and dist.get_rank() == 0:
        checksums.write_text("".join(f"{digest}  {file}\n" for file, digest in digests.items()), encoding="utf-8")


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
