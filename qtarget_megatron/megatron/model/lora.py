"""Low-rank adapters beside Megatron's parallel linear layers, local and Transformer Engine's.

    y = W x + s B A dropout(x)

An adapter is a part of its linear layer, `<layer>.lora`, whose factors lie as huggingface/adapters/factors.py says.
With n tokens, r the rank, p the projections in the layer, and tensor parallelism of T ranks:

    W cut along rows     A [p r, in] whole, B [out / T, r] cut; what travels is A x, p r numbers a token, not in
    W cut along columns  A [r, in / T] cut, B [out, r] whole; what travels is the sum of A x, r numbers a token, not out
    experts              as above, and nothing travels but the gradient of the factor that is whole: the dispatcher adds
                         up what the ranks of an expert have, and spreads tokens over them

The factor that is whole is the smaller one wherever a layer is wider inside than outside; cutting it along r instead
would have to gather x [n, in] under sequence parallelism, which the linear layer does within itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from qtarget_megatron.huggingface import Architecture, LinearLayer, Lora, linear_layers_of_model, projections

# A linear layer within a layer of either class of models, and within one of its experts.
_PATH = re.compile(r"decoder\.layers\.\d+\.(?P<path>(self_attention|mlp)\.(.+\.)?linear_\w+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.\d+\.")


class Adapters:
    """All adapters of a model chunk; while not on, they are left out.

    lora: what they are.
    """

    def __init__(self, lora: Lora):
        self.lora = lora
        self.on = True


class Adapter(torch.nn.Module):
    """The adapter of one linear layer, or of each of the experts whose layers Transformer Engine has in one.

    Parameters: A and B as the module's docstring says, of experts that are in one A0, B0, A1, ...; in the dtype of the
    weight.

    Collectives: over the layer's tensor-parallel group, see the module's docstring.
    """

    _places: Tensor | None

    def __init__(
        self,
        linear: Any,
        layer: LinearLayer,
        numbers: tuple[int | None, ...],
        adapters: Adapters,
        model: LanguageModule,
        is_expert: bool,
    ):
        """numbers: which A the rows of each of the layer's sources read, see projections(). model: that it is in."""
        super().__init__()
        weights = [linear.weight] if getattr(linear, "weight", None) is not None else list(_grouped_weights(linear))
        self._adapters, self._cut, self._is_gated, self._is_expert = adapters, layer.cut, layer.is_gated, is_expert
        self._group: ProcessGroup = _tensor_group(linear)
        self._experts_group, self._expert_data_group = model.pg_collection.ep, model.pg_collection.expt_dp
        rows, columns = weights[0].shape
        # Transformer Engine's projections to latents are whole on every rank.
        self._is_whole = layer.is_latent and rows == layer.rows and self._group.size() > 1
        self._ranks = 1 if self._is_whole else self._group.size()
        self._sequence = model.config.sequence_parallel and self._group.size() > 1 and not is_expert
        count, rank = len({number for number in numbers if number is not None}), adapters.lora.rank
        if layer.cut == 1:
            runs: list[tuple[int, int]] = [(0, rows)]
        else:
            runs = layer.rows_of_rank(0 if self._is_whole else self._group.rank(), self._ranks)
        owners = torch.cat(
            [torch.full((length,), -1 if numbers[source] is None else numbers[source]) for source, length in runs]
        )
        # [out, p], 1 where a row of B reads that A; None where all read the only one.
        places = (owners[:, None] == torch.arange(count)).to(weights[0].device, weights[0].dtype)
        self.register_buffer("_places", None if count == 1 and bool(places.all()) else places, persistent=False)
        self._names = [("A", "B")] if weights[0] is getattr(linear, "weight", None) else []
        self._names = self._names or [(f"A{i}", f"B{i}") for i in range(len(weights))]
        for names, weight in zip(self._names, weights, strict=True):
            for name, shape in zip(names, ((count * rank, columns), (rows, rank)), strict=True):
                self._add(name, shape, weight)

    @property
    def is_on(self) -> bool:
        return self._adapters.on

    def _add(self, name: str, shape: tuple[int, int], weight: Tensor) -> None:
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        is_cut = self._cut == (0 if name[0] == "B" else 1) and not self._is_whole
        # Megatron's marks: how gradients are added up, and whose count in their norm.
        marks: dict[str, Any] = dict(tensor_model_parallel=is_cut, allreduce=getattr(weight, "allreduce", True))
        if is_cut:
            marks |= dict(partition_dim=self._cut, partition_stride=1)
        else:
            marks |= dict(sequence_parallel=self._sequence)
        for mark, value in marks.items():
            setattr(parameter, mark, value)
        self.register_parameter(name, parameter)

    def forward(self, hidden: Tensor, output: Tensor, splits: Any = None) -> Tensor:
        """What the linear layer gives with its adapter.

        hidden: the layer's input [..., in].
        output: [..., out] without the adapter.
        splits: tokens of each expert, where several are in one.
        """
        if len(self._names) == 1:
            return self._added(hidden, output, *self._factors(0))
        sizes = [int(size) for size in (splits.tolist() if isinstance(splits, Tensor) else splits)]
        parts = zip(hidden.split(sizes), output.split(sizes), strict=True)
        return torch.cat([self._added(x, y, *self._factors(i)) for i, (x, y) in enumerate(parts)])

    def _factors(self, index: int) -> tuple[Tensor, Tensor]:
        first, second = (getattr(self, name) for name in self._names[index])
        if self._is_expert and self._group.size() > 1:
            # The gradient of the one that is whole is added up over the ranks that have the same expert.
            if self._cut == 0:
                first = copy_to_tensor_model_parallel_region(first, group=self._group)
            else:
                second = copy_to_tensor_model_parallel_region(second, group=self._group)
        return first, self._spread(second)

    def _spread(self, second: Tensor) -> Tensor:
        """[out, p r] of B [out, r]: each row at the place of the A that it reads, so that one product serves all."""
        if self._places is None:
            return second
        return (self._places.to(second.dtype)[:, :, None] * second[:, None, :]).flatten(1)

    def _added(self, hidden: Tensor, output: Tensor, first: Tensor, second: Tensor) -> Tensor:
        inner = F.linear(self._dropped(hidden), first)
        if self._ranks > 1 and not self._is_expert:
            if self._cut == 0:
                enter = gather_from_sequence_parallel_region if self._sequence else copy_to_tensor_model_parallel_region
            elif self._sequence:
                enter = reduce_scatter_to_sequence_parallel_region
            else:
                enter = reduce_from_tensor_model_parallel_region
            inner = enter(inner, group=self._group)
        scale = self._adapters.lora.scale
        return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), second.t(), alpha=scale).view(output.shape)

    def _dropped(self, hidden: Tensor) -> Tensor:
        probability = self._adapters.lora.dropout
        if not self.training or probability == 0:
            return hidden
        # Ranks that hold other tokens or other features drop others of them.
        if self._sequence or (self._cut == 1 and self._ranks > 1):
            with get_cuda_rng_tracker().fork():
                return F.dropout(hidden, probability)
        return F.dropout(hidden, probability)

    @torch.no_grad()
    def merge(self, linear: Any) -> None:
        """Add s B A to the weights that this rank has, in their dtype, computed in float32."""
        weights = [linear.weight] if len(self._names) == 1 else list(_grouped_weights(linear))
        for weight, (first, second) in zip(weights, self._names, strict=True):
            product = self._spread(getattr(self, second).float()) @ getattr(self, first).float()
            weight.copy_(weight.float() + self._adapters.lora.scale * product)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The factors, cut as the linear layer's weight is; of experts that are in one, those of each."""
        metadata = metadata or {}
        if len(self._names) == 1:
            return self._sharded(dict(zip("AB", self._names[0], strict=True)), prefix, sharded_offsets, metadata)
        singletons = metadata.get("singleton_local_shards", False)
        found: ShardedStateDict = {}
        group = self._experts_group
        for index, names in enumerate(self._names):
            expert, experts = group.rank() * len(self._names) + index, group.size() * len(self._names)
            offsets = sharded_offsets if singletons else (*sharded_offsets, (len(sharded_offsets), expert, experts))
            state = self._sharded(dict(zip("AB", names, strict=True)), prefix, offsets, metadata)
            if singletons:
                replace_prefix_for_sharding(state, prefix, f"{expert}.{prefix}")
            for tensor in state.values():
                tensor.replica_id = (*tensor.replica_id[:2], self._expert_data_group.rank())
            found |= {f"{prefix}{name}": state[f"{prefix}{factor}"] for factor, name in zip("AB", names, strict=True)}
        return found

    def _sharded(self, names: dict[str, str], prefix: str, offsets: tuple, metadata: dict) -> ShardedStateDict:
        state = make_sharded_tensors_for_checkpoint(
            {factor: getattr(self, name) for factor, name in names.items()},
            prefix,
            {} if self._is_whole else {"B": 0} if self._cut == 0 else {"A": 1},
            offsets,
            tp_group=self._group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self._is_gated:
            key, singletons = f"{prefix}B", metadata.get("singleton_local_shards", False)
            state[key] = apply_swiglu_sharded_factory(state[key], offsets, singletons, tp_group=self._group)
        return state


class _WithAdapter:
    """What a linear layer's class gets to have an adapter. Its checkpoints hold the adapter alone."""

    lora: Adapter

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(hidden, *arguments, **keywords)  # type: ignore[misc]
        if not self.lora.is_on:
            return output, bias
        # Layers of experts that are in one are told how many tokens each of them has.
        return self.lora(hidden, output, *arguments[:1]), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        return self.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)


@cache
def _with_adapter(base: Any) -> Any:
    return type(f"{base.__name__}WithAdapter", (_WithAdapter, base), {})


def add_adapters(model: LanguageModule, arch: Architecture, lora: Lora) -> Adapters:
    """Freeze a model chunk, and put adapters, whose factors are 0, beside its linear layers.

    arch: the model's. The embedding's output takes part in autograd, so that layers which are computed again in
    backward get gradients although nothing before them is trained.
    """
    adapters = Adapters(lora)
    layers = linear_layers_of_model(arch)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        match = _PATH.fullmatch(name)
        if match is None:
            continue
        path = _EXPERT.sub("mlp.experts.", match["path"])
        layer = layers.get(path)
        numbers = () if layer is None else projections(layer.sources, arch, lora)
        if set(numbers) <= {None}:
            continue
        is_expert = path.startswith("mlp.experts.")
        module.lora = Adapter(module, layer, numbers, adapters, model, is_expert)
        module.__class__ = _with_adapter(type(module))  # type: ignore[arg-type]  # a class is hashable
    if model.pre_process:
        model.embedding.register_forward_hook(_join_autograd)
    return adapters


def _join_autograd(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)


def adapted_layers(model: torch.nn.Module) -> Iterator[Any]:
    """The linear layers of a model that have an adapter, each with its `lora`."""
    yield from (module for module in model.modules() if isinstance(module, _WithAdapter))


def merge_adapters(model: torch.nn.Module) -> None:
    """Add every adapter to its layer's weight; the adapters stay what they are."""
    for layer in adapted_layers(model):
        layer.lora.merge(layer)


def _grouped_weights(linear: Any) -> Iterator[Tensor]:
    yield from (getattr(linear, f"weight{index}") for index in range(linear.num_gemms))


def _tensor_group(linear: Any) -> ProcessGroup:
    group = getattr(linear, "tp_group", None)
    return linear._tp_group if group is None else group
