"""An objective inside a plain megatron-core training loop: no megatron.training, no configuration files.

    torchrun --nproc-per-node 4 -m examples.plugging_in.core_loop --tp 2 --pp 2 --objective dft

The model is small and random, and learns to repeat its input: what matters is where the objective stands (two lines,
marked with <--). --megatron-loss trains with Megatron's own cross-entropy instead, to compare: sft is the same.
"""

from __future__ import annotations

import argparse
import os
from functools import partial

import torch
import torch.distributed as dist

from qtarget_megatron.megatron.runtime import cpu_platform

VOCABULARY, LENGTH, BATCH, MICRO_BATCHES = 256, 32, 2, 4


def build_model(args):
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        pipeline_dtype=torch.float32,
        # Drawn whole and then cut: the same weights at every tensor-parallel size.
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def batches():
    """Micro-batches without end, other ones on each data-parallel rank: a random half, then the same half again."""
    from megatron.core import parallel_state as mpu

    draw = torch.Generator().manual_seed(mpu.get_data_parallel_rank())
    while True:
        half = torch.randint(VOCABULARY, (BATCH, LENGTH // 2 + 1), generator=draw)
        text = torch.cat([half, half], dim=1)[:, : LENGTH + 1].cuda()
        mask = torch.zeros(BATCH, LENGTH, device=text.device)
        mask[:, LENGTH // 2 :] = 1  # only the repetition is a target
        yield text[:, :-1], text[:, 1:], mask


def sum_loss(loss_mask, losses):
    """Sum over the tokens, their number, and what to report: Megatron divides by that of the global batch."""
    total, count = (losses * loss_mask).sum(), loss_mask.sum().to(torch.int)
    return total, count, {"loss": torch.stack([total.detach(), count.float()])}


def forward_step(data, model):
    tokens, labels, mask = next(data)
    positions = torch.arange(LENGTH, device=tokens.device).expand_as(tokens)
    losses = model(tokens, positions, None, labels=labels, loss_mask=mask)
    return losses, partial(sum_loss, mask)


def train(args) -> list[float]:
    from megatron.core import parallel_state as mpu
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from qtarget_megatron.megatron.attach import attach  # <-- 1

    mpu.initialize_model_parallel(args.tp, args.pp)
    ranks = mpu.get_data_parallel_world_size()
    init_num_microbatches_calculator(dist.get_rank(), None, BATCH * MICRO_BATCHES * ranks, BATCH, ranks)
    torch.manual_seed(1 + mpu.get_pipeline_model_parallel_rank())
    model_parallel_cuda_manual_seed(1)
    model = build_model(args)
    if not args.megatron_loss:
        attach(model, *args.objective, vocab_size=VOCABULARY)  # <-- 2
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=args.lr), [model])
    data, history = batches(), []
    for step in range(1, args.steps + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data,
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        optimizer.step()
        if mpu.is_pipeline_last_stage():
            total, count = sum(report["loss"] for report in reports)
            history.append((total / count).item())
            if mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank() == 0:
                print(f"step {step:3}  loss {history[-1]:.6f}", flush=True)
    return history


def main(argv: list[str] | None = None) -> list[float]:
    """The losses of this rank's micro-batches, empty before the last pipeline stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", nargs="+", default=["sft"], metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--megatron-loss", action="store_true", help="Megatron's own cross-entropy, to compare")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv)
    on_cpu = cpu_platform.activate()  # only where there is no GPU
    if not dist.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        lone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # started without torchrun, it needs no address
        alone = dict(store=dist.HashStore(), rank=0, world_size=1) if lone else {}
        dist.init_process_group("gloo" if on_cpu else "nccl", **alone)
    return train(args)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
