"""The mapping between Megatron parameters and Hugging Face tensors.

Written as data: which tensors a Megatron parameter is made of, and how tensor parallelism cuts it. Both implementations
of a Megatron layer are understood: local, and Transformer Engine with its norms fused into the following linear layer
and its experts grouped. Everything here is pure: no process groups, no Megatron.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from qtarget_megatron.huggingface.config import families
from qtarget_megatron.huggingface.config.architecture import Architecture
from qtarget_megatron.huggingface.config.family import CORRECTION
from qtarget_megatron.huggingface.weights.fused_experts import down_pieces, down_slab, gate_up_pieces, gate_up_slab
from qtarget_megatron.huggingface.weights.reader import HFReader
from qtarget_megatron.huggingface.weights.tensors import further_range, hf_tensor_shapes

# How tensor parallelism cuts a parameter, and along which dimension of the local shard.
_REPLICATED, _VOCABULARY, _QKV, _GATE_UP, _ROWS, _COLUMNS = (
    "replicated",
    "vocabulary",
    "qkv",
    "gate_up",
    "rows",
    "columns",
)
_PARTITION_DIM = {_REPLICATED: None, _VOCABULARY: 0, _QKV: 0, _GATE_UP: 0, _ROWS: 0, _COLUMNS: 1}

# Megatron parameter -> how it is cut, and the roles (family.py) of the tensors it is made of.
_OUTER = {
    "embedding.word_embeddings.weight": (_VOCABULARY, ("embedding",)),
    "output_layer.weight": (_VOCABULARY, ("head",)),
    "decoder.final_layernorm.weight": (_REPLICATED, ("final_norm",)),
}
_LAYER = {
    "input_layernorm.weight": (_REPLICATED, ("input_norm",)),
    "self_attention.linear_qkv.layer_norm_weight": (_REPLICATED, ("input_norm",)),
    "self_attention.linear_qkv.weight": (_QKV, ("query", "key", "value")),
    "self_attention.linear_qkv.bias": (_QKV, ("query", "key", "value")),
    "self_attention.core_attention.softmax_offset": (_ROWS, ("sinks",)),
    "self_attention.q_layernorm.weight": (_REPLICATED, ("query_norm",)),
    "self_attention.k_layernorm.weight": (_REPLICATED, ("key_norm",)),
    "self_attention.linear_proj.weight": (_COLUMNS, ("attention_output",)),
    "self_attention.linear_proj.bias": (_REPLICATED, ("attention_output",)),
    "pre_mlp_layernorm.weight": (_REPLICATED, ("mlp_norm",)),
    "mlp.linear_fc1.layer_norm_weight": (_REPLICATED, ("mlp_norm",)),
    "self_attn_bda.norm.weight": (_REPLICATED, ("attention_output_norm",)),
    "mlp_bda.norm.weight": (_REPLICATED, ("mlp_output_norm",)),
    "mlp.linear_fc1.weight": (_GATE_UP, ("gate", "up")),
    "mlp.linear_fc1.bias": (_GATE_UP, ("gate", "up")),
    "mlp.linear_fc2.weight": (_COLUMNS, ("down",)),
    "mlp.linear_fc2.bias": (_REPLICATED, ("down",)),
    "mlp.router.weight": (_REPLICATED, ("router",)),
    "mlp.router.bias": (_REPLICATED, ("router",)),
    "mlp.router.expert_bias": (_REPLICATED, ("router",)),
    "mlp.shared_experts.linear_fc1.weight": (_GATE_UP, ("shared_gate", "shared_up")),
    "mlp.shared_experts.linear_fc2.weight": (_COLUMNS, ("shared_down",)),
    "mlp.shared_experts.gate_weight": (_REPLICATED, ("shared_weight",)),
    "self_attention.linear_q_down_proj.weight": (_ROWS, ("query_down",)),
    "self_attention.linear_q_up_proj.layer_norm_weight": (_REPLICATED, ("query_latent_norm",)),
    "self_attention.linear_q_up_proj.weight": (_ROWS, ("query_up",)),
    "self_attention.linear_kv_down_proj.weight": (_ROWS, ("key_value_down",)),
    "self_attention.kv_layernorm.weight": (_REPLICATED, ("key_value_norm",)),
    "self_attention.linear_kv_up_proj.layer_norm_weight": (_REPLICATED, ("key_value_norm",)),
    "self_attention.linear_kv_up_proj.weight": (_ROWS, ("key_value_up",)),
}
# Parameters that are no ".weight" and no ".bias" of their module in a checkpoint.
_PARTS = {"mlp.router.expert_bias": CORRECTION}
# Parameters of a layer that predicts further tokens, besides those that any layer has.
_FURTHER = {
    "enorm.weight": (_REPLICATED, ("further_token_norm",)),
    "hnorm.weight": (_REPLICATED, ("further_hidden_norm",)),
    "eh_proj.weight": (_ROWS, ("further_projection",)),
    "final_layernorm.weight": (_REPLICATED, ("further_norm",)),
}
# Roles of tensors that each such layer has a copy of -> those of the copies.
_COPIES = {"embedding": "further_embedding", "head": "further_head"}
_TO_LATENTS = ("query_down", "key_value_down")
# Parameters of each expert that this expert-parallel rank holds.
_EXPERT = {
    "linear_fc1.weight": (_GATE_UP, ("expert_gate", "expert_up")),
    "linear_fc1.bias": (_GATE_UP, ("expert_gate", "expert_up")),
    "linear_fc2.weight": (_COLUMNS, ("expert_down",)),
    "linear_fc2.bias": (_REPLICATED, ("expert_down",)),
}
# The roles where a checkpoint has a tensor for all experts of a layer.
_FUSED = {("expert_gate", "expert_up"): ("experts_gate_up",), ("expert_down",): ("experts_down",)}
_LAYER_NAME = re.compile(r"(?:decoder\.layers|(?P<further>mtp\.layers))\.(?P<layer>\d+)\.(?P<part>.+)")
# What a layer of multi-token prediction has within it.
_INNER = "mtp_model_layer."
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>\w+\.(weight|bias))")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(?P<linear>\w+\.(weight|bias))(?P<expert>\d+)")
# The factors of an adapter beside a linear layer, with the number of one of grouped experts.
_ADAPTER = re.compile(r"(?P<linear>.+)\.lora\.(?P<factor>[AB])(?P<expert>\d*)")


@dataclass(frozen=True)
class _Rule:
    """How a parameter lies in a checkpoint.

    kind:          how the parameter is cut.
    part:          of the tensors' module.
    layer, expert: counted on this rank; a layer that predicts further tokens from the model's last one on.
    """

    kind: str
    roles: tuple[str, ...]
    part: str
    layer: int | None = None
    expert: int | None = None
    is_further: bool = False


def is_expert(name: str) -> bool:
    """True for a Megatron parameter of one of a rank's experts: expert tensor parallelism cuts it, and each
    expert-parallel rank has others. ValueError for a name that has no counterpart in a Hugging Face checkpoint."""
    adapter = adapter_factor(name)
    return _rule(name if adapter is None else adapter[0]).expert is not None


def adapter_factor(name: str) -> tuple[str, str] | None:
    """The weight that a Megatron parameter is an adapter's factor beside, and which, "A" or "B"; None for others."""
    match = _ADAPTER.fullmatch(name)
    return None if match is None else (f"{match['linear']}.weight{match['expert']}", match["factor"])


def holds_all_experts(arch: Architecture, name: str) -> bool:
    """True for a Megatron parameter of an expert whose tensor holds those of all experts of the layer."""
    return arch.experts is not None and arch.experts.fused and is_expert(name)


def partition_dim(name: str) -> int | None:
    """The dimension along which (expert) tensor parallelism cuts a Megatron parameter, None if replicated.

    ValueError for a name that has no counterpart in a Hugging Face checkpoint.
    """
    adapter = adapter_factor(name)
    if adapter is None:
        return _PARTITION_DIM[_rule(name).kind]
    weight, factor = adapter
    # B has the rows of the weight, A its columns; the other factor is whole on every rank.
    return {("A", 1): 1, ("B", 0): 0}.get((factor, partition_dim(weight)))


@dataclass(frozen=True)
class LinearLayer:
    """What one of Megatron's linear layers is made of.

    sources:   the Hugging Face tensors of its weight, one for each role, which may repeat.
    runs:      its rows in order, of the whole weight: (which of the sources, how many rows).
    columns:   numbers of its input.
    cut:       the dimension along which tensor parallelism cuts the weight.
    is_gated:  a rank has its share of the gate's rows, then its share of those of up.
    is_latent: it makes latents, which Transformer Engine's layers have whole on every rank.
    """

    sources: tuple[str, ...]
    runs: tuple[tuple[int, int], ...]
    columns: int
    cut: int
    is_gated: bool = False
    is_latent: bool = False

    @property
    def rows(self) -> int:
        """Numbers of its output."""
        return sum(rows for _, rows in self.runs)

    def rows_of_rank(self, tp_rank: int, tp_size: int) -> list[tuple[int, int]]:
        """The runs of rows that a tensor-parallel rank has, where rows are cut."""
        if self.is_gated:
            return [(source, rows // tp_size) for source, rows in self.runs]
        start, stop = _share("a linear layer", self.rows, tp_rank, tp_size)
        found, position = [], 0
        for source, rows in self.runs:
            if (length := min(stop, position + rows) - max(start, position)) > 0:
                found.append((source, length))
            position += rows
        return found


def linear_layers(arch: Architecture, layer: int) -> dict[str, LinearLayer]:
    """The linear layers of a layer, by their paths in it: "self_attention.linear_qkv", "mlp.experts.linear_fc1" (of
    each expert), ... Routers, and experts of which a tensor holds all, are left out."""
    shapes, found = hf_tensor_shapes(arch), {}
    parts = {name: name for name in _LAYER} | {
        f"mlp.experts.{name}": f"mlp.experts.local_experts.0.{name}" for name in _EXPERT
    }
    for path, part in parts.items():
        name = f"decoder.layers.{layer}.{part}"
        kind, roles = _rule(name).kind, _rule(name).roles
        if kind == _REPLICATED or not name.endswith(".weight") or holds_all_experts(arch, name):
            continue
        sources = _source_names(arch, name, 0, 0)
        if not shapes.keys() >= set(sources):
            continue
        if kind == _QKV:
            runs = [(source, last - first) for source, first, last in _qkv_segments(arch, sources)]
        else:
            # Where several roles share a tensor, each has a part of its rows.
            runs = [(i, shapes[source][0] // sources.count(source)) for i, source in enumerate(sources)]
        found[path.removesuffix(".weight")] = LinearLayer(
            sources,
            tuple(runs),
            columns=shapes[sources[0]][1],
            cut=_PARTITION_DIM[kind],
            is_gated=kind == _GATE_UP,
            is_latent=roles[0] in _TO_LATENTS,
        )
    return found


@lru_cache(maxsize=8)  # asked once per parameter
def linear_layers_of_model(arch: Architecture) -> dict[str, LinearLayer]:
    """Those of any layer, each as the first layer has it that has one."""
    found: dict[str, LinearLayer] = {}
    for layer in range(arch.num_layers):
        found = linear_layers(arch, layer) | found
    return found


def shard_numbers(arch: Architecture, layer: int, *, tp_size: int, whole_latents: bool = False) -> int:
    """Numbers in the parameters of a layer on one tensor-parallel rank, besides those of its experts.

    whole_latents: the projections to latents are not cut (Transformer Engine's layers).
    """
    counted: set[str] = set()
    shapes, total = hf_tensor_shapes(arch), 0
    for name, (kind, roles) in _LAYER.items():
        sources = set(_source_names(arch, f"decoder.layers.{layer}.{name}", 0, 0))
        # Both implementations' names of a norm are there; a correction of scores is no parameter.
        if name in _PARTS or not sources <= shapes.keys() - counted:
            continue
        counted |= sources
        is_whole = kind == _REPLICATED or (whole_latents and roles[0] in _TO_LATENTS)
        total += sum(math.prod(shapes[source]) for source in sources) // (1 if is_whole else tp_size)
    return total


def hf_names(arch: Architecture, name: str, *, layer_offset: int, expert_offset: int = 0) -> tuple[str, ...]:
    """The Hugging Face tensors that the Megatron parameter ``name`` is exported to.

    ``name`` counts layers and experts on its rank; ``layer_offset`` and ``expert_offset`` are the global index of the
    first of each. Empty for the output layer of a tied model, whose weight is exported as the embedding.
    """
    if _is_tied_head(arch, name):
        return ()
    return tuple(dict.fromkeys((*_sources(arch, name, layer_offset, expert_offset), *copy_names(arch, name))))


def copy_names(arch: Architecture, name: str) -> tuple[str, ...]:
    """The Hugging Face tensors that are copies of the one that a parameter is made of: layers that predict further
    tokens have the embedding and the head once more."""
    roles = _rule(name).roles
    if not arch.has_further or roles[0] not in _COPIES or _is_tied_head(arch, name):
        return ()
    family, copied = families.by_name(arch.family), [_COPIES[role] for role in roles]
    copied += [_COPIES["head"]] if arch.tied else []
    return tuple(family.tensor(role, layer=layer) for layer in further_range(arch) for role in copied)


def load_parameter(
    reader: HFReader,
    arch: Architecture,
    name: str,
    *,
    layer_offset: int,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
    expert_offset: int = 0,
) -> torch.Tensor:
    """This tensor-parallel rank's shard of the Megatron parameter ``name``.

    tp_rank, tp_size: of expert tensor parallelism where is_expert(name). layer_offset, expert_offset: as in hf_names.
    CPU tensor in the checkpoint's dtype; reads only the slices the shard consists of.

    - vocabulary: rows [r P/tp, (r+1) P/tp) of the P = ``padded_vocab_size`` rows, zeros from the
      true vocabulary on; rows from P on are left out. The output layer of a tied model reads the embedding.
    - linear_qkv: the same contiguous share of the grouped rows (for each query group its query
      heads, then its key head, then its value head), also where a share cuts a group.
    - linear_fc1: this rank's share of the gate rows, then its share of the up rows.
    - linear_proj, linear_fc2: a share of the columns.
    - projections of latent attention: a share of the rows.
    - norms, row-parallel biases and routers: whole.

    ValueError where ``name`` is unknown or absent from this architecture, or ``tp_size`` does not
    divide the dimension.
    """
    pieces = parameter_pieces(
        reader,
        arch,
        name,
        layer_offset=layer_offset,
        tp_rank=tp_rank,
        tp_size=tp_size,
        padded_vocab_size=padded_vocab_size,
        expert_offset=expert_offset,
    )
    return _joined(pieces)


def parameter_pieces(
    reader: HFReader,
    arch: Architecture,
    name: str,
    *,
    layer_offset: int,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
    expert_offset: int = 0,
    copy: str | None = None,
) -> Iterator[torch.Tensor]:
    """The shard of `load_parameter` in pieces along its first dimension, each read when it is asked for.

    copy: of copy_names, read in the place of the tensor itself. Whoever copies the pieces to their place holds no more
    than one Hugging Face tensor beside the shard.
    """
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"expected a tensor-parallel rank in [0, {tp_size}), got {tp_rank}")
    rule = _rule(name)
    kind = rule.kind
    read_as = "embedding.word_embeddings.weight" if _is_tied_head(arch, name) else name
    sources = _sources(arch, read_as, layer_offset, expert_offset)
    if holds_all_experts(arch, name):
        width = arch.experts.ffn_hidden_size
        share = None if kind == _REPLICATED else _share(name, width, tp_rank, tp_size)
        read = gate_up_pieces if kind == _GATE_UP else down_pieces
        yield from read(reader, sources[0], rule.expert + expert_offset, share)
    elif kind == _REPLICATED:
        yield reader.read(sources[0])
    elif kind == _VOCABULARY:
        yield from _load_vocabulary(reader, arch, copy or sources[0], tp_rank, tp_size, padded_vocab_size)
    elif kind == _COLUMNS:
        columns = reader.shape(sources[0])[1]
        yield reader.read(sources[0], cols=_share(name, columns, tp_rank, tp_size))
    elif kind in (_GATE_UP, _ROWS):
        for index, source in enumerate(sources):
            # Where several roles share a tensor, each has its share of the rows, one behind the other.
            height = reader.shape(source)[0] // sources.count(source)
            first, (low, high) = height * sources[:index].count(source), _share(name, height, tp_rank, tp_size)
            yield reader.read(source, rows=(first + low, first + high))
    else:
        segments = _qkv_segments(arch, sources)
        start, stop = _share(name, sum(b - a for _, a, b in segments), tp_rank, tp_size)
        position = 0
        for part, first, last in segments:
            low, high = max(start, position), min(stop, position + last - first)
            if low < high:
                rows = (first + low - position, first + high - position)
                yield reader.read(sources[part], rows=rows)
            position += last - first


def merge_parameter(
    arch: Architecture, name: str, *, layer_offset: int, shards: Sequence[torch.Tensor], expert_offset: int = 0
) -> dict[str, torch.Tensor]:
    """The inverse of `load_parameter`: Hugging Face tensors from the shards of all ranks.

    ``shards``: those of every (expert) tensor-parallel rank, in rank order; of a replicated parameter the
    first is taken. Vocabulary padding is cut. The output layer of a tied model gives {}, its weight
    being exported as the embedding.
    Where a tensor holds all experts of a layer: the part of this one, [1, ...].
    Tensors keep the shards' dtype and device. ValueError where the shards do not add up to the
    architecture's shapes.
    """
    rows = merge_rows(arch, name, layer_offset=layer_offset, shards=shards, expert_offset=expert_offset)
    merged, expected = {source: _joined(pieces) for source, pieces in rows.items()}, dict(hf_tensor_shapes(arch))
    if holds_all_experts(arch, name):
        expected |= {source: (1, *expected[source][1:]) for source in merged}
    for source, tensor in merged.items():
        if tuple(tensor.shape) != expected[source]:
            raise ValueError(
                f"{name}: expected shards that make {source} of shape {list(expected[source])}, "
                f"got {list(tensor.shape)}; pass the shards of every tensor-parallel rank in order"
            )
    return merged


def merge_rows(
    arch: Architecture, name: str, *, layer_offset: int, shards: Sequence[torch.Tensor], expert_offset: int = 0
) -> dict[str, Iterator[torch.Tensor]]:
    """The tensors of `merge_parameter`, each in pieces along its first dimension: the shards' own memory where rows
    were cut, some rows at a time where columns were.

    Shapes are not compared with the architecture's.
    """
    if not shards:
        raise ValueError(f"{name}: expected the shards of all tensor-parallel ranks, got none")
    if _is_tied_head(arch, name):
        return {}
    kind = _rule(name).kind
    sources = _sources(arch, name, layer_offset, expert_offset)
    merged: list[Iterable[torch.Tensor]]
    if holds_all_experts(arch, name):
        merged = [[(gate_up_slab if kind == _GATE_UP else down_slab)(shards)]]
    elif kind == _REPLICATED:
        merged = [[shards[0]]]
    elif kind == _COLUMNS:
        merged = [_side_by_side(shards)]
    elif kind == _ROWS:
        merged = [list(shards)]
    elif kind == _VOCABULARY:
        [run] = _cut(shards, [min(arch.vocab_size, sum(len(shard) for shard in shards))])
        merged = [run]
    elif kind == _GATE_UP:
        halves = [shard.chunk(2) for shard in shards]
        merged = [[half[part] for half in halves] for part in (0, 1)]
    else:
        segments = _qkv_segments(arch, sources)
        found, total = sum(len(shard) for shard in shards), sum(b - a for _, a, b in segments)
        if found != total:
            raise ValueError(
                f"{name}: expected {total} rows over all shards, got {found}; "
                "pass the shards of every tensor-parallel rank in order"
            )
        runs = _cut(shards, [last - first for _, first, last in segments])
        merged = [
            [piece for run, (part, _, _) in zip(runs, segments, strict=True) if part == wanted for piece in run]
            for wanted in (0, 1, 2)
        ]
    tensors: dict[str, Iterator[torch.Tensor]] = {}
    for source, pieces in zip(sources, merged, strict=True):
        tensors[source] = itertools.chain(tensors.get(source, ()), pieces)
    return tensors | {copy: iter(merged[0]) for copy in copy_names(arch, name)}


def _joined(pieces: Iterator[torch.Tensor]) -> torch.Tensor:
    found = list(pieces)
    return found[0] if len(found) == 1 else torch.cat(found)


def _cut(shards: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[list[torch.Tensor]]:
    """The rows of all shards in runs of these lengths, as views; a run that two shards share has two pieces."""
    runs, shard, row = [], 0, 0
    for length in lengths:
        run = []
        while length:
            piece = shards[shard][row : row + length]
            run.append(piece)
            length, row = length - len(piece), row + len(piece)
            if row == len(shards[shard]):
                shard, row = shard + 1, 0
        runs.append(run)
    return runs


def _side_by_side(shards: Sequence[torch.Tensor], block: int = 1 << 22) -> Iterator[torch.Tensor]:
    """The columns of all shards in one matrix, some rows, of about so many bytes, at a time."""
    step = max(block // (sum(shard.shape[1] for shard in shards) * shards[0].itemsize), 1)
    for row in range(0, len(shards[0]), step):
        yield torch.cat([shard[row : row + step] for shard in shards], dim=1)


def _rule(name: str) -> _Rule:
    match = _LAYER_NAME.fullmatch(name)
    part = "bias" if name.endswith(".bias") else "weight"
    if match is None and name in _OUTER:
        return _Rule(*_OUTER[name], part)
    if match is not None:
        own, is_further, layer = match["part"], match["further"] is not None, int(match["layer"])
        if is_further and own in _FURTHER:
            return _Rule(*_FURTHER[own], part, layer, is_further=True)
        if is_further:
            own = own.removeprefix(_INNER) if own.startswith(_INNER) else ""
        if own in _LAYER:
            return _Rule(*_LAYER[own], _PARTS.get(own, part), layer, is_further=is_further)
        expert = _LOCAL_EXPERT.fullmatch(own) or _GROUPED_EXPERT.fullmatch(own)
        if expert and expert["linear"] in _EXPERT:
            part = expert["linear"].partition(".")[2]
            return _Rule(*_EXPERT[expert["linear"]], part, layer, int(expert["expert"]), is_further)
    raise ValueError(
        f"expected the name of a Megatron GPTModel parameter, got {name!r}; it has no counterpart in a Hugging Face "
        "checkpoint"
    )


def _sources(arch: Architecture, name: str, layer_offset: int, expert_offset: int) -> tuple[str, ...]:
    """The Hugging Face tensors behind ``name``; ValueError where the architecture lacks one."""
    sources, shapes = _source_names(arch, name, layer_offset, expert_offset), hf_tensor_shapes(arch)
    for source in sources:
        if source not in shapes:
            raise ValueError(
                f"{name} (layer offset {layer_offset}, expert offset {expert_offset}): expected {source} in a "
                f"{arch.family} checkpoint of {arch.num_layers} layers, which has no such tensor; build the "
                "Megatron model from the checkpoint's own architecture"
            )
    return sources


def _source_names(arch: Architecture, name: str, layer_offset: int, expert_offset: int) -> tuple[str, ...]:
    rule, family = _rule(name), families.by_name(arch.family)
    roles = rule.roles
    if arch.latent is not None and roles == ("query_norm",):
        # Megatron has one name for the norm of query heads and that of the latent.
        roles = ("query_latent_norm",)
    place = {}
    if rule.layer is not None:
        place["layer"] = rule.layer + (arch.num_layers if rule.is_further else layer_offset)
    if holds_all_experts(arch, name):
        roles = _FUSED[roles]
    elif rule.expert is not None:
        place["expert"] = rule.expert + expert_offset
    return tuple(family.tensor(role, rule.part, **place) for role in roles)


def _is_tied_head(arch: Architecture, name: str) -> bool:
    return arch.tied and name == "output_layer.weight"


def _share(name: str, size: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    if size % tp_size:
        raise ValueError(f"{name}: expected a tensor-parallel size that divides {size}, got {tp_size}; choose another")
    share = size // tp_size
    return tp_rank * share, (tp_rank + 1) * share


def _qkv_segments(arch: Architecture, sources: Sequence[str]) -> list[tuple[int, int, int]]:
    """Megatron's grouped rows as (0 q | 1 k | 2 v, first row, last row + 1) of the HF tensors, which may be one."""
    groups, head = arch.num_query_groups, arch.head_dim
    sizes = (arch.num_attention_heads // groups * head, head, head)
    # Rows of the parts before each one in the same tensor.
    before = [sum(groups * sizes[i] for i in range(part) if sources[i] == sources[part]) for part in range(3)]
    return [
        (part, before[part] + group * size, before[part] + (group + 1) * size)
        for group in range(groups)
        for part, size in enumerate(sizes)
    ]


def _load_vocabulary(
    reader: HFReader,
    arch: Architecture,
    source: str,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
    expert_offset: int = 0,
) -> Iterator[torch.Tensor]:
    start, stop = _share(f"padded vocabulary of {source}", padded_vocab_size, tp_rank, tp_size)
    first, last = (min(edge, arch.vocab_size) for edge in (start, stop))
    if first < last:
        yield reader.read(source, rows=(first, last))
    if last - first < stop - start:
        yield torch.zeros(stop - start - (last - first), arch.hidden_size, dtype=reader.dtype(source))
