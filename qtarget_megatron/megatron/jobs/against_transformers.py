"""Does a model in Megatron compute what transformers computes from a Hugging Face directory?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from qtarget_megatron.collectives import gather_sequence
from qtarget_megatron.huggingface import Agreement, Place, recorded, transformers_logits
from qtarget_megatron.megatron.jobs.open_model import OpenModel


def compare_with_transformers(model: OpenModel, reference: Path, tokens: list[int]) -> Agreement:
    """Compare a model in Megatron with transformers' of a directory; call it on every rank.

    All ranks get the result. tokens: cut to the model's sequence length. transformers runs in
    float32 on the CPU of one rank, once the Megatron model has been dropped: two models need not
    fit in memory, so model cannot be used afterwards. ValueError where transformers cannot load the
    directory. Collectives: those of megatron_logits, all-gathers of hidden states over the tensor-parallel group under
    sequence parallelism, and object gathers over all ranks.
    """
    tokens = tokens[: model.args.seq_length]
    with recorded(_places(model)) as found:
        actual = megatron_logits(model, tokens)
    actual_states = _gathered_states(model, found, here=actual is not None)
    found.clear()
    if model.arch.multipliers is not None and Place.embedding() in actual_states:
        # In transformers the model multiplies it, not the embedding.
        actual_states[Place.embedding()] /= model.arch.multipliers.embedding
    model.chunks.clear()
    model.wrapped.clear()
    outcome: Agreement | str | None = None
    if actual is not None:
        try:
            states: dict[Place, Tensor] = {}
            expected = transformers_logits(reference, tokens, states)
            outcome = Agreement.of(expected, actual, tokens, (states, actual_states))
        except ValueError as error:
            outcome = str(error)
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    result = next(found for found in outcomes if found is not None)
    if isinstance(result, str):
        raise ValueError(result)
    return result


def _places(model: OpenModel) -> dict[Place, torch.nn.Module]:
    """The parts of this rank's chunks."""
    places = {}
    for chunk in model.chunks:
        if chunk.pre_process:
            places[Place.embedding()] = chunk.embedding
        is_hybrid = isinstance(chunk, HybridModel)
        for layer in chunk.decoder.layers:
            number = (layer.layer_number - 1) // (2 if is_hybrid else 1)
            if not isinstance(layer.self_attention, IdentityOp):
                places[Place.of_layer(number, "attention")] = layer.self_attention
            if not isinstance(layer.mlp, IdentityOp):
                places[Place.of_layer(number, "MLP")] = layer.mlp
                places[Place.of_layer(number, "output")] = layer
        if chunk.post_process:
            norm = chunk.decoder.final_norm if is_hybrid else chunk.decoder.final_layernorm
            places[Place.final_norm(model.arch.num_layers)] = norm
    return places


def _gathered_states(model: OpenModel, found: dict[Place, Tensor], *, here: bool) -> dict[Place, Tensor]:
    """Hidden states [s, h] of all stages, on the rank that says here; nothing elsewhere."""
    group = parallel_state.get_tensor_model_parallel_group()
    mine = {}
    for place in sorted(found):
        state = found[place]
        if model.args.sequence_parallel:
            state = gather_sequence(state.contiguous(), group)
        mine[place] = state[:, 0].float().cpu().numpy()
    first = group.rank() == 0 and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, here)
    everyone: list[Any] | None = [None] * dist.get_world_size() if here else None
    dist.gather_object(mine if first else {}, everyone, dst=places.index(True))
    return {place: torch.from_numpy(state) for part in everyone or () for place, state in part.items()}


@torch.no_grad()
def megatron_logits(model: OpenModel, tokens: list[int]) -> Tensor | None:
    """Logits of one sequence, float32 [s, vocab_size], on the CPU of the last stage's first rank.

    None on all other ranks. tokens: as many as the model's sequence length. Runs Megatron's forward
    schedule for the layout. Collectives: the schedule's, and an all-gather of the logits over the
    last stage's tensor-parallel group.
    """
    args = model.args
    if args.context_parallel_size > 1:
        raise ValueError("logits are compared without context parallelism: drop --context-parallel-size")
    if len(tokens) != args.seq_length:
        raise ValueError(
            f"expected {args.seq_length} tokens (the sequence length), got {len(tokens)}: give a longer text"
        )
    input_ids = torch.tensor([tokens], device="cuda")
    positions = torch.arange(len(tokens), device="cuda").unsqueeze(0)

    def forward_step(data_iterator, chunk):
        # Without a loss function the schedule keeps the last stage's output: the logits.
        return chunk(input_ids, positions, None), None

    for chunk in model.wrapped:
        chunk.eval()
    # The interleaved schedule takes micro-batches in multiples of the stages.
    copies = args.pipeline_model_parallel_size if len(model.wrapped) > 1 else 1
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(model.wrapped),
        model=model.wrapped,
        num_microbatches=copies,
        seq_length=args.seq_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not outputs:
        return None
    shard = outputs[0][0].float().contiguous()
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard, group=group)
    if group.rank() != 0 or parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return None
    return torch.cat(shards, dim=-1)[:, : model.arch.vocab_size].cpu()
