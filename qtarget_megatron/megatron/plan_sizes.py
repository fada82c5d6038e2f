"""Memory per rank and traffic of a fine-tuning, from a config.json and the flags of its layout; nothing is built.

Weights and activations come from Megatron's own formulas (megatron.training.theoretical_memory_usage), applied to one
pipeline stage at a time. What these leave out is added here:

* parameters: biases of query/key/value, norms of queries and keys, uneven stages, the embedding that a tied model has
  on its last stage as well; Megatron charges the final norm to every stage.
* bytes per parameter: Megatron assumes bfloat16 with float32 gradients, sharded over data parallelism only. Here:
  float32 training, 16-bit gradients, optimizer state sharded over context parallelism too.
* activations: context parallelism, full recomputation, each stage's own number of micro-batches in flight, float32,
  and the attention scores of Megatron's local layers, one number each.
* the loss and the second model, from qtarget_megatron.planning.

The activations are an estimate, the rest is what is allocated. Megatron's formula leaves out a third of a gated MLP
(4 bytes per token and unit of its width, not 6) and counts dropout masks and key/value heads that are not there. For
Llama 3 8B with Transformer Engine these cancel but for a fifteenth: 32 h bytes per token and layer against 34 h counted
by hand. It is too low for local layers, whose norms, rotations and gates are not fused: on the CPU, for a small model,
0.68 to 0.93 of what was kept for backward in float32 and 0.55 to 0.7 in bfloat16 (tests/test_plan.py), and the peak in
backward was an eighth to a fifth above that.

Not counted: buffers of NCCL, CUDA and the allocator, the micro-batch's tokens, and copies that the optimizer makes
while it steps, when the activations are gone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import traceback

from qtarget_megatron.checkpoint import Architecture
from qtarget_megatron.objectives import Objective
from qtarget_megatron.planning import Layout, LossShape


class RefusedError(Exception):
    """Megatron does not accept the flags."""


class Sizes:
    """Sizes of everything on each pipeline stage, once Megatron has accepted the flags.

    args: validated. in_flight: micro-batches of a stage, a fraction where its virtual stages hold different ones.
    """

    def __init__(self, args: argparse.Namespace, layout: Layout, student: Architecture, teacher: Architecture | None):
        self.args, self.layout, self.student, self.teacher = _validated(args), layout, student, teacher
        self.element = self.args.params_dtype.itemsize
        self.virtual = self.args.virtual_pipeline_model_parallel_size or 1
        self.micro_batches = self.args.global_batch_size // (layout.micro_batch_size * layout.data)
        with _refusals():
            self._config = _config(self.args, student)

    def layers(self, rank: int) -> list[int]:
        """The student's layers in each virtual stage of a pipeline rank."""
        from megatron.core.transformer.enums import LayerType
        from megatron.core.transformer.transformer_block import get_num_layers_to_build

        stated = self._config.pipeline_model_parallel_layout
        if stated is not None:
            return [chunk.count(LayerType.decoder) for chunk in stated.layout[rank]]
        with _refusals():
            return [get_num_layers_to_build(self._config, chunk, rank) for chunk in range(self.virtual)]

    def teacher_layers(self, rank: int) -> int:
        from qtarget_megatron.megatron.model import even_stages

        stages = even_stages(self.teacher.num_layers, self.layout.pipeline * self.virtual)
        return sum(stage.count("decoder") for stage in stages[rank :: self.layout.pipeline])

    def in_flight(self, rank: int) -> float:
        waiting = self.layout.pipeline - rank - 1
        if self.virtual == 1:
            return min(self.micro_batches, waiting + 1)
        group = self.args.microbatch_group_size_per_vp_stage or self.layout.pipeline
        return min(self.micro_batches, (2 * waiting + (self.virtual - 1) * group + 1) / self.virtual)

    def parameters(self, rank: int, arch: Architecture, layers: int) -> int:
        """Of one rank."""
        is_first, is_last = rank == 0, rank == self.layout.pipeline - 1
        matrices = 1 if is_first and is_last and arch.tied else is_first + is_last
        return count_parameters(self.args, arch, layers, matrices=matrices, is_last=is_last)

    def gradient_element(self) -> int:
        return 4 if self.args.accumulate_allreduce_grads_in_fp32 else self.element

    def optimizer_element(self) -> float:
        """Bytes for each of a rank's parameters: Adam's two moments, or the momentum of SGD, and a float32 copy."""
        states = 2 if self.args.optimizer == "adam" else int(self.args.sgd_momentum != 0)
        whole = 4 * states + (4 if self.element < 4 else 0)
        if not self.args.use_distributed_optimizer:
            return whole
        shards = self.layout.data * self.layout.context // self.args.num_distributed_optimizer_instances
        return whole / shards

    def activations(self, rank: int) -> int:
        """Megatron's estimate, and what it leaves out (see the module), of all micro-batches in flight."""
        args, hidden = self.args, self.layout.tokens * self.student.hidden_size * self.element
        layer = self.layer_bytes(self.student)
        stored, live = 0.0, 0.0
        for layers in self.layers(rank):
            recomputed, inputs = 0, 0
            if args.recompute_granularity == "full":
                size = args.recompute_num_layers
                by_block = args.recompute_method == "block"
                recomputed = min(size, layers) if by_block else layers
                inputs = recomputed if by_block else math.ceil(layers / size)
                # Of what is recomputed at once.
                live = max(live, layer * (min(recomputed, 1) if by_block else min(size, layers)))
            shared = self.layout.sequence_parallel or args.distribute_saved_activations
            stored += inputs * hidden / (self.layout.tensor if shared else 1) + (layers - recomputed) * layer
        if rank == 0:
            stored += _one_forward(args, self.layout, self.student, 0) * self.element / 2
        return round(stored * self.in_flight(rank) + live)

    def layer_bytes(self, arch: Architecture) -> float:
        """Of one layer and micro-batch, as far as kept for backward."""
        args, layout = self.args, self.layout
        megatrons = _one_forward(args, layout, arch, 1) - _one_forward(args, layout, arch, 0)
        recomputes = args.recompute_granularity == "selective" and "core_attn" in self._config.recompute_modules
        if args.transformer_impl == "local" and not recomputes:
            heads, length = arch.num_attention_heads / layout.tensor, layout.seq_length // layout.context
            # 16-bit, as Megatron's figure.
            megatrons += 2 * layout.micro_batch_size * heads * length**2
        return megatrons * self.element / 2

    def loss_shape(self, objective: Objective, *, entries: int = 0) -> LossShape:
        """With the live teacher, if any, unless entries of a cached one are given."""
        live = self.teacher is not None and not entries
        return LossShape(
            tokens=self.layout.tokens,
            hidden=self.student.hidden_size,
            columns=self.args.padded_vocab_size // self.layout.tensor,
            ranks=self.layout.tensor,
            sequence_parallel=self.layout.sequence_parallel,
            element=self.element,
            width=objective.request.width,
            gradient_element=self.gradient_element(),
            teacher_hidden=self.teacher.hidden_size if live else 0,
            entries=entries,
            on_cpu=self.args.cpu,
        )

    def teacher_items(self, rank: int) -> dict[str, int]:
        """A live teacher: its weights, one layer's forward, and the hidden states that it adds to what the stage
        receives (for each micro-batch in flight), makes, and gets back as gradient."""
        layers, layout = self.teacher_layers(rank), self.layout
        hidden = layout.tokens * self.teacher.hidden_size * self.element
        hidden //= layout.tensor if layout.sequence_parallel else 1
        received = 0 if rank == 0 else self.in_flight(rank)
        returned = 0 if rank == layout.pipeline - 1 else 1
        return {
            "teacher weights": self.parameters(rank, self.teacher, layers) * self.element,
            "teacher forward": round(self.layer_bytes(self.teacher)) if layers else 0,
            "teacher hidden states": round(hidden * (received + 1 + returned)),
        }


# ---- Megatron's side


def _validated(args: argparse.Namespace) -> argparse.Namespace:
    """A copy that Megatron has completed for args.world_size ranks."""
    from megatron.training.arguments import validate_args

    # Megatron insists on it for tensor parallelism on GPUs before Blackwell.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = copy.copy(args)
    with _refusals():
        validate_args(args)
    return args


@contextlib.contextmanager
def _refusals():
    """Megatron's assertions and ValueErrors become RefusedError, in one line."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        reason = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line
        raise RefusedError(f"Megatron refuses these flags: {reason}") from error


def _config(args: argparse.Namespace, arch: Architecture):
    """Megatron's config, which knows the layers of each stage. Without fused kernels: this machine need not have
    them."""
    from qtarget_megatron.megatron.model import transformer_config

    args = copy.copy(args)
    args.apply_rope_fusion = args.gradient_accumulation_fusion = args.masked_softmax_fusion = False
    return transformer_config(args, arch)


def like(args: argparse.Namespace, arch: Architecture, **changes) -> argparse.Namespace:
    """args for Megatron's estimates of this architecture."""
    args = copy.copy(args)
    shape = dict(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        group_query_attention=True,
        kv_channels=arch.head_dim,
    )
    vars(args).update(shape | changes)
    return args


def count_parameters(args: argparse.Namespace, arch: Architecture, layers: int, *, matrices: int, is_last: bool) -> int:
    """On one rank of a stage with these layers and this many matrices of the vocabulary.

    Megatron's count for a model without pipeline of just that, where untied embeddings stand for two matrices.
    """
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    part = like(
        args,
        arch,
        num_layers=layers,
        pipeline_model_parallel_size=1,
        padded_vocab_size=args.padded_vocab_size if matrices else 0,
        untie_embeddings_and_output_weights=matrices == 2,
        use_distributed_optimizer=False,
        expert_tensor_parallel_size=1,
        data_parallel_size=1,
    )
    # 18 bytes for each without the distributed optimizer.
    found = round(compute_weight_and_optimizer_memory(part) / 18)
    tp = args.tensor_model_parallel_size
    qkv = (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.head_dim
    missing = [
        (arch.qkv_bias, qkv // tp),
        (arch.output_bias, arch.hidden_size),
        (arch.mlp_bias, 2 * arch.ffn_hidden_size // tp + arch.hidden_size),
        (arch.qk_norm, 2 * arch.head_dim),
    ]
    found += layers * sum(count for is_there, count in missing if is_there)
    return found - (0 if is_last else arch.hidden_size)


def _one_forward(args: argparse.Namespace, layout: Layout, arch: Architecture, layers: int) -> float:
    """Megatron's estimate in bytes, 16-bit, of one micro-batch in these layers and the embedding before them.

    It is its figure for the first stage of two with a single micro-batch in flight, which leaves out the output layer.
    """
    from megatron.training import theoretical_memory_usage as megatrons

    part = like(
        args,
        arch,
        num_layers=2 * layers,
        seq_length=layout.seq_length // layout.context,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=None,
    )
    # Neither counts attention scores. The second is for tensor parallelism without sequence parallelism and takes the
    # MLP to be 4 h wide; Megatron's own report also shows it wherever nothing is recomputed.
    if layout.sequence_parallel or layout.tensor == 1:
        return megatrons.compute_activation_memory(part, num_microbatches=1)
    return megatrons.compute_activation_memory_without_sp(part, num_microbatches=1)
