#!/usr/bin/env bash
# Every fault at its full count, in hours on a few cores:  bash tests/faults/full.sh [pytest arguments]
# The counts are added to VITDS_FAULT_COUNTS [fault-counts.jsonl] and printed in the end as rows for RELIABILITY.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" VITDS_FAULT_COUNTS="${VITDS_FAULT_COUNTS:-$PWD/fault-counts.jsonl}"
status=0
python -m pytest tests/faults tests/test_divergence.py "$@" || status=$?
python tests/faults/counts.py "$VITDS_FAULT_COUNTS"
exit "$status"
