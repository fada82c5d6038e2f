"""Weights between Megatron GPT stages and Hugging Face safetensors, in both directions."""

from __future__ import annotations

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
    hf_tensor_shapes,
    is_expert,
    load_parameter,
    merge_parameter,
    partition_dim,
    plan_shards,
    tensor_dtype,
)


def load_hf_weights(model: GPTModel, reader: HFReader, arch: Architecture) -> None:
    """Fill one pipeline stage from a Hugging Face checkpoint, reading only this rank's slices.

    Rows of the vocabulary go by token id: zeros where the model has more of them, left out where it has fewer.
    ValueError where a parameter has no counterpart there or another shape.
    """
    for name, parameter in _weights(model):
        rank, size = _share(model, arch, name, parameter)
        shard = load_parameter(
            reader,
            arch,
            name,
            **_offsets(model, arch),
            tp_rank=rank,
            tp_size=size,
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
    chunks together show that no layer and no expert was left out. Collective: one object gather over the
    expert-parallel and one over the pipeline-parallel group.
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
    dtype: of the exported tensors, default the architecture's. One tensor-parallel rank of each pipeline stage and
    expert-parallel rank writes the files of what these have, so the directory must be on storage that all nodes share.
    It appears under its final name only when it is complete.

    Collectives: one all-gather per sharded parameter over the tensor-parallel group; object gathers and barriers.
    """
    dtype = dtype or arch.dtype
    plan = plan_shards(arch, dtype, stages=_stages(models, arch))
    temporary = _broadcast(f".{out.name}.incomplete-{torch.randint(2**62, ()).item():x}")
    export = HFExport(out, source, arch, plan, dtype=dtype, temporary_name=temporary)
    # The first rank of a stage's and expert-parallel rank's replicas: first also by the dense layers' ranks.
    writes = (
        parallel_state.get_expert_tensor_parallel_rank() == 0 and parallel_state.get_expert_data_parallel_rank() == 0
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
    """What this rank is to write, in the order of _held; every rank goes through all parameters for the gathers."""
    mine = set(_held(models, arch))
    for model in models:
        for name, parameter in _weights(model):
            group = _shard_group(model, name)
            # Gathered as exported.
            exported = next(iter(hf_names(arch, name, **_offsets(model, arch))), name)
            shard = parameter.detach().to(tensor_dtype(exported, dtype))
            shards = [shard]
            if partition_dim(name) is not None and _share(model, arch, name, parameter)[1] > 1:
                shards = [torch.empty_like(shard) for _ in range(group.size())]
                dist.all_gather(shards, shard.contiguous(), group=group)
            merged = merge_parameter(arch, name, **_offsets(model, arch), shards=shards)
            yield from ((hf_name, tensor) for hf_name, tensor in merged.items() if hf_name in mine)


def _held(models: Sequence[GPTModel], arch: Architecture) -> list[str]:
    """The Hugging Face tensors behind this rank's chunks; what all expert-parallel ranks have counts on the first."""
    is_first = parallel_state.get_expert_model_parallel_rank() == 0
    return [
        hf_name
        for model in models
        for name, _ in _weights(model)
        if is_first or is_expert(name)
        for hf_name in hf_names(arch, name, **_offsets(model, arch))
    ]


def _stages(models: Sequence[GPTModel], arch: Architecture) -> list[list[str]]:
    """The Hugging Face tensors of every pipeline stage, in order; of each those on every expert-parallel rank."""
    of_stage = _gather(_held(models, arch), parallel_state.get_expert_model_parallel_group())
    stages = _gather(of_stage, parallel_state.get_pipeline_model_parallel_group())
    return [held for of_stage in stages for held in of_stage]


def _weights(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the router's numbers that are not trained by gradients."""
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(".router.expert_bias"))


def _share(model: GPTModel, arch: Architecture, name: str, parameter: Tensor) -> tuple[int, int]:
    """(which, of how many) shares of the tensors this rank has; (0, 1) where it has all of them."""
    sources = hf_names(arch, name, **_offsets(model, arch))
    if len(sources) == 1 and hf_tensor_shapes(arch)[sources[0]] == tuple(parameter.shape):
        # Transformer Engine's latent attention has whole projections where the local one cuts them.
        return 0, 1
    group = _shard_group(model, name)
    return group.rank(), group.size()


def _shard_group(model: GPTModel, name: str) -> dist.ProcessGroup:
    """The ranks that a parameter is cut over."""
    return model.pg_collection.expt_tp if is_expert(name) else model.pg_collection.tp


def _offsets(model: GPTModel, arch: Architecture) -> dict[str, int]:
    """Global index of the first layer and of the first expert that this rank has."""
    layers, group = model.decoder.layers, model.pg_collection.ep
    first_expert = 0 if arch.experts is None else group.rank() * (arch.experts.count // group.size())
    return {"layer_offset": layers[0].layer_number - 1 if len(layers) else 0, "expert_offset": first_expert}


def _gather(value, group) -> list:
    gathered = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _broadcast(value):
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
