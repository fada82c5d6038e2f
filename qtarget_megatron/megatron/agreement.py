"""Does a model in Megatron compute what transformers computes from a Hugging Face directory?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from qtarget_megatron.checkpoint import transformers_logits
from qtarget_megatron.megatron.convert import OpenModel


@dataclass(frozen=True)
class Agreement:
    """Two models' logits over the same tokens: p from transformers, q from Megatron.

    max_difference: largest absolute difference of two logits; NaN where either model has one.
    argmax_agreement: share of the positions where both rank the same token first. kl_mean, kl_max:
    sum_v p_v log(p_v / q_v) in nats, over positions.
    """

    num_tokens: int
    max_difference: float
    argmax_agreement: float
    kl_mean: float
    kl_max: float

    @classmethod
    def of(cls, expected: Tensor, actual: Tensor) -> Agreement:
        """Of logits [s, vocab_size], expected by transformers, actual by Megatron.

        ValueError for different shapes.
        """
        if expected.shape != actual.shape:
            raise ValueError(
                f"expected logits of one shape, got {list(expected.shape)} from transformers and "
                f"{list(actual.shape)} from Megatron: the directories hold different vocabularies"
            )
        p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        return cls(
            num_tokens=expected.shape[0],
            max_difference=(expected.double() - actual.double()).abs().max().item(),
            argmax_agreement=(expected.argmax(-1) == actual.argmax(-1)).double().mean().item(),
            kl_mean=kl.mean().item(),
            kl_max=kl.max().item(),
        )


def compare_with_transformers(model: OpenModel, reference: Path, tokens: list[int]) -> Agreement:
    """Compare a model in Megatron with transformers' of a directory; call it on every rank.

    All ranks get the result. tokens: cut to the model's sequence length. transformers runs in
    float32 on the CPU of one rank, once the Megatron model has been dropped: two models need not
    fit in memory, so model cannot be used afterwards. ValueError where transformers cannot load the
    directory. Collectives: those of megatron_logits, and an object gather over all ranks.
    """
    tokens = tokens[: model.args.seq_length]
    actual = megatron_logits(model, tokens)
    model.chunks.clear()
    model.wrapped.clear()
    outcome: Agreement | str | None = None
    if actual is not None:
        try:
            outcome = Agreement.of(transformers_logits(reference, tokens), actual)
        except ValueError as error:
            outcome = str(error)
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    result = next(found for found in outcomes if found is not None)
    if isinstance(result, str):
        raise ValueError(result)
    return result


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
