#!/usr/bin/env bash
# Target-SFT of Qwen3-8B on one node with 8 GPUs: tensor parallel 4, data parallel 2, the frozen initial model as teacher.
#
#   bash examples/launch/one_node.sh [more flags of finetune or Megatron, which win]
#
# What a site changes stands here; each value can be given in the environment as well: QTARGET_OUT=... for OUT.
set -euo pipefail
MODEL=${QTARGET_MODEL:-models/Qwen3-8B}         # Hugging Face directory of the student
TEACHER=${QTARGET_TEACHER:-$MODEL}              # of the second model; the same tokenizer, any size
TRAIN=${QTARGET_TRAIN:-data/train.jsonl}        # {"messages": [...]} or {"prompt": ..., "completion": ...} a line
OUT=${QTARGET_OUT:-runs/qwen3-8b}               # checkpoints and the exported model
GPUS=${QTARGET_GPUS:-8}
TP=${QTARGET_TP:-4}                             # tensor parallel; data parallel is what is left
OBJECTIVE=${QTARGET_OBJECTIVE:-target-sft}
OBJECTIVE_ARGS=${QTARGET_OBJECTIVE_ARGS:-eta=0.5}
SEQ_LENGTH=${QTARGET_SEQ_LENGTH:-4096}
GLOBAL_BATCH=${QTARGET_GLOBAL_BATCH:-64}
STEPS=${QTARGET_STEPS:-1000}
LR=${QTARGET_LR:-1e-5}
PRECISION=${QTARGET_PRECISION---bf16}           # empty: float32

mkdir -p "$OUT"
# Ended on the way, the same command goes on from the last checkpoint in $OUT; once $OUT/hf is there, it is refused.
exec torchrun --standalone --nproc-per-node "$GPUS" -m qtarget_megatron.finetune \
    --hf-model "$MODEL" --teacher-hf "$TEACHER" --sft-train "$TRAIN" \
    --objective "$OBJECTIVE" --objective-args $OBJECTIVE_ARGS \
    --tensor-model-parallel-size "$TP" --sequence-parallel \
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --overlap-grad-reduce --overlap-param-gather \
    $PRECISION --recompute-activations \
    --seq-length "$SEQ_LENGTH" --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" \
    --train-iters "$STEPS" --lr "$LR" --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.03 --clip-grad 1.0 \
    --log-interval 1 --tensorboard-dir "$OUT/tensorboard" \
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --save-interval 200 --exit-signal-handler \
    --save-hf "$OUT/hf" "$@"
