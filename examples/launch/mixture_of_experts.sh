#!/usr/bin/env bash
# DFT of Qwen3-30B-A3B, a mixture of 128 experts, on one node with 8 GPUs: tensor parallel 2, experts over all 8.
#
#   bash examples/launch/mixture_of_experts.sh [more flags of finetune or Megatron, which win]
#
# What a site changes stands here; each value can be given in the environment as well.
set -euo pipefail
MODEL=${MODEL:-models/Qwen3-30B-A3B}    # Hugging Face directory
TRAIN=${TRAIN:-data/train.jsonl}        # {"messages": [...]} or {"prompt": ..., "completion": ...} a line
OUT=${OUT:-runs/qwen3-30b-a3b}          # checkpoints and the exported model
GPUS=${GPUS:-8}
TP=${TP:-2}                             # tensor parallel of attention; data parallel is what is left
EP=${EP:-8}                             # expert parallel: ranks that share the experts of a layer
OBJECTIVE=${OBJECTIVE:-dft}
BALANCE=${BALANCE:-0}                   # weight of the router's load-balancing loss; 0 leaves routing as it was trained
KERNELS=${KERNELS---moe-grouped-gemm --moe-permute-fusion}  # need Transformer Engine; empty: Megatron's local layers
SEQ_LENGTH=${SEQ_LENGTH:-4096}
GLOBAL_BATCH=${GLOBAL_BATCH:-64}
STEPS=${STEPS:-1000}
LR=${LR:-1e-5}
PRECISION=${PRECISION---bf16}          # empty: float32

mkdir -p "$OUT"
# The same command again goes on from the last checkpoint in $OUT.
exec torchrun --standalone --nproc-per-node "$GPUS" -m qtarget_megatron.finetune \
    --hf-model "$MODEL" --sft-train "$TRAIN" --objective "$OBJECTIVE" \
    --tensor-model-parallel-size "$TP" --sequence-parallel \
    --expert-model-parallel-size "$EP" --expert-tensor-parallel-size 1 \
    --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff "$BALANCE" $KERNELS \
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --overlap-grad-reduce --overlap-param-gather \
    $PRECISION --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    --seq-length "$SEQ_LENGTH" --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" \
    --train-iters "$STEPS" --lr "$LR" --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.03 --clip-grad 1.0 \
    --log-interval 1 --tensorboard-dir "$OUT/tensorboard" \
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --save-interval 200 --exit-signal-handler \
    --save-hf "$OUT/hf" "$@"
