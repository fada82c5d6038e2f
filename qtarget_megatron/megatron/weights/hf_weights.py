"""Weights between Megatron GPT stages and Hugging Face safetensors, in both directions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor
from torch.distributed import ProcessGroup

from qtarget_megatron.huggingface import (
    Architecture,
    HFExport,
    HFReader,
    ShardPlan,
    adapter_factor,
    copy_names,
    further_names,
    hf_names,
    hf_tensor_shapes,
    holds_all_experts,
    is_expert,
    merge_rows,
    parameter_pieces,
    partition_dim,
    plan_shards,
    tensor_dtype,
)
from qtarget_megatron.megatron.runtime.ranks import on_first_rank
from qtarget_megatron.megatron.weights.layer_names import first_layer, layer_name, named_parameters

# Bytes of a shard that are sent at a time.
_BLOCK_BYTES = 1 << 21


def load_hf_weights(
    model: LanguageModule, reader: HFReader, arch: Architecture, report: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Fill one pipeline stage from a Hugging Face checkpoint, reading only this rank's slices, one at a time.

    Rows of the vocabulary go by token id: zeros where the model has more of them, left out where it has fewer.
    report: called with the bytes of the parameters that were filled, bit by bit. ValueError where a parameter has no
    counterpart there or another shape, or where a copy that the checkpoint has of it differs.
    """
    copies = [("embedding.word_embeddings.weight", model.embedding.word_embeddings.weight)] if _has_copy(model) else []
    for name, parameter in [*weights(model, arch), *copies]:
        rank, size = tensor_share(model, arch, name, parameter)
        share = dict(**first_indices(model, arch), tp_rank=rank, tp_size=size, padded_vocab_size=model.vocab_size)
        pieces = parameter_pieces(reader, arch, name, **share)
        rows = 0
        for piece in pieces:
            target = parameter.detach()[rows : rows + len(piece)]
            rows += len(piece)
            given = [rows, *piece.shape[1:]]
            if target.shape == piece.shape:
                target.copy_(piece)
                report(target.nbytes)
            # Not while the next one is read.
            del piece
        if given != list(parameter.shape):
            raise ValueError(
                f"{name} is {list(parameter.shape)} on this rank, but {reader.directory} gives {given}: "
                "the model was not built from this directory's config.json"
            )
        for copy in copy_names(arch, name):
            rows = 0
            for piece in parameter_pieces(reader, arch, name, **share, copy=copy):
                if not torch.equal(parameter.detach()[rows : rows + len(piece)].cpu(), piece.to(parameter.dtype)):
                    (first, *_) = hf_names(arch, name, **first_indices(model, arch))
                    raise ValueError(
                        f"{reader.directory}: expected {copy} to be the same as {first}, which Megatron's layers for "
                        "further tokens share with the model, got other numbers"
                    )
                rows += len(piece)


def check_complete(models: Sequence[LanguageModule], arch: Architecture) -> None:
    """ValueError unless all pipeline stages together hold every tensor of the architecture, once.

    models: all model chunks of this rank. load_hf_weights fills whatever a chunk has; only all
    chunks together show that no layer and no expert was left out. Collective: one object gather over the
    expert-parallel and one over the pipeline-parallel group.
    """
    plan_shards(arch, arch.dtype, stages=_stages(models, arch))


def save_hf_weights(
    models: Sequence[LanguageModule],
    arch: Architecture,
    source: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    made_from: Mapping[str, Any] | None = None,
    further: HFReader | None = None,
    progress: Callable[[int], Callable[[int], None]] = lambda total: lambda nbytes: None,
) -> dict[str, str]:
    """Export the model of all ranks as a Hugging Face directory; call it on every rank.

    models:    this rank's model chunks.
    arch:      with_further() where the export shall have layers that predict further tokens.
    further:   the checkpoint that they are copied from where the model does not have them; the first rank does it.
    source:    the directory whose config and tokenizer files are carried over.
    dtype:     of the exported tensors, default the architecture's.
    made_from: see HFExport; the files that an interrupted export of the same wrote to their end are kept.
    progress:  called with the bytes that this rank writes, returns what is called with those that were written, bit by
               bit.

    Returns the SHA-256 of each file.

    Of each pipeline stage, its data-parallel replicas share the files (with experts: each expert-parallel rank writes
    those of its own, the first one also the rest, and tensors of all experts of a layer); one tensor-parallel rank of a
    replica writes, so the directory must be on storage that all nodes share. It holds no more than one parameter, as a
    whole, beside its own shard. The directory appears under its final name only when it is complete.

    Communicates: shards over the (expert) tensor-parallel group, and over that of expert parallelism as well where a
    tensor holds all experts, to the rank that writes; object gathers and broadcasts.
    """
    dtype = dtype or arch.dtype
    stages = _stages(models, arch)
    copied = [] if further is None else further_names(hf_tensor_shapes(arch).keys() - set().union(*stages), arch)
    plan = plan_shards(arch, dtype, stages=[*stages, copied] if copied else stages)
    export = HFExport(out, source, arch, plan, dtype=dtype, made_from=made_from)
    on_first_rank(export.begin)
    parameters = _parameters(models, arch, dtype)
    mine = _files_to_write(plan, parameters)
    if dist.get_rank() == 0:
        mine |= {file: _Part([], True) for file, names in plan if names[0] in copied}
    held = {file for file, part in mine.items() if part.writes and export.holds_shard(file)}
    held = set().union(*_gather(held, None))
    left = [file for file in mine if file not in held]
    gathering = _Gathering(parameters, dtype)
    names, shapes = dict(plan), hf_tensor_shapes(arch)
    written = [name for file in left if mine[file].writes for name in names[file]]
    report = progress(sum(math.prod(shapes[name]) * tensor_dtype(name, dtype).itemsize for name in written))
    for file in left:
        tensors: Iterator[tuple[str, Iterator[Tensor]]]
        if copied and names[file][0] in copied:
            tensors = ((name, _reported(_copied(further, name, dtype), report)) for name in names[file])
            export.write_shard(file, tensors)
            continue
        tensors = _tensors(arch, mine[file].parameters, set(names[file]), gathering, report)
        if mine[file].writes:
            export.write_shard(file, tensors)
        else:
            for _ in tensors:
                pass
    dist.barrier()
    return on_first_rank(export.finish)


@dataclass(frozen=True)
class _Parameter:
    """A parameter of this rank.

    offsets:           as hf_names takes them.
    group:             the ranks that hold its shards, in order; those of the other experts as well where the tensor
                       holds_all_experts.
    shards:            how many different ones.
    replica, replicas: which of the groups that hold the same this is, and among how many files are shared.
    hf_names:          of the tensors that it is exported to, in this dtype.
    """

    name: str
    shard: Tensor
    offsets: dict[str, int]
    hf_names: tuple[str, ...]
    dtype: torch.dtype
    group: ProcessGroup
    shards: int
    replica: int
    replicas: int
    holds_all_experts: bool


def _parameters(models: Sequence[LanguageModule], arch: Architecture, dtype: torch.dtype) -> list[_Parameter]:
    """What this rank holds a piece of, and with whom."""
    dense = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    # With experts a file has tensors of two kinds of groups, whose first ranks are the same only in the first replica.
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True) if arch.experts is None else 1
    return [
        _Parameter(
            name,
            parameter.detach(),
            offsets,
            names,
            # A tied head on a stage of its own is exported to nothing.
            tensor_dtype(names[0], dtype) if names else dtype,
            model.pg_collection.tp_ep if holds_all_experts(arch, name) else shard_group(model, name),
            tensor_share(model, arch, name, parameter)[1],
            parallel_state.get_expert_data_parallel_rank() if is_expert(name) else dense,
            replicas,
            holds_all_experts(arch, name),
        )
        for model in models
        for offsets in [first_indices(model, arch)]
        for name, parameter in weights(model, arch)
        for names in [hf_names(arch, name, **offsets)]
    ]


@dataclass(frozen=True)
class _Part:
    """What this rank has to do with a file: parameters it sends or gathers, and whether it is the one that writes."""

    parameters: list[_Parameter]
    writes: bool


def _files_to_write(plan: ShardPlan, parameters: Sequence[_Parameter]) -> dict[str, _Part]:
    """The files that this rank has a part in, in the order of the plan."""
    mine = {}
    for number, (file, names) in enumerate(plan):
        wanted = set(names)
        held = [
            parameter
            for parameter in parameters
            if number % parameter.replicas == parameter.replica and not wanted.isdisjoint(parameter.hf_names)
        ]
        found = {name for parameter in held for name in parameter.hf_names}
        if held:
            mine[file] = _Part(held, wanted <= found and all(parameter.group.rank() == 0 for parameter in held))
    return mine


def _tensors(
    arch: Architecture,
    parameters: Sequence[_Parameter],
    wanted: set[str],
    gathering: _Gathering,
    report: Callable[[int], None],
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Name and pieces of the wanted Hugging Face tensors, on the writer, one after another; nothing elsewhere."""
    for parameter in parameters:
        names = wanted.intersection(parameter.hf_names)
        if not names:
            continue
        if parameter.holds_all_experts:
            # With the first of the experts, those of the others.
            (name,) = names
            wanted = wanted - names
            experts = _slabs(arch, name, [other for other in parameters if name in other.hf_names], gathering)
            if parameter.group.rank() == 0:
                yield name, _reported(experts, report)
            else:
                for _ in experts:
                    pass
            continue
        shards = gathering.shards(parameter)
        if shards is None:
            continue
        merged = merge_rows(arch, parameter.name, **parameter.offsets, shards=shards)
        for name in names:
            yield name, _reported(merged.pop(name), report)


def _slabs(arch: Architecture, name: str, experts: Sequence[_Parameter], gathering: _Gathering) -> Iterator[Tensor]:
    """The tensor of all experts of a layer, expert by expert, on the writer; nothing elsewhere.

    experts: those of this rank.
    """
    for shards in gathering.of_all_experts(experts):
        (slabs,) = merge_rows(arch, experts[0].name, **experts[0].offsets, shards=shards).values()
        yield from slabs


def _copied(reader: HFReader | None, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor of another checkpoint, some rows at a time."""
    assert reader is not None
    height, *others = reader.shape(name)
    step = max(_BLOCK_BYTES // (math.prod(others) * dtype.itemsize), 1)
    for row in range(0, height, step):
        rows = (row, min(row + step, height))
        yield reader.read(name, rows=rows).to(tensor_dtype(name, dtype))


def _reported(pieces: Iterator[Tensor], report: Callable[[int], None]) -> Iterator[Tensor]:
    for piece in pieces:
        yield piece
        report(piece.nbytes)


class _Gathering:
    """Brings the shards of one parameter after another to the first rank of its group, always into the same memory.

    Sent and received, not gathered: gloo's gather makes copies, and keeps them for a while.
    """

    def __init__(self, parameters: Sequence[_Parameter], dtype: torch.dtype):
        cut = [p for p in parameters if (p.shards > 1 or p.holds_all_experts) and p.group.rank() == 0]
        largest = max((p.shard.numel() * p.shards for p in cut), default=0)
        self._whole = torch.empty(largest, dtype=dtype, device="cpu")
        device = parameters[0].shard.device if parameters else None
        self._block = torch.empty(_BLOCK_BYTES // dtype.itemsize, dtype=dtype, device=device)

    def shards(self, parameter: _Parameter) -> list[Tensor] | None:
        """Those of all ranks, in order, on the CPU of the first rank, until the next call; None elsewhere."""
        own, group, ranks = parameter.shard.view(-1), parameter.group, parameter.shards
        if ranks == 1:
            return [parameter.shard.to("cpu", parameter.dtype)] if group.rank() == 0 else None
        if group.rank() != 0:
            self._send(own, group)
            return None
        shards = self._whole[: own.numel() * ranks].view(ranks, own.numel())
        shards[0].copy_(own)
        for rank in range(1, ranks):
            self._receive(shards[rank], group, rank)
        return [shard.view(parameter.shard.shape) for shard in shards]

    def of_all_experts(self, experts: Sequence[_Parameter]) -> Iterator[list[Tensor]]:
        """The shards of one expert after another, of those that this rank has and then of those of the other ranks, on
        the first rank of their group, each until the next; nothing elsewhere."""
        first = experts[0]
        group, numel = first.group, first.shard.numel()
        tensor, expert = (
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_model_parallel_group(),
        )
        if group.rank() != expert.rank() * tensor.size() + tensor.rank():
            raise RuntimeError("the ranks of expert parallelism lie in another order than expected")
        if group.rank() != 0:
            for parameter in experts if tensor.rank() < first.shards else ():
                self._send(parameter.shard.view(-1), group)
            return
        shards = self._whole[: numel * first.shards].view(first.shards, numel)
        for other in range(expert.size()):
            for parameter in experts:
                for rank in range(first.shards):
                    if (other, rank) == (0, 0):
                        shards[0].copy_(parameter.shard.view(-1))
                    else:
                        self._receive(shards[rank], group, other * tensor.size() + rank)
                yield [shard.view(parameter.shard.shape) for shard in shards]

    def _send(self, own: Tensor, group: ProcessGroup) -> None:
        for part in own.split(self._block.numel()):
            block = self._block[: part.numel()]
            block.copy_(part)
            dist.send(block, group=group, group_dst=0)

    def _receive(self, target: Tensor, group: ProcessGroup, rank: int) -> None:
        for part in target.split(self._block.numel()):
            block = self._block[: part.numel()]
            dist.recv(block, group=group, group_src=rank)
            part.copy_(block)


def _held(models: Sequence[LanguageModule], arch: Architecture) -> list[str]:
    """The Hugging Face tensors behind this rank's chunks; what all expert-parallel ranks have counts on the first."""
    is_first = parallel_state.get_expert_model_parallel_rank() == 0
    return [
        hf_name
        for model in models
        for name, _ in weights(model, arch)
        if is_first or is_expert(name)
        for hf_name in hf_names(arch, name, **first_indices(model, arch))
    ]


def _stages(models: Sequence[LanguageModule], arch: Architecture) -> list[list[str]]:
    """The Hugging Face tensors of every pipeline stage, in order; of each those on every expert-parallel rank."""
    of_stage = _gather(_held(models, arch), parallel_state.get_expert_model_parallel_group())
    if arch.experts is not None and arch.experts.fused:
        # A tensor of all experts counts on the first rank, where all ranks together have all of them.
        found = Counter(name for held in of_stage for name in held)
        whole = [name for name in dict.fromkeys(of_stage[0]) if found[name] in (1, arch.experts.count)]
        of_stage = [whole, *([] for _ in of_stage[1:])]
    stages = _gather(of_stage, parallel_state.get_pipeline_model_parallel_group())
    return [held for of_stage in stages for held in of_stage]


def weights(model: LanguageModule, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """What a Hugging Face checkpoint has: the parameters, and the router's numbers that are not trained by gradients.

    Heads of multi-token prediction are left out where the checkpoint has none, and in any case their copy of the
    embedding on a last pipeline stage.
    """
    left_out = (() if arch.has_further else ("mtp.",)) + (("embedding.",) if _has_copy(model) else ())
    parameters = (pair for pair in named_parameters(model) if adapter_factor(pair[0]) is None)
    corrections = (
        (layer_name(model, name), numbers)
        for name, numbers in model.named_buffers()
        if name.endswith(".router.expert_bias")
    )
    yield from (pair for pair in (*parameters, *corrections) if not pair[0].startswith(left_out))


def adapters(model: LanguageModule) -> Iterator[tuple[str, Tensor]]:
    """The factors of a model chunk's adapters."""
    yield from (pair for pair in named_parameters(model) if adapter_factor(pair[0]) is not None)


def saved(model: LanguageModule, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """What a training's checkpoints have of a model chunk: its adapters where there are some, else its weights."""
    yield from weights(model, arch) if model.adapters is None else adapters(model)


def _has_copy(model: LanguageModule) -> bool:
    """Whether multi-token prediction has brought a copy of the first stage's embedding here."""
    return model.mtp_process and not model.pre_process


def tensor_share(model: LanguageModule, arch: Architecture, name: str, parameter: Tensor) -> tuple[int, int]:
    """(which, of how many) shares of the tensors this rank has; (0, 1) where it has all of them."""
    dim, adapter = partition_dim(name), adapter_factor(name)
    if dim is None:
        return 0, 1
    sources = hf_names(arch, name if adapter is None else adapter[0], **first_indices(model, arch))
    if adapter is not None:
        # As the weight is cut.
        is_whole = len(sources) == 1 and hf_tensor_shapes(arch)[sources[0]][dim] == parameter.shape[dim]
        group = shard_group(model, name)
        return (0, 1) if is_whole else (group.rank(), group.size())
    if len(sources) == 1 and hf_tensor_shapes(arch)[sources[0]] == tuple(parameter.shape):
        # Transformer Engine's latent attention has whole projections where the local one cuts them.
        return 0, 1
    group = shard_group(model, name)
    return group.rank(), group.size()


def shard_group(model: LanguageModule, name: str) -> ProcessGroup:
    """The ranks that a parameter is cut over."""
    return model.pg_collection.expt_tp if is_expert(name) else model.pg_collection.tp


def first_indices(model: LanguageModule, arch: Architecture) -> dict[str, int]:
    """Global index of the first layer and of the first expert that this rank has."""
    group = model.pg_collection.ep
    first_expert = 0 if arch.experts is None else group.rank() * (arch.experts.count // group.size())
    return {"layer_offset": first_layer(model), "expert_offset": first_expert}


def _gather(value, group) -> list:
    gathered = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
