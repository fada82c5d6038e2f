#!/usr/bin/env bash
# A large teacher in two steps: it runs over the data once, at a layout of its own, and the student trains from what it
# kept, on as few GPUs as the student needs.
#
#   bash examples/launch/cached_teacher.sh
#
# What a site changes stands here; each value can be given in the environment as well: QTARGET_OUT=... for OUT.
set -euo pipefail
TEACHER=${QTARGET_TEACHER:-models/Qwen3-32B}
STUDENT=${QTARGET_STUDENT:-models/Qwen3-1.7B}   # the same tokenizer; its chat template is what both read
TRAIN=${QTARGET_TRAIN:-data/train.jsonl}
OUT=${QTARGET_OUT:-runs/cached}
KEPT=${QTARGET_KEPT:-64}                        # most likely tokens of each position
TAIL=${QTARGET_TAIL:-student}                   # what the other tokens get: uniform, student or drop
GPUS=${QTARGET_GPUS:-8}
TEACHER_TP=${QTARGET_TEACHER_TP:-8}
STUDENT_TP=${QTARGET_STUDENT_TP:-1}
SEQ_LENGTH=${QTARGET_SEQ_LENGTH:-4096}
GLOBAL_BATCH=${QTARGET_GLOBAL_BATCH:-64}
STEPS=${QTARGET_STEPS:-1000}
LR=${QTARGET_LR:-1e-5}
PRECISION=${QTARGET_PRECISION---bf16}           # empty: float32

mkdir -p "$OUT"
# Ended on the way it goes on where it stopped; complete, it says so and does nothing.
torchrun --standalone --nproc-per-node "$GPUS" -m qtarget_megatron.cache_teacher \
    --teacher-hf "$TEACHER" --student-hf "$STUDENT" --data "$TRAIN" --out "$OUT/teacher-cache" \
    --k "$KEPT" --seq-length "$SEQ_LENGTH" --micro-batch-size 4 \
    --tensor-model-parallel-size "$TEACHER_TP" $PRECISION

exec torchrun --standalone --nproc-per-node "$GPUS" -m qtarget_megatron.finetune \
    --hf-model "$STUDENT" --teacher-cache "$OUT/teacher-cache" --teacher-tail "$TAIL" --sft-train "$TRAIN" \
    --objective target-sft --objective-args eta=1 --tensor-model-parallel-size "$STUDENT_TP" \
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable $PRECISION \
    --seq-length "$SEQ_LENGTH" --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" \
    --train-iters "$STEPS" --lr "$LR" --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.03 --clip-grad 1.0 \
    --log-interval 1 --tensorboard-dir "$OUT/tensorboard" \
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --save-interval 200 --exit-signal-handler \
    --save-hf "$OUT/hf" "$@"
