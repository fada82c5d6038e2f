"""The mapping between Megatron parameters and Hugging Face tensors.

Written as data: which Hugging Face tensors a Megatron parameter is made of, and how tensor
parallelism cuts it. Both implementations of a Megatron layer (local, and Transformer Engine with
its norms fused into the following linear layer) are understood. Everything here is pure: no process
groups, no Megatron.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch

from qtarget_megatron.checkpoint.architecture import Architecture
from qtarget_megatron.checkpoint.hf_reader import HFReader

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# How tensor parallelism cuts a parameter, and along which dimension of the local shard.
_REPLICATED, _VOCABULARY, _QKV, _GATE_UP, _COLUMNS = (
    "replicated",
    "vocabulary",
    "qkv",
    "gate_up",
    "columns",
)
_PARTITION_DIM = {_REPLICATED: None, _VOCABULARY: 0, _QKV: 0, _GATE_UP: 0, _COLUMNS: 1}

_OUTER = {
    "embedding.word_embeddings.weight": (_VOCABULARY, (EMBEDDING,)),
    "output_layer.weight": (_VOCABULARY, (HEAD,)),
    "decoder.final_layernorm.weight": (_REPLICATED, ("model.norm.weight",)),
}
_INPUT_NORM = (_REPLICATED, ("input_layernorm.weight",))
_MLP_NORM = (_REPLICATED, ("post_attention_layernorm.weight",))
_LAYER = {
    "input_layernorm.weight": _INPUT_NORM,
    "self_attention.linear_qkv.layer_norm_weight": _INPUT_NORM,
    "self_attention.q_layernorm.weight": (_REPLICATED, ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": (_REPLICATED, ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": (_COLUMNS, ("self_attn.o_proj.weight",)),
    "self_attention.linear_proj.bias": (_REPLICATED, ("self_attn.o_proj.bias",)),
    "pre_mlp_layernorm.weight": _MLP_NORM,
    "mlp.linear_fc1.layer_norm_weight": _MLP_NORM,
    "mlp.linear_fc2.weight": (_COLUMNS, ("mlp.down_proj.weight",)),
    "mlp.linear_fc2.bias": (_REPLICATED, ("mlp.down_proj.bias",)),
} | {
    f"{megatron}.{part}": (kind, tuple(f"{module}.{part}" for module in modules))
    for part in ("weight", "bias")
    for megatron, kind, modules in (
        (
            "self_attention.linear_qkv",
            _QKV,
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ),
        ("mlp.linear_fc1", _GATE_UP, ("mlp.gate_proj", "mlp.up_proj")),
    )
}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Rule:
    kind: str
    layer: int | None  # local index
    hf_suffixes: tuple[str, ...]

    def sources(self, layer_offset: int) -> tuple[str, ...]:
        if self.layer is None:
            return self.hf_suffixes
        return tuple(f"model.layers.{self.layer + layer_offset}.{s}" for s in self.hf_suffixes)


def hf_tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint and its shape, in checkpoint order.

    Embedding, layers, final norm, and lm_head where the model is not tied.
    """
    return dict(_shapes(arch))


@lru_cache(maxsize=8)  # asked once per parameter, and a large model has thousands of tensors
def _shapes(arch: Architecture) -> Mapping[str, tuple[int, ...]]:
    hidden, ffn, head = arch.hidden_size, arch.ffn_hidden_size, arch.head_dim
    query, key = arch.num_attention_heads * head, arch.num_query_groups * head
    linears = (
        ("self_attn.q_proj", query, hidden, arch.qkv_bias),
        ("self_attn.k_proj", key, hidden, arch.qkv_bias),
        ("self_attn.v_proj", key, hidden, arch.qkv_bias),
        ("self_attn.o_proj", hidden, query, arch.output_bias),
        ("mlp.gate_proj", ffn, hidden, arch.mlp_bias),
        ("mlp.up_proj", ffn, hidden, arch.mlp_bias),
        ("mlp.down_proj", hidden, ffn, arch.mlp_bias),
    )
    layer: dict[str, tuple[int, ...]] = {}
    for module, rows, cols, bias in linears:
        layer[f"{module}.weight"] = (rows, cols)
        if bias:
            layer[f"{module}.bias"] = (rows,)
        if module == "self_attn.o_proj" and arch.qk_norm:
            layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (head,)
    layer["input_layernorm.weight"] = layer["post_attention_layernorm.weight"] = (hidden,)

    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (arch.vocab_size, hidden)}
    for i in range(arch.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tied:
        shapes[HEAD] = (arch.vocab_size, hidden)
    return MappingProxyType(shapes)


def partition_dim(name: str) -> int | None:
    """The dimension along which tensor parallelism cuts a Megatron parameter, None if replicated.

    ValueError for a name that has no counterpart in a Hugging Face checkpoint.
    """
    return _PARTITION_DIM[_rule(name).kind]


def hf_names(arch: Architecture, name: str, *, layer_offset: int) -> tuple[str, ...]:
    """The Hugging Face tensors that the Megatron parameter ``name`` is exported to.

    ``name`` carries the local layer index; ``layer_offset`` is the global index of local layer 0.
    Empty for the output layer of a tied model, whose weight is exported as the embedding.
    """
    if _is_tied_head(arch, name):
        return ()
    return _sources(arch, name, layer_offset)


def load_parameter(
    reader: HFReader,
    arch: Architecture,
    name: str,
    *,
    layer_offset: int,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
) -> torch.Tensor:
    """This tensor-parallel rank's shard of the Megatron parameter ``name``.

    CPU tensor in the checkpoint's dtype; reads only the slices the shard consists of.

    - vocabulary: rows [r P/tp, (r+1) P/tp) of the P = ``padded_vocab_size`` rows, zeros from the
      true vocabulary on; rows from P on are left out. The output layer of a tied model reads the embedding.
    - linear_qkv: the same contiguous share of the grouped rows (for each query group its query
      heads, then its key head, then its value head), also where a share cuts a group.
    - linear_fc1: this rank's share of the gate rows, then its share of the up rows.
    - linear_proj, linear_fc2: a share of the columns.
    - norms and row-parallel biases: whole.

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
) -> Iterator[torch.Tensor]:
    """The shard of `load_parameter` in pieces along its first dimension, each read when it is asked for.

    Whoever copies them to their place holds no more than one Hugging Face tensor beside the shard.
    """
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"expected a tensor-parallel rank in [0, {tp_size}), got {tp_rank}")
    kind = _rule(name).kind
    sources = (EMBEDDING,) if _is_tied_head(arch, name) else _sources(arch, name, layer_offset)
    if kind == _REPLICATED:
        yield reader.read(sources[0])
    elif kind == _VOCABULARY:
        yield from _load_vocabulary(reader, arch, sources[0], tp_rank, tp_size, padded_vocab_size)
    elif kind == _COLUMNS:
        columns = reader.shape(sources[0])[1]
        yield reader.read(sources[0], cols=_share(name, columns, tp_rank, tp_size))
    elif kind == _GATE_UP:
        rows = _share(name, arch.ffn_hidden_size, tp_rank, tp_size)
        for source in sources:
            yield reader.read(source, rows=rows)
    else:
        segments = _qkv_segments(arch)
        start, stop = _share(name, sum(b - a for _, a, b in segments), tp_rank, tp_size)
        position = 0
        for part, first, last in segments:
            low, high = max(start, position), min(stop, position + last - first)
            if low < high:
                rows = (first + low - position, first + high - position)
                yield reader.read(sources[part], rows=rows)
            position += last - first


def merge_parameter(
    arch: Architecture, name: str, *, layer_offset: int, shards: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The inverse of `load_parameter`: Hugging Face tensors from the shards of all ranks.

    ``shards``: those of every tensor-parallel rank, in rank order; of a replicated parameter the
    first is taken. Vocabulary padding is cut. The output layer of a tied model gives {}, its weight
    being exported as the embedding.
    Tensors keep the shards' dtype and device. ValueError where the shards do not add up to the
    architecture's shapes.
    """
    rows = merge_rows(arch, name, layer_offset=layer_offset, shards=shards)
    merged, expected = {source: _joined(pieces) for source, pieces in rows.items()}, _shapes(arch)
    for source, tensor in merged.items():
        if tuple(tensor.shape) != expected[source]:
            raise ValueError(
                f"{name}: expected shards that make {source} of shape {list(expected[source])}, "
                f"got {list(tensor.shape)}; pass the shards of every tensor-parallel rank in order"
            )
    return merged


def merge_rows(
    arch: Architecture, name: str, *, layer_offset: int, shards: Sequence[torch.Tensor]
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
    sources = _sources(arch, name, layer_offset)
    if kind == _REPLICATED:
        merged = [[shards[0]]]
    elif kind == _COLUMNS:
        merged = [_side_by_side(shards)]
    elif kind == _VOCABULARY:
        [run] = _cut(shards, [min(arch.vocab_size, sum(len(shard) for shard in shards))])
        merged = [run]
    elif kind == _GATE_UP:
        halves = [shard.chunk(2) for shard in shards]
        merged = [[half[part] for half in halves] for part in (0, 1)]
    else:
        segments = _qkv_segments(arch)
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
    return {source: iter(pieces) for source, pieces in zip(sources, merged, strict=True)}


def _joined(pieces: Iterator[torch.Tensor]) -> torch.Tensor:
    pieces = list(pieces)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


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


def check_tensors(reader: HFReader, arch: Architecture) -> None:
    """Raise ValueError unless the checkpoint holds exactly the tensors that config.json promises.

    Names, shapes and floating dtypes are compared; leftovers named rotary_emb.inv_freq are ignored.
    A tied model may also hold lm_head.weight, if it is equal to the embedding (only then are both
    read).
    """
    expected = _shapes(arch)
    present = {name for name in reader.names if not name.endswith("rotary_emb.inv_freq")}
    spare_head = arch.tied and HEAD in present
    problems = {
        "missing": [name for name in expected if name not in present],
        "unexpected": sorted(present - expected.keys() - ({HEAD} if spare_head else set())),
        "of wrong shape": [
            f"{name} (expected {list(shape)}, got {list(reader.shape(name))})"
            for name, shape in expected.items()
            if name in present and reader.shape(name) != shape
        ],
        "of wrong dtype": [
            f"{name} (expected a 16 or 32 bit float, got {reader.dtype(name)})"
            for name in expected
            if name in present and reader.dtype(name) not in _WEIGHT_DTYPES
        ],
    }
    found = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(
            f"{reader.directory}: expected the {len(expected)} tensors of a {arch.family} model "
            f"by its config.json, got {'; '.join(found)}; weights and config.json do not belong "
            "together"
        )
    if spare_head and not _equal_rows(reader, HEAD, EMBEDDING):
        raise ValueError(
            f"{reader.directory}: expected {HEAD} equal to {EMBEDDING} (tie_word_embeddings is "
            "true), got other values; set tie_word_embeddings to false if the head is meant to be "
            "its own"
        )


def _equal_rows(reader: HFReader, first: str, second: str, step: int = 8192) -> bool:
    if reader.shape(first) != reader.shape(second) or reader.dtype(first) != reader.dtype(second):
        return False
    total = reader.shape(first)[0]
    ranges = [(start, min(start + step, total)) for start in range(0, total, step)]
    return all(torch.equal(reader.read(first, rows=r), reader.read(second, rows=r)) for r in ranges)


def _rule(name: str) -> _Rule:
    match = _LAYER_NAME.fullmatch(name)
    table, key, layer = _OUTER, name, None
    if match:
        table, key, layer = _LAYER, match[2], int(match[1])
    if key not in table:
        raise ValueError(
            f"expected the name of a Megatron GPTModel parameter of a dense decoder, got "
            f"{name!r}; it has no counterpart in a Hugging Face checkpoint"
        )
    kind, suffixes = table[key]
    return _Rule(kind, layer, suffixes)


def _sources(arch: Architecture, name: str, layer_offset: int) -> tuple[str, ...]:
    """The Hugging Face tensors behind ``name``; ValueError where the architecture lacks one."""
    sources = _rule(name).sources(layer_offset)
    shapes = _shapes(arch)
    for source in sources:
        if source not in shapes:
            raise ValueError(
                f"{name} (layer offset {layer_offset}): expected {source} in a {arch.family} "
                f"checkpoint of {arch.num_layers} layers, which has no such tensor; build the "
                "Megatron model from the checkpoint's own architecture"
            )
    return sources


def _is_tied_head(arch: Architecture, name: str) -> bool:
    return arch.tied and name == "output_layer.weight"


def _share(name: str, size: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    if size % tp_size:
        raise ValueError(f"{name}: expected a tensor-parallel size that divides {size}, got {tp_size}; choose another")
    share = size // tp_size
    return tp_rank * share, (tp_rank + 1) * share


def _qkv_segments(arch: Architecture) -> list[tuple[int, int, int]]:
    """Megatron's grouped rows as (0 q | 1 k | 2 v, first row, last row + 1) of the HF tensors."""
    per_group, head = (
        arch.num_attention_heads // arch.num_query_groups * arch.head_dim,
        arch.head_dim,
    )
    return [
        (part, group * size, (group + 1) * size)
        for group in range(arch.num_query_groups)
        for part, size in ((0, per_group), (1, head), (2, head))
    ]


def _load_vocabulary(
    reader: HFReader,
    arch: Architecture,
    source: str,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
) -> Iterator[torch.Tensor]:
    start, stop = _share(f"padded vocabulary of {source}", padded_vocab_size, tp_rank, tp_size)
    first, last = (min(edge, arch.vocab_size) for edge in (start, stop))
    if first < last:
        yield reader.read(source, rows=(first, last))
    if last - first < stop - start:
        yield torch.zeros(stop - start - (last - first), arch.hidden_size, dtype=reader.dtype(source))
