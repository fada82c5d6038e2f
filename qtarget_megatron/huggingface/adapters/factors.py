"""Adapters' factors between Hugging Face modules and Megatron's linear layers, in both directions.

Megatron's adapter beside a linear layer has the factors A [p r, in] of the layer's p adapted projections, one behind
the other, and B [out, r] in the order of the weight's rows, those of a projection without an adapter being 0. B is cut
by tensor parallelism as the rows of the weight are, A as its columns; the other one is whole on every rank. Everything
here is pure: no process groups, no Megatron.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from qtarget_megatron.huggingface.adapters.lora import Lora, adapted_modules, projections
from qtarget_megatron.huggingface.config.architecture import Architecture
from qtarget_megatron.huggingface.weights.parameter_map import (
    adapter_factor,
    hf_names,
    merge_rows,
    parameter_pieces,
    partition_dim,
)
from qtarget_megatron.huggingface.weights.reader import HFReader
from qtarget_megatron.huggingface.weights.tensors import hf_tensor_shapes


class Factors(Protocol):
    """Where the factors of a model's adapters come from."""

    def read(self, module: str, factor: str) -> Tensor:
        """A [r, in] or B [out, r] of a Hugging Face module."""


class InitialFactors:
    """Those that a training begins with: A as PEFT draws it, uniform in +-1/sqrt(in); B is 0.

    A is drawn from the seed and the module's name alone, so that it is the same at any layout.
    """

    def __init__(self, arch: Architecture, lora: Lora, seed: int):
        self._modules, self._rank, self._seed = adapted_modules(arch, lora), lora.rank, seed

    def read(self, module: str, factor: str) -> Tensor:
        rows, columns = self._modules[module]
        if factor == "B":
            return torch.zeros(rows, self._rank)
        digest = hashlib.sha256(f"{self._seed} {module}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(self._rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)


class _AsWeights:
    """One factor of all modules in the place of their weights, for those who cut weights; 0 without an adapter."""

    def __init__(
        self, factors: Factors, factor: str, modules: Mapping[str, tuple[int, int]], shapes: Mapping, rank: int
    ):
        self._factors, self._factor, self._modules, self._shapes, self._rank = factors, factor, modules, shapes, rank
        # A weight of several query groups is read in as many pieces.
        self._known: dict[str, Tensor] = {}

    def shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._shapes[name]
        return (rows, self._rank) if self._factor == "B" else (self._rank, columns)

    def read(self, name: str, rows=None, cols=None) -> Tensor:
        if name not in self._known:
            module, is_adapted = name.removesuffix(".weight"), name.removesuffix(".weight") in self._modules
            self._known[name] = (
                self._factors.read(module, self._factor) if is_adapted else torch.zeros(self.shape(name))
            )
        return self._known[name][slice(*rows or (None,)), slice(*cols or (None,))]


def load_factor(
    factors: Factors,
    arch: Architecture,
    lora: Lora,
    name: str,
    *,
    layer_offset: int,
    expert_offset: int,
    tp_rank: int,
    tp_size: int,
) -> Tensor:
    """This rank's shard of the Megatron parameter, an adapter's factor, that has this name; on the CPU."""
    weight, factor = adapter_factor(name)
    modules = adapted_modules(arch, lora)
    sources = hf_names(arch, weight, layer_offset=layer_offset, expert_offset=expert_offset)
    if partition_dim(weight) == (0 if factor == "B" else 1):
        # No more is asked of a reader than this one has.
        reader = cast(HFReader, _AsWeights(factors, factor, modules, hf_tensor_shapes(arch), lora.rank))
        pieces = parameter_pieces(
            reader,
            arch,
            weight,
            layer_offset=layer_offset,
            expert_offset=expert_offset,
            tp_rank=tp_rank,
            tp_size=tp_size,
            padded_vocab_size=0,
        )
        return torch.cat(list(pieces))
    wanted = [source.removesuffix(".weight") for source in dict.fromkeys(sources)]
    return torch.cat([factors.read(module, factor) for module in wanted if module in modules])


def merge_factor(
    arch: Architecture,
    lora: Lora,
    name: str,
    shards: Sequence[Tensor],
    *,
    layer_offset: int,
    expert_offset: int,
) -> dict[tuple[str, str], Tensor]:
    """The inverse of load_factor: (module, factor) -> A or B, from the shards of all tensor-parallel ranks in order."""
    weight, factor = adapter_factor(name)
    offsets = dict(layer_offset=layer_offset, expert_offset=expert_offset)
    modules, sources = adapted_modules(arch, lora), hf_names(arch, weight, **offsets)
    if partition_dim(weight) == (0 if factor == "B" else 1):
        merged = merge_rows(arch, weight, **offsets, shards=shards)
        found = {source.removesuffix(".weight"): torch.cat(list(pieces)) for source, pieces in merged.items()}
        return {(module, factor): values for module, values in found.items() if module in modules}
    numbers = projections(sources, arch, lora)
    count = len({number for number in numbers if number is not None})
    parts = shards[0].chunk(count) if factor == "A" else [shards[0]]
    return {
        (source.removesuffix(".weight"), factor): parts[number]
        for source, number in zip(sources, numbers, strict=True)
        if number is not None
    }
