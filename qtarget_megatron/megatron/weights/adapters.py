"""Adapters' factors in Megatron's models: filled from Hugging Face's, exported as a PEFT directory, and the model that
they belong to."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from qtarget_megatron.huggingface import (
    Architecture,
    Factors,
    Lora,
    is_expert,
    load_factor,
    merge_factor,
)
from qtarget_megatron.huggingface.adapters import peft_directory
from qtarget_megatron.megatron.runtime.ranks import on_first_rank
from qtarget_megatron.megatron.weights.fingerprint import weights_digest
from qtarget_megatron.megatron.weights.hf_weights import adapters, first_indices, shard_group, tensor_share
from qtarget_megatron.resumable import ResumableDirectory

_log = logging.getLogger("qtarget_megatron")
Base = tuple[str, str]


def load_adapters(model: LanguageModule, arch: Architecture, lora: Lora, factors: Factors) -> None:
    """Fill the adapters of one pipeline stage, each rank with its shards. ValueError where a factor has another
    shape."""
    offsets = first_indices(model, arch)
    for name, parameter in adapters(model):
        rank, size = tensor_share(model, arch, name, parameter)
        values = load_factor(factors, arch, lora, name, **offsets, tp_rank=rank, tp_size=size)
        if values.shape != parameter.shape:
            raise ValueError(f"{name} is {list(parameter.shape)} on this rank, but was given {list(values.shape)}")
        parameter.detach().copy_(values)


def record_base(args: argparse.Namespace, arch: Architecture, chunks: Sequence[LanguageModule]) -> Base:
    """(SHA-256, dtype) of the weights that the adapters are beside, which args hold from now on, and so checkpoints.

    Collective over all ranks; it reads every weight once. chunks: of this rank, without wrappers.
    """
    if getattr(args, "lora_base", None) is None:
        args.lora_base = weights_digest(args, arch, chunks)
    return args.lora_base


def check_base(
    args: argparse.Namespace, arch: Architecture, chunks: Sequence[LanguageModule], expected: Base | None, where: str
) -> None:
    """ValueError on every rank where adapters were trained beside other weights than the model's; collective.

    expected: (SHA-256, dtype) of those, None where it is not known. where: the adapters lie, for messages.
    """
    found = None
    if expected is not None:
        own = record_base(args, arch, chunks)
        found = own if own[1] == expected[1] else weights_digest(args, arch, chunks, expected[1])
    if found is None:
        dtype = "" if expected is None else f" in {expected[1].removeprefix('torch.')}, which this run does not hold"
        _log.info("%s does not say which model its adapters belong to%s: it was not compared", where, dtype)
    elif found[0] != expected[0]:
        raise ValueError(
            f"{where}: its adapters were trained on other weights than those of --hf-model {args.hf_model}: give the "
            "model that they belong to"
        )


def save_adapters(
    models: Sequence[LanguageModule],
    arch: Architecture,
    lora: Lora,
    out: Path,
    dtype: torch.dtype,
    *,
    base: Base,
    base_name: str,
    made_from: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Export the adapters of all ranks as a PEFT directory; call it on every rank.

    models:    this rank's model chunks.
    dtype:     of the tensors.
    base:      as record_base() has it. base_name: the name or directory of that model.
    made_from: see ResumableDirectory.

    Returns the SHA-256 of each file. The first rank writes; the directory appears when it is complete.

    Communicates: shards over the (expert) tensor-parallel groups, and each factor to the first rank.
    """
    directory = ResumableDirectory(out, made_from)
    on_first_rank(directory.open)
    tensors = _to_first_rank(_factors(models, arch, lora, dtype), dtype)
    digests: dict[str, str] = {}
    if dist.get_rank() == 0:
        planned = peft_directory.planned_tensors(arch, lora, dtype)
        peft_directory.write_weights(directory.folder, planned, tensors, base=base)
        directory.record(peft_directory.WEIGHTS)
        # The last: without it the folder is no PEFT directory.
        (directory.folder / peft_directory.CONFIG).write_bytes(peft_directory.config_bytes(arch, lora, base_name))
        directory.record(peft_directory.CONFIG)
    else:
        for _ in tensors:
            pass

    def finish() -> dict[str, str]:
        digests = directory.digests()
        directory.finish()
        return digests

    dist.barrier()
    digests = on_first_rank(finish)
    return digests


def _factors(
    models: Sequence[LanguageModule], arch: Architecture, lora: Lora, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Name and values of whole factors, on one rank among those that have the same, the first of a tensor-parallel
    group; the others take part."""
    for model in models:
        offsets = first_indices(model, arch)
        for name, parameter in adapters(model):
            replica = parallel_state.get_expert_data_parallel_rank() if is_expert(name) else _replica()
            if replica != 0:
                continue
            group = shard_group(model, name)
            shard = parameter.detach().to(dtype).contiguous()
            shards = [shard]
            if tensor_share(model, arch, name, parameter)[1] > 1:
                shards = [torch.empty_like(shard) for _ in range(group.size())]
                dist.all_gather(shards, shard, group=group)
            if group.rank() != 0:
                continue
            for (module, factor), values in merge_factor(arch, lora, name, shards, **offsets).items():
                yield peft_directory.tensor_name(module, factor), values.contiguous()


def _replica() -> int:
    """Which of the copies of a dense parameter this rank has; those of expert parallelism are the same."""
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def _to_first_rank(mine: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and values of what every rank has, on the CPU of the first rank; nothing elsewhere."""
    own = list(mine)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [(name, tuple(values.shape)) for name, values in own])
    if dist.get_rank() == 0:
        yield from ((name, values.cpu()) for name, values in own)
        device = torch.device("cuda", torch.cuda.current_device())
        for rank, of_rank in enumerate(everyone[1:], 1):
            for name, shape in of_rank:
                values = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(values, src=rank)
                yield name, values.cpu()
    else:
        for _, values in own:
            dist.send(values, dst=0)
