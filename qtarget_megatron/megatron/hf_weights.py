"""Weights between Megatron GPT stages and Hugging Face safetensors, in both directions."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from qtarget_megatron.checkpoint import (
    Architecture,
    HFExport,
    HFReader,
    hf_names,
    load_parameter,
    merge_parameter,
    partition_dim,
    plan_shards,
)


def load_hf_weights(model: GPTModel, reader: HFReader, arch: Architecture) -> None:
    """Fill one pipeline stage from a Hugging Face checkpoint, reading only this rank's slices.

    Rows of the vocabulary go by token id: zeros where the model has more of them, left out where it has fewer.
    ValueError where a parameter has no counterpart there or another shape.
    """
    group = model.pg_collection.tp
    for name, parameter in model.named_parameters():
        shard = load_parameter(
            reader,
            arch,
            name,
            layer_offset=_layer_offset(model),
            tp_rank=group.rank(),
            tp_size=group.size(),
            padded_vocab_size=model.vocab_size,
        )
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{name} is {list(parameter.shape)} on this rank, but {reader.directory} gives {list(shard.shape)}: "
                "the model was not built from this directory's config.json"
            )
        with torch.no_grad():
            parameter.copy_(shard)


def check_complete(models: Sequence[GPTModel], arch: Architecture) -> None:
    """ValueError unless all pipeline stages together hold every tensor of the architecture, once.

    models: all model chunks of this rank. load_hf_weights fills whatever a chunk has; only all
    chunks together show that no layer was left out. Collective: one object gather over the
    pipeline-parallel group.
    """
    plan_shards(arch, arch.dtype, stages=_stages(models, arch))


def save_hf_weights(
    models: Sequence[GPTModel],
    arch: Architecture,
    source: Path,
    out: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Export the model of all ranks as a Hugging Face directory; call it on every rank.

    models: this rank's model chunks. source: the directory whose config and tokenizer files are carried over.
    dtype: of the exported tensors, default the architecture's. One tensor-parallel rank of each pipeline stage writes
    that stage's files, so the directory must be on storage that all nodes share. It appears under its final name only
    when it is complete.

    Collectives: one all-gather per sharded parameter over the tensor-parallel group; object gathers and barriers.
    """
    dtype = dtype or arch.dtype
    plan = plan_shards(arch, dtype, stages=_stages(models, arch))
    # Not torch's random numbers: after the same training they are the same, and a killed export has left its folder.
    temporary = _broadcast(f".{out.name}.incomplete-{uuid.uuid4().hex[:16]}")
    export = HFExport(out, source, arch, plan, dtype=dtype, temporary_name=temporary)
    writes = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    if dist.get_rank() == 0:
        export.begin()
    dist.barrier()
    mine = set(_held(models, arch))
    tensors = _hf_tensors(models, arch, dtype)
    for file, names in plan:
        if mine.isdisjoint(names):
            continue
        # The plan keeps each stage's order, so the stream fills one file after the other.
        shard: dict[str, Tensor] = {}
        while not shard.keys() >= set(names):
            name, tensor = next(tensors)
            shard[name] = tensor
        if writes:
            export.write_shard(file, shard)
    for _ in tensors:
        raise AssertionError("the export plan left out a tensor")
    dist.barrier()
    if dist.get_rank() == 0:
        export.finish()
    dist.barrier()


def _hf_tensors(models: Sequence[GPTModel], arch: Architecture, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for model in models:
        group = model.pg_collection.tp
        for name, parameter in model.named_parameters():
            shard = parameter.detach().to(dtype)
            shards = [shard]
            if partition_dim(name) is not None and group.size() > 1:
                shards = [torch.empty_like(shard) for _ in range(group.size())]
                dist.all_gather(shards, shard.contiguous(), group=group)
            yield from merge_parameter(arch, name, layer_offset=_layer_offset(model), shards=shards).items()


def _held(models: Sequence[GPTModel], arch: Architecture) -> list[str]:
    """The Hugging Face tensors behind this rank's chunks."""
    return [
        hf_name
        for model in models
        for name, _ in model.named_parameters()
        for hf_name in hf_names(arch, name, layer_offset=_layer_offset(model))
    ]


def _stages(models: Sequence[GPTModel], arch: Architecture) -> list[list[str]]:
    """The Hugging Face tensors of every pipeline stage, in order."""
    return _gather(_held(models, arch), parallel_state.get_pipeline_model_parallel_group())


def _layer_offset(model: GPTModel) -> int:
    layers = model.decoder.layers
    return layers[0].layer_number - 1 if len(layers) else 0


def _gather(value, group) -> list:
    gathered = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _broadcast(value):
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
