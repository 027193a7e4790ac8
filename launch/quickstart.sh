#!/usr/bin/env bash
# From nothing to a trained, stopped, resumed, evaluated and looked-at ViT, on this machine's GPU or CPU:
#   bash launch/quickstart.sh
# 1,797 real handwritten digits, two ranks on a CPU, no downloads beyond pip. Everything lands under runs/quickstart/.
set -euo pipefail
case ${1:-} in
    "") ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "usage error  $1: the quickstart takes no arguments" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
had_environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
. launch/environment.sh demo
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

data=runs/quickstart/shards
name=quickstart
for ((n = 2; ; n++)); do
    [ -e "runs/$name/metrics.jsonl" ] || break
    name=quickstart-$n
done
run=runs/$name
started_s=$SECONDS

if [ ! -e "$data/_info.json" ]; then
    say "1. The digits become tar shards with an index ($data)"
    python tools/shard_imagenet.py digits "$data"
else
    say "1. The shards are there already ($data)"
fi

devices=$(python -c 'import torch; print(torch.cuda.device_count())')
case $devices in
    1) ranks=1 ;;
    0 | 2 | 3) ranks=2 ;; # 0: two on the CPU
    *) ranks=4 ;;
esac
where=(--num_gpus "$ranks")
if [ "$devices" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # which --num_gpus would make DeepSpeed ignore
    where=(--include "localhost:$(cut -d, -f "-$ranks" <<< "$CUDA_VISIBLE_DEVICES")")
fi
train() {
    # --log_level critical: the launcher calls the requested stop (exit 75) an error.
    python launch/supervise.py deepspeed --log_level critical "${where[@]}" --master_port "$(vitds_free_port)" launch/train.py \
        --deepspeed_config ds_configs/quickstart.json --data "$data" --name "$name" "$@"
}

say "2. Training on $ranks ranks, stopped half-way"
train --stop-at-step 300 || { code=$?; [ $code -eq 75 ] || exit $code; }
say "3. The same command again: it resumes"
train

say "4. Evaluation and an attention map"
python launch/evaluate.py --weights "$run" --data "$data" --output "$run/evaluation"
python tools/visualize_attention.py --weights "$run" --data "$data" --index 7 --out "$run/attention"

top1=$(python -c "import json; print(f\"{json.load(open('$run/evaluation/summary.json'))['top1']:.2%}\")")
say "Done in $((SECONDS - started_s)) s: $top1 of the 360 validation digits are right"
cat << END
  $run/metrics.jsonl        loss, learning rate, accuracy, images per second: a line every 10 steps
  $run/checkpoints/         DeepSpeed checkpoints; "latest" and "best" name two of them
  $run/evaluation/          per-class figures and predictions.parquet
  $run/attention/val-7.png  what the model looks at

Next${had_environment:+ (in this environment)}:
$([ -n "$had_environment" ] || echo "  . .venv/bin/activate")
  deepspeed -q ${where[*]} launch/train.py --deepspeed_config ds_configs/quickstart.json --data $data --name wider --model custom:width=128,depth=6,heads=4,mlp=256,patch=4
  python tools/shard_imagenet.py /path/to/your/images data/mine          (class folders, or train/ and val/ with class folders)
  DATASET=cifar10 MODEL_TYPE=ViT-B_16 PRETRAINED_DIR=ViT-B_16.npz NAME=cifar bash launch/train.sh
END
