# Sourced by the scripts here and by tests/run.sh: one Python environment with vitds in it.
#   . launch/environment.sh EXTRAS        e.g. "demo" or "test,hub,track"
# Uses the virtual environment that is active, else makes and uses .venv; installs only when setup.py or EXTRAS changed.

vitds_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ ! -x "$vitds_root/.venv/bin/python" ]; then
        echo "making .venv"
        python3 -m venv "$vitds_root/.venv" || { echo "python3 -m venv failed; on Debian: apt install python3-venv" >&2; exit 2; }
    fi
    . "$vitds_root/.venv/bin/activate"
fi
python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vitds needs Python 3.11 or later" >&2; exit 2; }

vitds_stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.vitds-$1"
vitds_state="$vitds_root $(cksum < "$vitds_root/setup.py")"
if [ "$(cat "$vitds_stamp" 2> /dev/null)" != "$vitds_state" ]; then
    echo "installing vitds[$1] (with PyTorch's CUDA libraries about 5 GB, once)"
    # A CPU that lacks a GPU needs no CUDA build: install torch from PyTorch's CPU index first to save most of that.
    (cd "$vitds_root" && python -m pip install -q --disable-pip-version-check -e ".[$1]") || exit 2
    echo "$vitds_state" > "$vitds_stamp"
fi
