"""One run under `deepspeed`, `torchrun` and plain python: what a launcher adds to the command, and what it must not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_sets import write_pixels
from rank_processes import ROOT, free_port
from run_directory import TINY, config_file, metrics, train_command

pytestmark = pytest.mark.ranks

BIN = Path(sys.prefix) / "bin"
LAUNCHERS = {
    "deepspeed": [BIN / "deepspeed", "-q", "--num_gpus", "2", "--master_port"],
    "torchrun": [BIN / "torchrun", "--nproc_per_node", "2", "--master_port"],
}
SHORT = {"num_steps": 3, "workers": 0}
STOCK_FP16 = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001, "warmup_num_steps": 2}},
    "gradient_clipping": 1.0,
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8},
    "zero_optimization": {"stage": 2},
}


def launch(launcher: str, command: list, **environment: str) -> subprocess.CompletedProcess:
    """Start a command of this repository as a user does, on the CPU; plain python when the launcher has no entry."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    clean |= {"OMP_NUM_THREADS": "1", "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"}
    start = [*LAUNCHERS[launcher], free_port()] if launcher in LAUNCHERS else [sys.executable]
    return subprocess.run(
        [str(part) for part in [*start, *command]],
        cwd=ROOT,
        env=clean | {"PATH": f"{BIN}:{os.environ['PATH']}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("launchers") / "data").parent


@pytest.fixture(scope="module")
def runs(work) -> dict[str, list[dict]]:
    """The metrics of the same three steps under every launcher."""
    config = config_file(work, 1, scheduler={"type": "constant"}, vitds=SHORT | {"dropout": 0.0, "drop_path": 0.0})
    for name in ("deepspeed", "torchrun", "python"):
        command = train_command(config, work / "data", work, name, "--deepspeed", "--local_rank", "0")
        done = launch(name, command)
        assert done.returncode == 0 and "done: 3 steps" in done.stdout, done.stdout
    return {name: metrics(work / name) for name in ("deepspeed", "torchrun", "python")}


def test_the_launcher_changes_nothing(runs):
    assert [line["split"] for line in runs["deepspeed"]] == ["train", "train", "train", "val"]
    assert runs["deepspeed"] == runs["torchrun"]


def test_plain_python_is_one_rank_that_sees_the_same_samples(runs, work):
    worlds = [json.loads((work / name / "env.json").read_text())["world_size"] for name in ("deepspeed", "python")]
    assert worlds == [2, 1]
    losses = [[line["loss"] for line in runs[name]] for name in ("deepspeed", "python")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_bad_data_is_said_once_and_ends_with_its_code(tmp_path):
    """The damaged sample meets one of the two ranks, in the middle of training."""
    data = write_pixels(tmp_path / "data", num_train=16, num_val=4)
    shard = data / "train/pixels-train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    config = config_file(tmp_path, 1, scheduler={"type": "constant"}, vitds=SHORT)
    done = launch("deepspeed", train_command(config, data, tmp_path, "run"))
    assert done.returncode == 3 and "Traceback" not in done.stdout, done.stdout
    assert done.stdout.count("data error") == 1 and "pixels-train-000001.tar image-" in done.stdout, done.stdout


def test_a_stock_fp16_file_trains(work):
    (work / "stock.json").write_text(json.dumps(STOCK_FP16))
    flags = ["--model", TINY, "--image-size", "16", "--num-steps", "4", "--log-every", "1", "--workers", "0"]
    command = train_command(work / "stock.json", work / "data", work, "fp16", *flags)
    done = launch("deepspeed", command, PYTHONPATH=str(ROOT / "tests/workers/site"))
    assert done.returncode == 0 and "fp16  ZeRO stage 2" in done.stdout, done.stdout
    lines = [line for line in metrics(work / "fp16") if line["split"] == "train"]
    assert [line["loss_scale"] for line in lines] == [256.0] * 4 and lines[-1]["skipped_steps"] == 0
    assert lines[3]["loss"] != lines[0]["loss"], "DeepSpeed's warmup begins with two steps at rate 0"


@pytest.mark.parametrize(
    ("num_devices", "visible", "flags"),
    [
        (0, "", "--num_gpus 2"),
        (1, "", "--num_gpus 1"),
        (8, "", "--num_gpus 4"),
        (3, "5,0,7", "--include localhost:5,0"),
        (1, "6", "--include localhost:6"),
    ],
)
def test_quickstart_takes_the_devices_that_it_may_see(tmp_path, num_devices, visible, flags):
    """The script itself up to its first training, with a python that counts so many devices and a deaf deepspeed."""
    python = f"""#!/bin/sh
    case "$*" in
        *device_count*) echo {num_devices} ;;
        tools/* | -I*) ;; # there is nothing to shard or to install
        *) exec {sys.executable} "$@" ;;
    esac"""
    for name, script in (("python", python), ("deepspeed", '#!/bin/sh\necho "deepspeed $*"; exit 1')):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "launch/quickstart.sh"],
        cwd=ROOT,
        env=os.environ
        | {
            "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix,
            "CUDA_VISIBLE_DEVICES": visible,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and f" {flags} --master_port " in done.stdout, done.stdout + done.stderr


AGENT = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | {"TORCHELASTIC_RUN_ID": "none"})
sys.stdin.readline()
"""
RANK = """
import os, time
from vitds.launcher import find_launcher
launcher = find_launcher(os.getpid())
print(launcher.is_gone(), flush=True)
while not launcher.is_gone():
    time.sleep(0.05)
print("gone", flush=True)
"""


def test_an_agent_of_torch_by_any_name_is_a_launcher_that_may_go():
    """As `accelerate launch`, `python -m torch.distributed.launch` and others: it is the parent of its ranks."""
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, RANK], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert agent.stdout.readline() == "False\n"
    agent.stdin.write("end\n")
    agent.stdin.close()
    assert agent.wait(30) == 0
    assert agent.stdout.readline() == "gone\n"
