"""The tensors of a Hugging Face checkpoint: names and shapes by its config.json, and whether they are there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch

from qtarget_megatron.huggingface.config import families
from qtarget_megatron.huggingface.config.architecture import Architecture
from qtarget_megatron.huggingface.config.family import CORRECTION, Family
from qtarget_megatron.huggingface.weights.reader import HFReader

Shape = tuple[int, ...]

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=8)  # asked once per parameter, and a large model has thousands of tensors
def hf_tensor_shapes(arch: Architecture) -> Mapping[str, Shape]:
    """Every tensor of the Hugging Face checkpoint and its shape, in checkpoint order; not to be changed.

    Embedding, layers, those that predict further tokens where they count, final norm, and the head where the model is
    not tied.
    """
    family = families.by_name(arch.family)
    matrix = (arch.vocab_size, arch.hidden_size)
    shapes: dict[str, Shape] = {family.tensor("embedding"): matrix}
    further = further_range(arch) if arch.has_further else ()
    for layer in (*range(arch.num_layers), *further):
        for name, (rows, *others) in _layer(arch, family, layer):
            # Roles may share a tensor: their rows lie one behind the other.
            rows += shapes[name][0] if name in shapes else 0
            shapes[name] = (rows, *others)
    for layer in further:
        for role in ("further_token_norm", "further_hidden_norm", "further_norm"):
            shapes[family.tensor(role, layer=layer)] = (arch.hidden_size,)
        shapes[family.tensor("further_projection", layer=layer)] = (arch.hidden_size, 2 * arch.hidden_size)
        for role in ("further_embedding", "further_head"):
            shapes[family.tensor(role, layer=layer)] = matrix
    shapes[family.tensor("final_norm")] = (arch.hidden_size,)
    if not arch.tied:
        shapes[family.tensor("head")] = matrix
    return MappingProxyType(shapes)


def further_range(arch: Architecture) -> range:
    """The layers that predict further tokens, as a checkpoint counts them."""
    return range(arch.num_layers, arch.num_layers + arch.further_layers)


def further_names(names: Iterable[str], arch: Architecture) -> list[str]:
    """Those of tensors of layers that predict further tokens, sorted."""
    prefixes = tuple(map(families.by_name(arch.family).layer_prefix, further_range(arch)))
    return sorted(name for name in names if name.startswith(prefixes))


def further_reader(directory: str | Path, arch: Architecture) -> HFReader | None:
    """The checkpoint of a directory, if it holds layers that predict further tokens; None where config.json has none,
    where there are no weights, and where those are not among them."""
    if not arch.further_layers or not any(Path(directory).glob("*.safetensors")):
        return None
    reader = HFReader(directory)
    return reader if further_names(reader.names, arch) else None


def tensor_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in a checkpoint of this dtype: the correction of a router's scores is always float32."""
    return torch.float32 if name.endswith(f".{CORRECTION}") else dtype


def _layer(arch: Architecture, family: Family, layer: int) -> Iterator[tuple[str, Shape]]:
    hidden = arch.hidden_size

    def linear(role: str, rows: int, columns: int, bias: bool = False, **expert: int) -> Iterator[tuple[str, Shape]]:
        yield family.tensor(role, "weight", layer=layer, **expert), (rows, columns)
        if bias:
            yield family.tensor(role, "bias", layer=layer, **expert), (rows,)

    head, latent = arch.head_dim, arch.latent
    query, key = arch.num_attention_heads * head, arch.num_query_groups * head
    if latent is None:
        yield from linear("query", query, hidden, arch.qkv_bias)
        yield from linear("key", key, hidden, arch.qkv_bias)
        yield from linear("value", key, hidden, arch.qkv_bias)
        yield from linear("attention_output", hidden, query, arch.output_bias)
    else:
        yield from linear("query_down", latent.query_rank, hidden)
        yield family.tensor("query_latent_norm", layer=layer), (latent.query_rank,)
        yield from linear("query_up", query, latent.query_rank)
        yield from linear("key_value_down", latent.key_value_rank + latent.rotary_dim, hidden)
        yield family.tensor("key_value_norm", layer=layer), (latent.key_value_rank,)
        of_head = latent.plain_dim + latent.value_dim
        yield from linear("key_value_up", arch.num_attention_heads * of_head, latent.key_value_rank)
        yield from linear("attention_output", hidden, arch.num_attention_heads * latent.value_dim)
    if arch.qk_norm:
        yield family.tensor("query_norm", layer=layer), (head,)
        yield family.tensor("key_norm", layer=layer), (head,)
    if arch.sinks:
        yield family.tensor("sinks", layer=layer), (arch.num_attention_heads,)
    experts = arch.experts
    if experts is None or not arch.has_experts(layer):
        ffn = arch.ffn_hidden_size
        yield from linear("gate", ffn, hidden, arch.mlp_bias)
        yield from linear("up", ffn, hidden, arch.mlp_bias)
        yield from linear("down", hidden, ffn, arch.mlp_bias)
    else:
        ffn = experts.ffn_hidden_size
        yield from linear("router", experts.count, hidden, experts.bias)
        if experts.has_correction:
            yield family.tensor("router", CORRECTION, layer=layer), (experts.count,)
        for role, before, behind in (("experts_gate_up", hidden, 2 * ffn), ("experts_down", ffn, hidden)):
            if experts.fused:
                yield family.tensor(role, layer=layer), (experts.count, before, behind)
            if experts.fused and experts.bias:
                yield family.tensor(role, "bias", layer=layer), (experts.count, behind)
        for expert in range(0 if experts.fused else experts.count):
            yield from linear("expert_gate", ffn, hidden, expert=expert)
            yield from linear("expert_up", ffn, hidden, expert=expert)
            yield from linear("expert_down", hidden, ffn, expert=expert)
        if experts.shared_ffn_hidden_size is not None:
            yield from linear("shared_gate", experts.shared_ffn_hidden_size, hidden)
            yield from linear("shared_up", experts.shared_ffn_hidden_size, hidden)
            yield from linear("shared_down", hidden, experts.shared_ffn_hidden_size)
        if experts.shared_weight:
            yield from linear("shared_weight", 1, hidden)
    yield family.tensor("input_norm", layer=layer), (hidden,)
    yield family.tensor("mlp_norm", layer=layer), (hidden,)
    if arch.output_norms:
        yield family.tensor("attention_output_norm", layer=layer), (hidden,)
        yield family.tensor("mlp_output_norm", layer=layer), (hidden,)


def check_tensors(reader: HFReader, arch: Architecture) -> list[str]:
    """The tensors that are left out, those of layers that predict further tokens where these do not count; by name,
    sorted.

    Raises ValueError unless the checkpoint holds exactly the others that config.json promises: names, shapes and
    floating dtypes are compared, leftovers named rotary_emb.inv_freq are ignored. A tied model may also hold a head, if
    it is equal to the embedding (only then are both read).
    """
    family = families.by_name(arch.family)
    _check_fused(reader, arch)
    head, embedding = family.tensor("head"), family.tensor("embedding")
    expected = hf_tensor_shapes(arch)
    present = {name for name in reader.names if not name.endswith("rotary_emb.inv_freq")}
    left_out = [] if arch.has_further else further_names(present, arch)
    present.difference_update(left_out)
    spare_head = arch.tied and head in present
    problems = {
        "missing": [name for name in expected if name not in present],
        "unexpected": sorted(present - expected.keys() - ({head} if spare_head else set())),
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
    if spare_head and not _equal_rows(reader, head, embedding):
        raise ValueError(
            f"{reader.directory}: expected {head} equal to {embedding} (tie_word_embeddings is "
            "true), got other values; set tie_word_embeddings to false if the head is meant to be "
            "its own"
        )
    return left_out


def _check_fused(reader: HFReader, arch: Architecture) -> None:
    """ValueError where the experts of a layer lie in one tensor, as transformers has them in memory."""
    fused = [name for name in reader.names if name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"))]
    if arch.experts is not None and not arch.experts.fused and fused:
        raise ValueError(
            f"{reader.directory}: expected tensors of each expert, got {fused[0]} of all experts of a layer: the model "
            "was saved with save_original_format=False; load it with transformers and save it without that"
        )


def _equal_rows(reader: HFReader, first: str, second: str, step: int = 8192) -> bool:
    if reader.shape(first) != reader.shape(second) or reader.dtype(first) != reader.dtype(second):
        return False
    total = reader.shape(first)[0]
    ranges = [(start, min(start + step, total)) for start in range(0, total, step)]
    return all(torch.equal(reader.read(first, rows=r), reader.read(second, rows=r)) for r in ranges)
