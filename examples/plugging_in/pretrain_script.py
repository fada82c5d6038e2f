"""An objective inside a pretraining script of one's own: Megatron's usual three functions, and two lines more (<--).

    CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nproc-per-node 4 -m examples.plugging_in.pretrain_script \\
        --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 \\
        --micro-batch-size 2 --global-batch-size 16 --train-iters 20 --lr 1e-3 --transformer-impl local \\
        --tokenizer-type NullTokenizer --vocab-size 255 --position-embedding-type rope --no-rope-fusion \\
        --no-persist-layer-norm --no-gradient-accumulation-fusion --eval-iters 0 --eval-interval 100 \\
        --save-interval 100 --log-interval 1 --tensor-model-parallel-size 2

The data are random tokens whose second half repeats the first. Take the two lines over into your own script.
"""

from __future__ import annotations

from functools import partial

import torch

from qtarget_megatron.megatron.runtime import cpu_platform, wheel_repairs

ON_CPU = cpu_platform.activate()  # before Megatron, and only where there is no GPU

from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.training import get_args, pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args  # noqa: E402
from megatron.training.global_vars import set_global_variables  # noqa: E402

from qtarget_megatron.megatron.attach import attach  # <-- 1  # noqa: E402

VOCABULARY = 256


class Repetitions(torch.utils.data.Dataset):
    def __init__(self, size, length):
        self.size, self.length = size, length

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        half = torch.randint(VOCABULARY, (self.length // 2 + 1,), generator=torch.Generator().manual_seed(index))
        text = torch.cat([half, half])[: self.length + 1]
        mask = (torch.arange(self.length) >= self.length // 2).float()
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": mask, "position_ids": torch.arange(self.length)}


def datasets(sizes, vp_stage=None):
    return Repetitions(max(sizes[0], 1), get_args().seq_length), None, None


datasets.is_distributed = True  # every rank makes its own batches


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    args = get_args()
    model = GPTModel(
        config or core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    attach(model, "focal", "gamma=2", vocab_size=VOCABULARY)  # <-- 2
    return model


def sum_loss(loss_mask, losses):
    total, count = (losses * loss_mask).sum(), loss_mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(data_iterator, model):
    batch = {key: value.cuda() for key, value in next(data_iterator).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return losses, partial(sum_loss, batch["loss_mask"])


def main() -> None:
    args = parse_args()
    args.calculate_per_token_loss = True  # sum_loss returns a sum and its number of tokens
    if ON_CPU:
        args.distributed_backend = "gloo"
    validate_args(args)
    set_global_variables(args)
    wheel_repairs.repair_megatron_wheel()  # where Megatron is the package of 0.19 and not its repository
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=model_provider,
        store=torch.distributed.HashStore() if args.world_size == 1 else None,  # without torchrun there is no address
    )


if __name__ == "__main__":
    main()
