"""Memory per rank of a fine-tuning, from a config.json and the flags of its layout; nothing is built.

Parameters are counted by the shapes of the checkpoint's tensors and how each is cut. The bytes for each of them are
those that Megatron allocates: its own formula (megatron.training.theoretical_memory_usage) assumes bfloat16 with
float32 gradients, sharded over data parallelism only, stages of one size and no biases. Activations are those of
plan_activations, for full recomputation, and for each stage's own number of micro-batches in flight; the loss and the
second model are those of qtarget_megatron.parallel_layout.

Not counted: buffers of NCCL, CUDA and the allocator, the micro-batch's tokens, and copies that the optimizer makes
while it steps, when the activations are gone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from qtarget_megatron.huggingface import Architecture, adapter_shard_numbers, linear_layers, shard_numbers
from qtarget_megatron.loss.memory import LossShape
from qtarget_megatron.megatron.planning.activations import Activations
from qtarget_megatron.megatron.runtime import launch
from qtarget_megatron.megatron.runtime.prepare import Run
from qtarget_megatron.objectives import Objective
from qtarget_megatron.parallel_layout import Layout


class RefusedError(Exception):
    """Megatron does not accept the flags."""


class Parameters(NamedTuple):
    """How many one rank has."""

    experts: int
    others: int


class Sizes:
    """Sizes of everything on each pipeline stage, once Megatron has accepted the flags.

    args: validated. in_flight: micro-batches of a stage, a fraction where its virtual stages hold different ones.
    """

    def __init__(self, run: Run, layout: Layout):
        self.args, self.layout, self.student, self.teacher = _validated(run.args), layout, run.student, run.teacher
        self.lora, self.teaches_itself = run.lora, run.args.teacher_self
        # The second model is the student of an earlier step.
        self.keeps_old_policy = run.objective.refresh > 0
        self.element = self.args.params_dtype.itemsize
        self.virtual = self.args.virtual_pipeline_model_parallel_size or 1
        self.micro_batches = self.args.global_batch_size // (layout.micro_batch_size * layout.data)
        with _refusals():
            self._config = _config(self.args, self.student)

    def layers(self, rank: int) -> list[range]:
        """The student's layers in each virtual stage of a pipeline rank."""
        from qtarget_megatron.megatron.model.stages import layers_of_stages

        with _refusals():
            return self._ranges(layers_of_stages(self._config), rank)

    def teacher_layers(self, rank: int) -> list[range]:
        from qtarget_megatron.megatron.model.stages import even_stages

        if self.teaches_itself or self.keeps_old_policy:
            return self.layers(rank)
        stages = even_stages(self.teacher.num_layers, self.layout.pipeline * self.virtual)
        return self._ranges([stage.count("decoder") for stage in stages], rank)

    def _ranges(self, counts: list[int], rank: int) -> list[range]:
        """Layers of a pipeline rank, from the number of layers in each virtual stage, in order."""
        ends = list(itertools.accumulate(counts))
        ranges = [range(end - count, end) for count, end in zip(counts, ends, strict=True)]
        return ranges[rank :: self.layout.pipeline]

    def in_flight(self, rank: int) -> float:
        waiting = self.layout.pipeline - rank - 1
        if self.virtual == 1:
            return min(self.micro_batches, waiting + 1)
        group = self.args.microbatch_group_size_per_vp_stage or self.layout.pipeline
        return min(self.micro_batches, (2 * waiting + (self.virtual - 1) * group + 1) / self.virtual)

    def parameters(self, rank: int, arch: Architecture, layers: Iterable[int]) -> Parameters:
        layout, experts = self.layout, arch.experts
        is_first, is_last = rank == 0, rank == layout.pipeline - 1
        matrices = 1 if is_first and is_last and arch.tied else is_first + is_last
        others = matrices * self.args.padded_vocab_size // layout.tensor * arch.hidden_size
        others += arch.hidden_size if is_last else 0
        of_experts = 0
        for layer in layers:
            # Transformer Engine's latent attention has whole projections where the local one cuts them.
            others += shard_numbers(
                arch, layer, tp_size=layout.tensor, whole_latents=self.args.transformer_impl != "local"
            )
            if experts is not None and experts.layers[layer]:
                numbers = 3 * arch.hidden_size * experts.ffn_hidden_size
                numbers += arch.hidden_size + 2 * experts.ffn_hidden_size if experts.bias else 0
                of_experts += numbers * experts.count // (layout.expert_parallel * layout.expert_tensor)
        return Parameters(of_experts, others)

    def adapters(self, layers: Iterable[int]) -> Parameters:
        """Numbers of the student's adapters; none where there are no adapters."""
        if self.lora is None:
            return Parameters(0, 0)
        of_experts, others, layout = 0, 0, self.layout
        for layer in layers:
            for path, linear in linear_layers(self.student, layer).items():
                is_expert = path.startswith("mlp.experts.")
                is_whole = linear.is_latent and self.args.transformer_impl != "local"
                ranks = layout.expert_tensor if is_expert else 1 if is_whole else layout.tensor
                numbers = adapter_shard_numbers(self.student, self.lora, linear, ranks)
                if is_expert:
                    of_experts += numbers * self.student.experts.count // layout.expert_parallel
                else:
                    others += numbers
        return Parameters(of_experts, others)

    def gradient_element(self) -> int:
        return 4 if self.args.accumulate_allreduce_grads_in_fp32 else self.element

    def optimizer_bytes(self, count: Parameters) -> int:
        """Adam's two moments, or the momentum of SGD, and a float32 copy."""
        states = 2 if self.args.optimizer == "adam" else int(self.args.sgd_momentum != 0)
        element = 4 * states + (4 if self.element < 4 else 0)
        if not self.args.use_distributed_optimizer:
            return element * sum(count)
        layout, instances = self.layout, self.args.num_distributed_optimizer_instances
        shards = layout.data * layout.context // instances
        return round(element * (count.others / shards + count.experts / (layout.expert_data // instances)))

    def activations(self, rank: int) -> int:
        """Kept for backward, of all micro-batches in flight."""
        args, kept, stored = self.args, self._activations(self.student), 0.0
        for layers in self.layers(rank):
            sizes = [self._layer(kept, layer) for layer in layers]
            inputs = self._recomputed(layers)
            is_cut = args.distribute_saved_activations and not self.layout.sequence_parallel
            stored += len(inputs) * kept.hidden_states() / (self.layout.tensor if is_cut else 1)
            stored += sum(sizes[sum(map(len, inputs)) :])
        stored += kept.embedding() if rank == 0 else 0
        stored += kept.final_norm() if rank == self.layout.pipeline - 1 else 0
        return round(stored * self.in_flight(rank))

    def backward(self, rank: int) -> int:
        """What backward makes on top: the layers that are recomputed at once, or their attention, and the gradients in
        a layer."""
        kept, most = self._activations(self.student), 0.0
        for layers in self.layers(rank):
            inputs = self._recomputed(layers)
            for together in inputs or ([layer] for layer in layers):
                again = sum(self._layer(kept, layer) for layer in together) if inputs else 0
                if not inputs and self._recomputes_attention():
                    again = kept.layer(together[0], recomputes_attention=False) - self._layer(kept, together[0])
                most = max(most, again + max(map(kept.gradients, together)))
        return round(most)

    def _recomputed(self, layers: range) -> list[range]:
        """The layers that full recomputation computes again, those together that are computed at once."""
        args = self.args
        if args.recompute_granularity != "full":
            return []
        if args.recompute_method == "block":
            return [layers[i : i + 1] for i in range(min(args.recompute_num_layers, len(layers)))]
        return [layers[i : i + args.recompute_num_layers] for i in range(0, len(layers), args.recompute_num_layers)]

    def _activations(self, arch: Architecture, *, trained: bool = True) -> Activations:
        return Activations(self.args, self.layout, arch, self.lora if trained else None)

    def _layer(self, kept: Activations, layer: int) -> float:
        return kept.layer(layer, recomputes_attention=self._recomputes_attention())

    def _recomputes_attention(self) -> bool:
        return self.args.recompute_granularity == "selective" and "core_attn" in self._config.recompute_modules

    def loss_shape(self, objective: Objective, *, entries: int = 0) -> LossShape:
        """With the live teacher, if any, unless entries of a cached one are given."""
        teacher = self.student if self.teaches_itself else self.teacher
        live = teacher is not None and not entries
        return LossShape(
            tokens=self.layout.tokens,
            hidden=self.student.hidden_size,
            columns=self.args.padded_vocab_size // self.layout.tensor,
            ranks=self.layout.tensor,
            sequence_parallel=self.layout.sequence_parallel,
            element=self.element,
            width=objective.request.width,
            gradient_element=self.gradient_element(),
            teacher_hidden=teacher.hidden_size if live else 0,
            entries=entries,
            on_cpu=self.args.cpu,
            frozen_head=self.lora is not None,
        )

    def teacher_items(self, rank: int) -> dict[str, int]:
        """A live teacher: its weights (none where the student teaches itself), one layer's forward, and the hidden
        states that it adds to what the stage receives (for each micro-batch in flight), makes, and gets back as
        gradient."""
        layers, layout = list(itertools.chain(*self.teacher_layers(rank))), self.layout
        teacher = self.student if self.teaches_itself else self.teacher
        kept = self._activations(teacher, trained=False)
        weights = 0 if self.teaches_itself else sum(self.parameters(rank, teacher, layers)) * self.element
        if self.keeps_old_policy and self.lora is not None:
            # The model beside the adapters is one.
            weights = sum(self.adapters(layers)) * self.element
        hidden = layout.tokens * teacher.hidden_size * self.element
        hidden //= layout.tensor if layout.sequence_parallel else 1
        received = 0 if rank == 0 else self.in_flight(rank)
        returned = 0 if rank == layout.pipeline - 1 else 1
        return {
            "teacher weights": weights,
            "teacher forward": round(max((self._layer(kept, layer) for layer in layers), default=0)),
            "teacher hidden states": round(hidden * (received + 1 + returned)),
        }


# ---- Megatron's side


def _validated(args: argparse.Namespace) -> argparse.Namespace:
    """A copy that Megatron has completed for args.world_size ranks."""
    args = copy.copy(args)
    with _refusals():
        launch.validate(args)
    return args


@contextlib.contextmanager
def _refusals():
    """Megatron's assertions and ValueErrors become RefusedError, in one line."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        raise RefusedError(launch.refusal(error)) from error


def _config(args: argparse.Namespace, arch: Architecture):
    """Megatron's config, which knows the layers of each stage. Without fused kernels: this machine need not have
    them."""
    from qtarget_megatron.megatron.model.build import transformer_config

    args = copy.copy(args)
    args.apply_rope_fusion = args.gradient_accumulation_fusion = args.masked_softmax_fusion = False
    return transformer_config(args, arch)
