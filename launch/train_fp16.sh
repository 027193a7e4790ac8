#!/usr/bin/env bash
# launch/train.sh in mixed precision, with the same variables and one more, FP16_OPT_LEVEL, which keeps apex's names:
#   O0 fp32;  O1, O2 fp16 with fp32 master weights and dynamic loss scaling [O2];  O3 the same with the loss scale fixed at 1
# DeepSpeed keeps fp32 masters at every level, so O3 is safer here than apex's.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
precision=fp16
case ${FP16_OPT_LEVEL:-O2} in
    O0) precision=fp32 ;;
    O1 | O2) ;;
    O3) set -- --set fp16.loss_scale=1 "$@" ;;
    *) echo "FP16_OPT_LEVEL=$FP16_OPT_LEVEL: write O0, O1, O2 or O3" >&2; exit 2 ;;
esac
CONFIG=${CONFIG:-$root/ds_configs/cifar10_vit_b16_$precision.json} exec bash "$root/launch/train.sh" "$@"
