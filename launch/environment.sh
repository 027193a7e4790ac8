# Sourced by the scripts here and by tests/run.sh: one Python environment with vitds in it.
#   . launch/environment.sh EXTRAS        e.g. "demo" or "test,hub,track", or "" for none
# Uses the virtual environment that is active, else makes and uses .venv; installs only what setup.py asks for and is not there.

vitds_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ ! -x "$vitds_root/.venv/bin/python" ]; then
        echo "making .venv"
        python3 -m venv "$vitds_root/.venv" || { echo "python3 -m venv failed; on Debian: apt install python3-venv" >&2; exit 2; }
    fi
    . "$vitds_root/.venv/bin/activate"
fi
python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vitds needs Python 3.11 or later" >&2; exit 2; }

# Is vitds installed from this directory, and everything there that its setup.py and the extras ask for? Prints the other
# directory that it is installed from. There is one vitds to an environment, and what does not put its own directory first
# (the tests' workers, a Python of your own) gets that one; the native decoder is built in the directory, too.
vitds_is_installed() {
    python -I - "$vitds_root" "$1" << 'END'
import ast, json, sys
from importlib.metadata import distribution, version
from pathlib import Path
from urllib.parse import unquote

root, extras = Path(sys.argv[1]), sys.argv[2].split(",")
setup = list(ast.walk(ast.parse((root / "setup.py").read_text())))
core = next(node.value for node in setup if isinstance(node, ast.keyword) and node.arg == "install_requires")
extra = next(node.value for node in setup if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS")
needs = ast.literal_eval(core) + [line for name, lines in ast.literal_eval(extra).items() if name in extras for line in lines]
try:
    url = json.loads(distribution("vitds").read_text("direct_url.json") or "{}").get("url", "")
    here = url == root.as_uri()
    if url and not here:
        print(unquote(url.removeprefix("file://")))
    from packaging.requirements import Requirement

    found = all(need.specifier.contains(version(need.name), prereleases=True) for need in map(Requirement, needs))
    sys.exit(not (here and found))
except ImportError:  # a package is missing, perhaps vitds itself
    sys.exit(1)
END
}
if ! vitds_other=$(vitds_is_installed "$1"); then
    if [ -n "$vitds_other" ]; then
        echo "installing vitds${1:+[$1]} in ${VIRTUAL_ENV:-$CONDA_PREFIX}, which had it from $vitds_other"
    else
        echo "installing vitds${1:+[$1]} (with PyTorch's CUDA libraries about 5 GB, once)"
    fi
    # A machine that lacks a GPU needs no CUDA build: install torch from PyTorch's CPU index first to save most of that.
    quiet=-q
    [ -t 1 ] && quiet= # a person sees how far the downloads are
    python -m pip install $quiet --disable-pip-version-check -e "$vitds_root${1:+[$1]}" || exit 2
fi
# Prints a port at which ranks can meet. They take it seconds later, when torch is imported, so it is none of those that the
# kernel hands out meanwhile to whoever asks for any.
vitds_free_port() {
    python - << 'END'
import random, socket

try:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        end = int(file.read().split()[0])
except OSError:
    end = 32768
for port in random.sample(range(10_000, end if end > 11_000 else 60_000), 500):
    try:
        with socket.socket() as listener:
            listener.bind(("", port))
    except OSError:  # somebody has it
        continue
    print(port)
    break
END
}
# DeepSpeed's launcher reports on its surroundings at every start; VITDS_DEEPSPEED_LOG=info brings that back.
export DEEPSPEED_LOG_LEVEL=${VITDS_DEEPSPEED_LOG:-error}

# Without a GPU DeepSpeed says of each process that it takes the CPU; unless it is told.
if [ -z "$(ls -d /dev/nvidiactl /dev/kfd /dev/dri /dev/accel* 2> /dev/null)" ]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
