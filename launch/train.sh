#!/usr/bin/env bash
# Fine-tune with a few variables instead of a long command:
#   DATASET=cifar10 MODEL_TYPE=ViT-B_16 PRETRAINED_DIR=ViT-B_16.npz NAME=cifar bash launch/train.sh [flags of launch/train.py]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh demo

DATASET=${DATASET:-cifar10}          # cifar10, cifar100, imagenet (with DATA_DIR), or a dataset directory
DATA_DIR=${DATA_DIR:-}               # ImageNet: the folder that holds train/ and val/; CIFAR: where the archive lies or is downloaded to
MODEL_TYPE=${MODEL_TYPE:-ViT-B_16}   # any model name of the README
IMG_SIZE=${IMG_SIZE:-224}            # pixels
NAME=${NAME:-$(basename "$DATASET")-$MODEL_TYPE}
GPUS=${GPUS:-}                       # e.g. 0,2; empty: all
TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-512}  # global: all ranks and accumulation steps together
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-64}     # of one rank
GRAD_STEPS=${GRAD_STEPS:-1}          # accumulation steps
NUM_STEPS=${NUM_STEPS:-10000}
WARMUP_STEPS=${WARMUP_STEPS:-500}
DECAY_TYPE=${DECAY_TYPE:-cosine}     # linear, cosine or constant
RESUME_PATH=${RESUME_PATH:-}         # a checkpoint; empty: the run's own newest
PRETRAINED_DIR=${PRETRAINED_DIR:-}   # weights: a file, a checkpoint directory, or a directory that holds MODEL_TYPE.npz
CONFIG=${CONFIG:-ds_configs/cifar10_vit_b16_fp32.json}

case $DATASET in
    cifar10 | cifar100)
        data=data/$DATASET
        [ -e "$data/_info.json" ] || python tools/shard_imagenet.py "$DATASET" "$data" ${DATA_DIR:+--download-dir "$DATA_DIR"} ;;
    imagenet)
        [ -n "$DATA_DIR" ] || { echo "DATASET=imagenet needs DATA_DIR, the folder that holds train/ and val/" >&2; exit 2; }
        data=data/imagenet
        if [ -e "$DATA_DIR/_info.json" ]; then
            data=$DATA_DIR
        elif [ ! -e "$data/_info.json" ]; then
            python tools/shard_imagenet.py "$DATA_DIR" "$data"
        fi ;;
    *) data=$DATASET ;;
esac
[ -e "$PRETRAINED_DIR/$MODEL_TYPE.npz" ] && PRETRAINED_DIR=$PRETRAINED_DIR/$MODEL_TYPE.npz

port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
exec deepspeed -q --master_port "$port" ${GPUS:+--include "localhost:$GPUS"} launch/train.py --deepspeed_config "$CONFIG" \
    --data "$data" --name "$NAME" --model "$MODEL_TYPE" --image-size "$IMG_SIZE" \
    --train-batch-size "$TRAIN_BATCH_SIZE" --gradient-accumulation-steps "$GRAD_STEPS" --eval-batch-size "$EVAL_BATCH_SIZE" \
    --num-steps "$NUM_STEPS" --warmup-steps "$WARMUP_STEPS" --decay-type "$DECAY_TYPE" \
    ${RESUME_PATH:+--resume "$RESUME_PATH"} ${PRETRAINED_DIR:+--pretrained "$PRETRAINED_DIR"} "$@"
