#!/usr/bin/env bash
# Runs the tests in an environment that has all they need:  bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh test,hub,track,onnx
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ $# -eq 0 ]; then
    set -- -m "not slow"
fi
exec python -m pytest "$@"
