#!/usr/bin/env bash
# Target-SFT of Qwen3-8B on one node with 8 GPUs: tensor parallel 4, data parallel 2, the frozen initial model as teacher.
#
#   bash examples/launch/one_node.sh [more flags of finetune or Megatron, which win]
#
# What a site changes stands here; each value can be given in the environment as well.
set -euo pipefail
MODEL=${MODEL:-models/Qwen3-8B}         # Hugging Face directory of the student
TEACHER=${TEACHER:-$MODEL}              # of the second model; the same tokenizer, any size
TRAIN=${TRAIN:-data/train.jsonl}        # {"messages": [...]} or {"prompt": ..., "completion": ...} a line
OUT=${OUT:-runs/qwen3-8b}               # checkpoints and the exported model
GPUS=${GPUS:-8}
TP=${TP:-4}                             # tensor parallel; data parallel is what is left
OBJECTIVE=${OBJECTIVE:-target-sft}
OBJECTIVE_ARGS=${OBJECTIVE_ARGS:-eta=0.5}
SEQ_LENGTH=${SEQ_LENGTH:-4096}
GLOBAL_BATCH=${GLOBAL_BATCH:-64}
STEPS=${STEPS:-1000}
LR=${LR:-1e-5}
PRECISION=${PRECISION---bf16}          # empty: float32

mkdir -p "$OUT"
# The same command again goes on from the last checkpoint in $OUT.
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
