#!/usr/bin/env bash
# CIFAR-10 from scratch with a pure ViT, against the clock; SPEEDRUN.md has the rules and the records:
#   bash launch/speedrun.sh [flags of launch/train.py]
#   SEEDS=5 bash launch/speedrun.sh
# The clock of a run starts before its Python does and stops when that has ended: decoding, evaluation and saving are on
# it, the download and the sharding of the data are not. One GPU, the first of CUDA_VISIBLE_DEVICES, or the CPU.
#   SEEDS       how many runs, with the seeds 1, 2, ...; a record has 5 [1]
#   DATASET     cifar10 (downloaded and sharded the first time), or a dataset directory [cifar10]
#   DATA_DIR    where CIFAR's archive lies or is downloaded to
#   DATA_ROOT   where shards are written [data]
#   OUTPUT_DIR  directory of the runs [runs]
#   NAME        of the runs, which are NAME-seed1 and so on [speedrun, or the first of speedrun-2, ... that is free]
#   CONFIG      any file of ds_configs/ [ds_configs/cifar10_speedrun.json]
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac
. "$(dirname "$0")/environment.sh" ""

SEEDS=${SEEDS:-1}
[[ $SEEDS =~ ^[1-9][0-9]*$ ]] || { echo "usage error  SEEDS=$SEEDS: it is a number of runs, 1 or more" >&2; exit 2; }
data=${DATASET:-cifar10}
if [ "$data" = cifar10 ]; then
    data=${DATA_ROOT:-data}/cifar10
    if [ ! -e "$data/_info.json" ]; then
        python "$vitds_root/tools/shard_imagenet.py" cifar10 "$data" ${DATA_DIR:+--download-dir "$DATA_DIR"}
    fi
fi
runs=${OUTPUT_DIR:-runs}
name=${NAME:-speedrun}
for ((n = 2; ; n++)); do # never a run that is there already: what resumes was not timed
    [ -e "$runs/$name-seed1" ] || break
    name=${NAME:-speedrun}-$n
done

walls=()
for ((seed = 1; seed <= SEEDS; seed++)); do
    started_ms=$(date +%s%3N)
    python "$vitds_root/launch/train.py" --deepspeed_config "${CONFIG:-$vitds_root/ds_configs/cifar10_speedrun.json}" \
        --data "$data" --output-dir "$runs" --name "$name-seed$seed" --seed "$seed" \
        --workers "$(($(nproc) > 1 ? $(nproc) - 1 : 1))" "$@"
    walls+=($(($(date +%s%3N) - started_ms)))
done

python - "$runs/$name" "${walls[@]}" << 'END'
import json, statistics, sys

runs, figures = sys.argv[1], []
for seed, wall_ms in enumerate(map(int, sys.argv[2:]), start=1):
    lines = list(map(json.loads, open(f"{runs}-seed{seed}/metrics.jsonl")))
    if not (found := [line for line in lines if line["split"] == "val"]):
        sys.exit(f"data error  {runs}-seed{seed}: the data has no validation split, so there is no accuracy")
    top1, wall_s = found[-1].get("ema_top1", found[-1]["top1"]), wall_ms / 1000
    figures.append((top1, wall_s))
    print(f"seed {seed}  {top1:.2%}  {wall_s:.1f} s  {found[-1]['samples_seen'] / wall_s:,.0f} images a second of it")
tops, walls = zip(*figures)
print(f"mean of {len(tops)}  {statistics.mean(tops):.2%}  {statistics.mean(walls):.1f} s"
      f"  lowest - highest {min(tops):.2%} - {max(tops):.2%}, {min(walls):.1f} - {max(walls):.1f} s")
END
