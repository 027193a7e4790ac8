#!/usr/bin/env bash
# From nothing to a trained, stopped, resumed, evaluated and looked-at ViT, on this machine's GPU or CPU:
#   bash launch/quickstart.sh
# 1,797 real handwritten digits, two ranks on a CPU, no downloads beyond pip. Everything lands under runs/quickstart/.
set -euo pipefail
cd "$(dirname "$0")/.."
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

if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
    ranks=$(nvidia-smi -L | wc -l)
    ranks=$((ranks >= 4 ? 4 : ranks >= 2 ? 2 : 1))
else
    ranks=2
fi
train() {
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    # --log_level critical: the launcher calls the requested stop (exit 75) an error.
    deepspeed --log_level critical --num_gpus "$ranks" --master_port "$port" launch/train.py \
        --deepspeed_config ds_configs/quickstart.json --data "$data" --name "$name" "$@"
}

say "2. Training on $ranks ranks, stopped half-way"
train --stop-at-step 300 || [ $? -eq 75 ]
say "3. The same command again: it resumes"
train

say "4. Evaluation and an attention map"
python launch/evaluate.py --weights "$run" --data "$data" --output "$run/evaluation"
python tools/visualize_attention.py --weights "$run" --data "$data" --index 7 --output "$run/attention.png"

top1=$(python -c "import json; print(f\"{json.load(open('$run/evaluation/summary.json'))['top1']:.2%}\")")
say "Done in $((SECONDS - started_s)) s: $top1 of the 360 validation digits are right"
cat << END
  $run/metrics.jsonl        loss, learning rate, accuracy, images per second: a line every 10 steps
  $run/checkpoints/         DeepSpeed checkpoints; "latest" and "best" name two of them
  $run/evaluation/          per-class figures and predictions.parquet
  $run/attention.png        what the model looks at

Next:
  deepspeed -q --num_gpus $ranks launch/train.py --deepspeed_config ds_configs/quickstart.json --data $data --name wider --model custom:width=128,depth=6,heads=4,mlp=256,patch=4
  python tools/shard_imagenet.py /path/to/your/images data/mine          (class folders, or train/ and val/ with class folders)
  DATASET=cifar10 MODEL_TYPE=ViT-B_16 PRETRAINED_DIR=ViT-B_16.npz NAME=cifar bash launch/train.sh
END
