#!/usr/bin/env bash
# Target-SFT on several nodes that torchrun brings together: run this same command on every node.
#
#   HEAD=node-0 NODES=4 bash examples/launch/multi_node.sh
#
# The nodes need a file system in common for $MODEL and $OUT. What a site changes stands here; each value can be given
# in the environment as well.
set -euo pipefail
HEAD=${HEAD:?the name or address of one node, the same on all: HEAD=node-0}
PORT=${PORT:-29500}                     # free on that node
NODES=${NODES:-2}
GPUS=${GPUS:-8}                         # on each node
RUN=${RUN:-qtarget}                     # a name that two runs on one head do not share
MODEL=${MODEL:-models/Qwen3-32B}
TEACHER=${TEACHER:-$MODEL}
TRAIN=${TRAIN:-data/train.jsonl}
OUT=${OUT:-runs/$RUN}
TP=${TP:-8}                             # within a node
PP=${PP:-2}                             # across nodes
OBJECTIVE=${OBJECTIVE:-target-sft}
OBJECTIVE_ARGS=${OBJECTIVE_ARGS:-eta=0.5}
SEQ_LENGTH=${SEQ_LENGTH:-4096}
GLOBAL_BATCH=${GLOBAL_BATCH:-128}
STEPS=${STEPS:-1000}
LR=${LR:-1e-5}
PRECISION=${PRECISION---bf16}          # empty: float32
# The interface between the nodes, where NCCL or gloo would choose another one:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

mkdir -p "$OUT"
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN" -m qtarget_megatron.finetune \
    --hf-model "$MODEL" --teacher-hf "$TEACHER" --sft-train "$TRAIN" \
    --objective "$OBJECTIVE" --objective-args $OBJECTIVE_ARGS \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --sequence-parallel \
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable \
    $PRECISION --recompute-activations --distributed-timeout-minutes 20 \
    --seq-length "$SEQ_LENGTH" --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" \
    --train-iters "$STEPS" --lr "$LR" --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.03 --clip-grad 1.0 \
    --log-interval 1 --tensorboard-dir "$OUT/tensorboard" \
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --save-interval 100 --exit-signal-handler \
    --save-hf "$OUT/hf" "$@"
