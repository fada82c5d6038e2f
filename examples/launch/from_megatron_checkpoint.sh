#!/usr/bin/env bash
# Fine-tunes a model that lies in a Megatron distributed checkpoint (torch_dist, saved at any layout), and exports it.
#
#   QTARGET_CHECKPOINT=... bash examples/launch/from_megatron_checkpoint.sh
#
# The Hugging Face directory says the architecture and brings the tokenizer; its weights are replaced by the
# checkpoint's. What a site changes stands here; each value can be given in the environment as well,
# as QTARGET_OUT for OUT.
set -euo pipefail
CHECKPOINT=${QTARGET_CHECKPOINT:?the directory that holds latest_checkpointed_iteration.txt}
MODEL=${QTARGET_MODEL:-models/Meta-Llama-3-8B}
TRAIN=${QTARGET_TRAIN:-data/train.jsonl}
OUT=${QTARGET_OUT:-runs/continued}
GPUS=${QTARGET_GPUS:-8}
TP=${QTARGET_TP:-2}
PP=${QTARGET_PP:-1}
OBJECTIVE=${QTARGET_OBJECTIVE:-dft}
SEQ_LENGTH=${QTARGET_SEQ_LENGTH:-4096}
GLOBAL_BATCH=${QTARGET_GLOBAL_BATCH:-64}
STEPS=${QTARGET_STEPS:-1000}
LR=${QTARGET_LR:-1e-5}
PRECISION=${QTARGET_PRECISION---bf16}           # empty: float32

mkdir -p "$OUT"
# --finetune takes the weights alone: iteration, optimizer and schedule begin anew. Once there is a checkpoint of this
# run, the same command goes on from that.
START=(--load "$CHECKPOINT" --finetune)
if [[ -e $OUT/checkpoints/latest_checkpointed_iteration.txt ]]; then
    START=(--load "$OUT/checkpoints")
fi
exec torchrun --standalone --nproc-per-node "$GPUS" -m qtarget_megatron.finetune \
    --hf-model "$MODEL" --sft-train "$TRAIN" --objective "$OBJECTIVE" "${START[@]}" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --sequence-parallel \
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable $PRECISION --recompute-activations \
    --seq-length "$SEQ_LENGTH" --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" \
    --train-iters "$STEPS" --lr "$LR" --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.03 --clip-grad 1.0 \
    --log-interval 1 --tensorboard-dir "$OUT/tensorboard" \
    --save "$OUT/checkpoints" --save-interval 200 --exit-signal-handler --save-hf "$OUT/hf" "$@"
