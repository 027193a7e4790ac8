"""launch/slurm.sbatch and launch/pytorchjob.yaml without a cluster: real signals, launchers that only play a rank."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_processes import ROOT

from vitds.flags import parse_command_line

LAUNCHER = """#!/usr/bin/env bash
echo "$@" > "$OUT/command"
say() { echo "{\\"exit_code\\": $1, \\"step\\": 9}" > "$VITDS_EXIT_FILE"; }
say null
export -f say
LOCAL_RANK=0 bash -c 'trap "say 75; exit 0" TERM USR1; [ -z "$LOST" ] || exit 9; touch "$OUT/ready"
    while true; do sleep 0.1; done' &
wait $!
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo localhost ;; *) echo "$@" >> "$OUT/requeued" ;; esac
"""
SRUN = """#!/usr/bin/env bash
SLURM_NODEID=0 exec "${@:2}"
"""


@pytest.fixture
def environment(tmp_path):
    for name, script in {"deepspeed": LAUNCHER, "torchrun": LAUNCHER, "scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "LOST": "",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29512",
        "WORLD_SIZE": "1",
        "RANK": "0",
    }


def run(command, environment, tmp_path, name=None):
    """Run a script to its end, with a signal once its rank is there; gives exit code and output."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        if name:
            deadline = time.monotonic() + 60
            while not (tmp_path / "ready").exists():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            process.send_signal(getattr(signal, f"SIG{name}"))
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    return process.returncode, output


def flags_of(tmp_path):
    """What the launcher was to give to launch/train.py, as our own parser takes it."""
    words = (tmp_path / "command").read_text().split()
    return words, parse_command_line(words[words.index("launch/train.py") + 1 :])


SBATCH = ["bash", "launch/slurm.sbatch", "--deepspeed_config", "ds_configs/quickstart.json", "--data", "digits"]


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_a_job_that_is_about_to_end_saves_and_requeues_itself(environment, tmp_path, nodes):
    environment["SLURM_JOB_NUM_NODES"] = nodes
    code, output = run(SBATCH, environment, tmp_path, "USR1")
    assert code == 75, output
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    words, command = flags_of(tmp_path)
    assert ("--no_ssh" in words) == (nodes == "2") and ("--num_gpus" in words) == (nodes == "1")
    assert str(command.config_file) == "ds_configs/quickstart.json"
    assert not list(tmp_path.glob(".hostfile*"))


def test_a_lost_rank_is_restarted_in_the_job_and_then_requeued_so_often(environment, tmp_path):
    environment |= {"LOST": "1", "RESTARTS": "1"}
    code, output = run(SBATCH, environment, tmp_path)
    assert code == 7 and "restart 1 of 1" in output, output
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    code, output = run(SBATCH, environment | {"SLURM_RESTART_COUNT": "20"}, tmp_path)
    assert code == 7 and (tmp_path / "requeued").read_text() == "requeue 42\n"


@pytest.mark.parametrize(("name", "code"), [("TERM", 128 + 75), (None, 128 + 7)])
def test_a_pod_that_stopped_or_lost_a_rank_ends_with_a_code_that_restarts_it(environment, tmp_path, name, code):
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / "launch/pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["restartPolicy"] == "ExitCode"
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    environment["LOST"] = "" if name else "1"
    assert run([*container["command"], *container["args"]], environment, tmp_path, name)[0] == code
    _, command = flags_of(tmp_path)
    assert (ROOT / command.config_file).exists()
