#!/usr/bin/env bash
# launch/train.sh in mixed precision, with the same variables and one more, FP16_OPT_LEVEL, which keeps apex's names:
#   level  parameters  gradients  masters  loss scale
#   O0     fp32        fp32       -        none
#   O1     fp32        fp32       -        dynamic, from 2^16   the forward in float16 where autocast says so
#   O2     fp16        fp16       fp32     dynamic, from 2^20   [the default]
#   O3     fp16        fp16       fp16     1                    masters are fp32, and a warning says so, unless the
#          optimizer is Adam or AdamW and offloaded: DeepSpeed keeps 16-bit masters for its own CPU Adam alone
# O0 trains CONFIG as it is; the other levels set their keys on top of it.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
precision=fp16
case ${FP16_OPT_LEVEL:-O2} in
    O0) precision=fp32 ;;
    O1) set -- --set fp16.enabled=false --set torch_autocast.enabled=true --set torch_autocast.dtype=float16 "$@" ;;
    O2) set -- --set fp16.enabled=true --set fp16.initial_scale_power=20 "$@" ;;
    O3) set -- --set fp16.enabled=true --set fp16.loss_scale=1 --set fp16.fp16_master_weights_and_grads=true "$@" ;;
    *) echo "FP16_OPT_LEVEL=$FP16_OPT_LEVEL: write O0, O1, O2 or O3" >&2; exit 2 ;;
esac
CONFIG=${CONFIG:-$root/ds_configs/cifar10_vit_b16_$precision.json} exec bash "$root/launch/train.sh" "$@"
