#!/usr/bin/env bash
# Runs the tests in an environment that has all they need:  bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh test,hub,track,onnx
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ $# -eq 0 ]; then # two files at a time: what one waits for (processes that start, signals), the other works through
    set -- -m "not slow" -n 2 --dist loadfile
fi
exec python -m pytest "$@"
