#!/usr/bin/env bash
# Llama-3-70B under SLURM: 8 nodes of 8 GPUs, tensor parallel 8, pipeline parallel 4, data parallel 2.
#
#   sbatch examples/launch/slurm.sh
#
# What a site changes: the lines of SBATCH, and the values below, which can be given in the environment as well:
# QTARGET_OUT=... for OUT.
#SBATCH --job-name=qtarget
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
set -euo pipefail
GPUS=${QTARGET_GPUS:-8}                         # on each node, as above
MODEL=${QTARGET_MODEL:-models/Meta-Llama-3-70B-Instruct}
TEACHER=${QTARGET_TEACHER:-$MODEL}
TRAIN=${QTARGET_TRAIN:-data/train.jsonl}
OUT=${QTARGET_OUT:-runs/llama-3-70b}
TP=${QTARGET_TP:-8}
PP=${QTARGET_PP:-4}
OBJECTIVE=${QTARGET_OBJECTIVE:-target-sft}
OBJECTIVE_ARGS=${QTARGET_OBJECTIVE_ARGS:-eta=0.5}
SEQ_LENGTH=${QTARGET_SEQ_LENGTH:-8192}
GLOBAL_BATCH=${QTARGET_GLOBAL_BATCH:-128}
STEPS=${QTARGET_STEPS:-1000}
LR=${QTARGET_LR:-5e-6}
PRECISION=${QTARGET_PRECISION---bf16}           # empty: float32
PORT=${QTARGET_PORT:-29500}

mkdir -p "$OUT"
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# SLURM's TERM, 5 minutes before the end, makes Megatron save and exit; the requeued job goes on from there.
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$SLURM_JOB_ID" -m qtarget_megatron.finetune \
    --hf-model "$MODEL" --teacher-hf "$TEACHER" --sft-train "$TRAIN" \
    --objective "$OBJECTIVE" --objective-args $OBJECTIVE_ARGS \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --sequence-parallel \
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable \
    $PRECISION --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    --seq-length "$SEQ_LENGTH" --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" \
    --train-iters "$STEPS" --lr "$LR" --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.03 --clip-grad 1.0 \
    --log-interval 1 --tensorboard-dir "$OUT/tensorboard" \
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --save-interval 50 --exit-signal-handler \
    --save-hf "$OUT/hf" "$@"
