#!/usr/bin/env bash
# Target-SFT on several nodes that torchrun brings together: run this same command on every node.
#
#   QTARGET_HEAD=node-0 QTARGET_NODES=4 bash examples/launch/multi_node.sh
#
# The nodes need a file system in common for $MODEL and $OUT. What a site changes stands here; each value can be given
# in the environment as well: QTARGET_OUT=... for OUT.
set -euo pipefail
HEAD=${QTARGET_HEAD:?the name or address of one node, the same on all: QTARGET_HEAD=node-0}
PORT=${QTARGET_PORT:-29500}                     # free on that node
NODES=${QTARGET_NODES:-2}
GPUS=${QTARGET_GPUS:-8}                         # on each node
RUN=${QTARGET_RUN:-qtarget}                     # a name that two runs on one head do not share
MODEL=${QTARGET_MODEL:-models/Qwen3-32B}
TEACHER=${QTARGET_TEACHER:-$MODEL}
TRAIN=${QTARGET_TRAIN:-data/train.jsonl}
OUT=${QTARGET_OUT:-runs/$RUN}
TP=${QTARGET_TP:-8}                             # within a node
PP=${QTARGET_PP:-2}                             # across nodes
OBJECTIVE=${QTARGET_OBJECTIVE:-target-sft}
OBJECTIVE_ARGS=${QTARGET_OBJECTIVE_ARGS:-eta=0.5}
SEQ_LENGTH=${QTARGET_SEQ_LENGTH:-4096}
GLOBAL_BATCH=${QTARGET_GLOBAL_BATCH:-128}
STEPS=${QTARGET_STEPS:-1000}
LR=${QTARGET_LR:-1e-5}
PRECISION=${QTARGET_PRECISION---bf16}           # empty: float32
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
