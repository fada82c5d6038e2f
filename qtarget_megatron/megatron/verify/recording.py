"""What a fine-tuning computes in each step: gradients, and its weights at the end, as whole tensors by their Hugging
Face names.

Gradients are read when Megatron has finished them: summed over all ranks and divided, neither clipped nor used.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.utils import get_model_config
from torch import Tensor

from qtarget_megatron.huggingface import Architecture, Lora, adapter_factor, is_expert, merge_factor, merge_parameter
from qtarget_megatron.huggingface.adapters.peft_directory import tensor_name
from qtarget_megatron.megatron.weights.fingerprint import MASTER, distributed_shares, optimizer_states
from qtarget_megatron.megatron.weights.hf_weights import adapters, first_indices, saved, shard_group, tensor_share
from qtarget_megatron.megatron.weights.layer_names import named_parameters

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
Named = list[tuple[str, Tensor]]


class Recording:
    """Records one training on this rank; hand it to finetune.fine_tune(). Of a model with adapters those are recorded,
    by their names in a PEFT directory.

    gradients: of each step, name and float32 tensor on the CPU of all that this rank has a share of. A tied output head
               on a stage of its own goes by the name of the embedding.
    weights:   the same after the last step, in the optimizer's precision.
    losses:    of each step, (sum, number of tokens) of each micro-batch; of ranks of the last stage.

    Communicates: shards over the (expert) tensor-parallel group; under a distributed optimizer shares of them over the
    data-parallel one.
    """

    def __init__(self) -> None:
        self.gradients: list[Named] = []
        self.weights: Named = []
        self.losses: list[list[tuple[float, int]]] = []
        self._sums: list[tuple[float, int]] = []
        self._installed: set[int] = set()
        self._args: argparse.Namespace | None = None
        self._models: Sequence[LanguageModule] = ()
        self._arch: Architecture | None = None
        self._lora: Lora | None = None
        self._optimizer: Any = None

    def watched(
        self,
        forward_step: Callable,
        args: argparse.Namespace,
        models: Sequence[LanguageModule],
        arch: Architecture,
        lora: Lora | None = None,
    ) -> Callable:
        """The forward step of a training, which is recorded from its first call on. models: the chunks of this rank,
        which may be built later."""
        self._args, self._models, self._arch, self._lora = args, models, arch, lora

        def recorded(data_iterator: Any, model: Any) -> tuple[Tensor, Callable]:
            self._install(get_model_config(model))
            output, loss_function = forward_step(data_iterator, model)

            def loss(*arguments: Any, **keywords: Any) -> tuple:
                result = loss_function(*arguments, **keywords)
                self._sums.append((result[0].item(), int(result[1].item())))
                return result

            return output, loss

        return recorded

    def _install(self, config: Any) -> None:
        """Have the gradients recorded whenever Megatron has finished them."""
        if id(config) in self._installed:
            return
        self._installed.add(id(config))
        # train() binds the optimizer's method.
        self._optimizer = config.grad_scale_func.__self__
        finalize = config.finalize_model_grads_func

        def recorded(*arguments: Any, **keywords: Any) -> None:
            finalize(*arguments, **keywords)
            self._record_gradients()

        config.finalize_model_grads_func = recorded

    def _record_gradients(self) -> None:
        scale = float(self._optimizer.get_loss_scale())
        shares = {id(parameter): share for parameter, share in distributed_shares(self._optimizer)}

        def value(parameter: Tensor) -> Tensor:
            gradient = parameter.main_grad.detach().float() / scale  # type: ignore[attr-defined]  # Megatron's
            if not self._args.use_distributed_optimizer:
                return gradient
            # What is outside of this rank's share has not been summed.
            share = shares.get(id(parameter))
            begin, end = (0, 0) if share is None else (share.start, share.end)
            return _placed(parameter, begin, gradient.reshape(-1)[begin:end])

        trained = named_parameters if self._lora is None else adapters
        self.gradients.append(self._whole(trained, value, lambda parameter: True))
        self.losses.append(self._sums)
        self._sums = []

    def finish(self) -> None:
        """Record the weights; call it on every rank when the training has ended."""
        masters = {
            id(parameter): (start, tensors[MASTER])
            for parameter, start, tensors, _ in optimizer_states(self._optimizer)
            if MASTER in tensors
        }

        def value(parameter: Tensor) -> Tensor:
            if not _has_master(parameter):
                return parameter.detach().float()
            # Under a distributed optimizer another rank has a share where this one has none.
            return _placed(parameter, *masters.get(id(parameter), (0, parameter.new_empty(0))))

        self.weights = self._whole(lambda model: saved(model, self._arch), value, _has_master)

    def _whole(
        self,
        named: Callable[[LanguageModule], Iterable[tuple[str, Tensor]]],
        value: Callable[[Tensor], Tensor],
        is_shared: Callable[[Tensor], bool],
    ) -> Named:
        """Whole tensors of this rank's parameters. value: of a parameter, on this rank; is_shared: whether a
        distributed optimizer cuts it."""
        found: Named = []
        for model in self._models:
            for name, parameter in named(model):
                shard = value(parameter)
                if self._args.use_distributed_optimizer and is_shared(parameter):
                    dist.all_reduce(shard, group=_sharing_group(name))
                shards = [shard]
                if tensor_share(model, self._arch, name, parameter)[1] > 1:
                    group = shard_group(model, name)
                    shards = [torch.empty_like(shard) for _ in range(group.size())]
                    dist.all_gather(shards, shard.contiguous(), group=group)
                offsets = first_indices(model, self._arch)
                if adapter_factor(name) is not None:
                    factors = merge_factor(self._arch, self._lora, name, shards, **offsets)
                    merged = {tensor_name(*which): values for which, values in factors.items()}
                else:
                    read_as = _EMBEDDING if self._arch.tied and name == _HEAD else name
                    merged = merge_parameter(self._arch, read_as, shards=shards, **offsets)
                found += [(hf_name, tensor.to("cpu", copy=True)) for hf_name, tensor in merged.items()]
        return found


def _has_master(parameter: Tensor) -> bool:
    """Whether Megatron's optimizers keep a float32 copy of it."""
    return isinstance(parameter, torch.nn.Parameter) and parameter.dtype != torch.float32


def _placed(parameter: Tensor, begin: int, values: Tensor) -> Tensor:
    """float32, like the parameter: the values from an element on, 0 elsewhere."""
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    whole[begin : begin + values.numel()] = values.detach().reshape(-1)
    return whole.view(parameter.shape)


def _sharing_group(name: str) -> dist.ProcessGroup:
    """The ranks among which a distributed optimizer shares a parameter."""
    if is_expert(name):
        return parallel_state.get_expert_data_parallel_group(partial_expert_data_parallel=True)
    return parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)
