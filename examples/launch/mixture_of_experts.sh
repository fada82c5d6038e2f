#!/usr/bin/env bash
# DFT of Qwen3-30B-A3B, a mixture of 128 experts, on one node with 8 GPUs: tensor parallel 2, experts over all 8.
#
#   bash examples/launch/mixture_of_experts.sh [more flags of finetune or Megatron, which win]
#
# What a site changes stands here; each value can be given in the environment as well: QTARGET_OUT=... for OUT.
set -euo pipefail
MODEL=${QTARGET_MODEL:-models/Qwen3-30B-A3B}    # Hugging Face directory
TRAIN=${QTARGET_TRAIN:-data/train.jsonl}        # {"messages": [...]} or {"prompt": ..., "completion": ...} a line
OUT=${QTARGET_OUT:-runs/qwen3-30b-a3b}          # checkpoints and the exported model
GPUS=${QTARGET_GPUS:-8}
TP=${QTARGET_TP:-2}                             # tensor parallel of attention; data parallel is what is left
EP=${QTARGET_EP:-8}                             # expert parallel: ranks that share the experts of a layer
OBJECTIVE=${QTARGET_OBJECTIVE:-dft}
BALANCE=${QTARGET_BALANCE:-0}                   # weight of the router's load-balancing loss; 0 leaves routing as it was trained
KERNELS=${QTARGET_KERNELS---moe-grouped-gemm --moe-permute-fusion}  # need Transformer Engine; empty: Megatron's local layers
SEQ_LENGTH=${QTARGET_SEQ_LENGTH:-4096}
GLOBAL_BATCH=${QTARGET_GLOBAL_BATCH:-64}
STEPS=${QTARGET_STEPS:-1000}
LR=${QTARGET_LR:-1e-5}
PRECISION=${QTARGET_PRECISION---bf16}           # empty: float32

mkdir -p "$OUT"
# Ended on the way, the same command goes on from the last checkpoint in $OUT; once $OUT/hf is there, it is refused.
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
