#!/usr/bin/env bash
# Target-SFT of Llama-3.3-70B by adapters (LoRA) on one node with 8 GPUs of 80 GB: tensor parallel 8. The teacher is the
# model without its adapters; there is no second copy of the weights.
#
#   bash examples/launch/lora_70b.sh [more flags of finetune or Megatron, which win]
#
# What a site changes stands here; each value can be given in the environment as well: QTARGET_OUT=... for OUT.
set -euo pipefail
MODEL=${QTARGET_MODEL:-models/Llama-3.3-70B-Instruct}  # Hugging Face directory; it stays as it is
TRAIN=${QTARGET_TRAIN:-data/train.jsonl}        # {"messages": [...]} or {"prompt": ..., "completion": ...} a line
OUT=${QTARGET_OUT:-runs/llama-3.3-70b-lora}     # checkpoints of the adapters, and the adapters as a PEFT directory
GPUS=${QTARGET_GPUS:-8}
TP=${QTARGET_TP:-8}                             # tensor parallel; data parallel is what is left
LORA_RANK=${QTARGET_LORA_RANK:-16}
OBJECTIVE=${QTARGET_OBJECTIVE:-target-sft}      # one that reads a second model
OBJECTIVE_ARGS=${QTARGET_OBJECTIVE_ARGS:-eta=0.5}
SEQ_LENGTH=${QTARGET_SEQ_LENGTH:-4096}
GLOBAL_BATCH=${QTARGET_GLOBAL_BATCH:-64}
STEPS=${QTARGET_STEPS:-1000}
LR=${QTARGET_LR:-1e-4}                          # ten times that of training all weights
PRECISION=${QTARGET_PRECISION---bf16}           # empty: float32

mkdir -p "$OUT"
# Ended on the way, the same command goes on from the last checkpoint in $OUT; once $OUT/hf is there, it is refused.
# --lora-merge among the further flags makes $OUT/hf a whole model.
exec torchrun --standalone --nproc-per-node "$GPUS" -m qtarget_megatron.finetune \
    --hf-model "$MODEL" --lora-rank "$LORA_RANK" --teacher-self --sft-train "$TRAIN" \
    --objective "$OBJECTIVE" --objective-args $OBJECTIVE_ARGS \
    --tensor-model-parallel-size "$TP" --sequence-parallel \
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable \
    $PRECISION --recompute-activations \
    --seq-length "$SEQ_LENGTH" --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" \
    --train-iters "$STEPS" --lr "$LR" --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.03 --clip-grad 1.0 \
    --log-interval 1 --tensorboard-dir "$OUT/tensorboard" \
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --save-interval 200 --exit-signal-handler \
    --save-hf "$OUT/hf" "$@"
