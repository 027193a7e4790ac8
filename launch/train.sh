#!/usr/bin/env bash
# Fine-tune with a few variables instead of a long command:
#   DATASET=cifar10 MODEL_TYPE=ViT-B_16 PRETRAINED_DIR=ViT-B_16.npz NAME=cifar bash launch/train.sh [flags of launch/train.py]
# What is not set comes from CONFIG; the values in brackets are those of its default. Relative paths start where you are.
#   DATASET           cifar10, cifar100 (both downloaded and sharded the first time), imagenet, or a dataset directory [cifar10]
#   DATA_DIR          imagenet: the folder that holds train/ and val/; cifar: where its archive lies or is downloaded to
#   DATA_ROOT         where shards are written [data]
#   MODEL_TYPE        any model of the README [ViT-B_16]
#   IMG_SIZE          pixels [224]
#   NAME              of the run, and of its directory below runs/ [model and data set]
#   GPUS              e.g. 0,2 [all]
#   TRAIN_BATCH_SIZE  images of one step: all GPUs and accumulation steps together [512]
#   GRAD_STEPS        accumulation steps: more need less memory [enough for micro-batches of 32; 1 if TRAIN_BATCH_SIZE is set]
#   EVAL_BATCH_SIZE   images of one GPU [64]
#   NUM_STEPS [10000], WARMUP_STEPS [500], DECAY_TYPE: linear, cosine or constant [cosine]
#   PRETRAINED_DIR    weights: a file (.npz, .safetensors, .pth, .bin), a timm or Hugging Face directory, a run or one of its
#                     checkpoints, or a directory that holds MODEL_TYPE.npz [none: random weights]
#   RESUME_PATH       a checkpoint to go on from [the newest of the run itself]
#   RESTARTS          how often to start again from the last checkpoint when a rank was lost (exit 7) [0]
#   CONFIG            any file of ds_configs/ [ds_configs/cifar10_vit_b16_fp32.json]
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac
. "$(dirname "$0")/environment.sh" ""
if [ -z "${VITDS_EXIT_FILE:-}" ]; then # the supervisor sets it: this script, its tools and DeepSpeed run under one
    exec python "$vitds_root/launch/supervise.py" --restarts "${RESTARTS:-0}" bash "$0" "$@"
fi

weights=${PRETRAINED_DIR:-}
if [ -n "$weights" ] && [ -e "$weights/${MODEL_TYPE:-ViT-B_16}.npz" ]; then
    weights=$weights/${MODEL_TYPE:-ViT-B_16}.npz
elif [ -n "$weights" ] && [ ! -e "$weights" ]; then # said before anything is downloaded or sharded
    echo "weights error  PRETRAINED_DIR=$weights: no such file or directory" >&2
    echo "  python tools/fetch_weights.py ${MODEL_TYPE:-ViT-B_16} brings Google's" >&2
    exit 4
fi

if [ -n "${GPUS:-}" ] && [ "$GPUS" != 0 ]; then # DeepSpeed's launcher would end in a traceback; it counts as here
    [[ $GPUS =~ ^[0-9]+(,[0-9]+)*$ ]] || { echo "usage error  GPUS=$GPUS: write numbers, such as 0,2" >&2; exit 2; }
    python - "$GPUS" << 'END' || exit
import os, sys
from deepspeed.accelerator import get_accelerator

device = get_accelerator()
if os.environ.get(visible := device.visible_devices_envs()[0]):
    del os.environ[visible]  # GPUS means the machine's own numbers
count = device.device_count()
if missing := [number for number in sys.argv[1].split(",") if int(number) >= count]:
    on_cpu = "; on a CPU, LOCAL_SIZE=N counts N" if device.device_name() == "cpu" else ""
    print(f"usage error  GPUS={sys.argv[1]}: there is no GPU {missing[0]}: "
          f"DeepSpeed counts {count} here, from 0 on{on_cpu}\n"
          "  write numbers below that, or leave GPUS out to use all", file=sys.stderr)
    sys.exit(2)
END
fi

DATASET=${DATASET:-cifar10}
DATA_DIR=${DATA_DIR:-}
data=${DATA_ROOT:-data}/$DATASET
shard() {
    if [ -e "$data/_info.json" ]; then
        echo "using the shards in $data; delete them to make them anew"
    else
        python "$vitds_root/tools/shard_imagenet.py" "$@"
    fi
}
case $DATASET in
    cifar10 | cifar100) shard "$DATASET" "$data" ${DATA_DIR:+--download-dir "$DATA_DIR"} ;;
    imagenet)
        [ -n "$DATA_DIR" ] || { echo "DATASET=imagenet needs DATA_DIR, the folder that holds train/ and val/" >&2; exit 2; }
        if [ -e "$DATA_DIR/_info.json" ]; then data=$DATA_DIR; else shard "$DATA_DIR" "$data"; fi ;;
    *) data=$DATASET ;;
esac

batch=()
if [ -n "${TRAIN_BATCH_SIZE:-}${GRAD_STEPS:-}" ]; then
    batch=(--train-batch-size "${TRAIN_BATCH_SIZE:-512}" --gradient-accumulation-steps "${GRAD_STEPS:-1}")
fi
exec deepspeed -q --master_port "$(vitds_free_port)" ${GPUS:+--include "localhost:$GPUS"} "$vitds_root/launch/train.py" \
    --deepspeed_config "${CONFIG:-$vitds_root/ds_configs/cifar10_vit_b16_fp32.json}" --data "$data" "${batch[@]}" \
    ${MODEL_TYPE:+--model "$MODEL_TYPE"} ${IMG_SIZE:+--image-size "$IMG_SIZE"} ${NAME:+--name "$NAME"} \
    ${EVAL_BATCH_SIZE:+--eval-batch-size "$EVAL_BATCH_SIZE"} ${NUM_STEPS:+--num-steps "$NUM_STEPS"} \
    ${WARMUP_STEPS:+--warmup-steps "$WARMUP_STEPS"} ${DECAY_TYPE:+--decay-type "$DECAY_TYPE"} \
    ${weights:+--pretrained "$weights"} ${RESUME_PATH:+--resume "$RESUME_PATH"} "$@"
