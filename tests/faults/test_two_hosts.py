"""Two hosts, as network namespaces with a cable between them: the same losses as one host, also when the cable is cut.

The hosts share the file system, as the run directory of a cluster does. Root makes namespaces; without it this is
skipped.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from counts import counted
from rank_processes import ROOT, free_port, run_ranks
from run_directory import assert_same_weights, config_file, metrics, train_command, weights

pytestmark = pytest.mark.ranks

STEPS = 120
TIMEOUT_S = 300


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


class Hosts:
    """Two namespaces, their cable, and what runs in them."""

    ADDRESSES = ("10.213.77.1", "10.213.77.2")

    def __init__(self) -> None:
        self.names = [f"vitds-{os.getpid()}-{letter}" for letter in "ab"]
        self.interfaces = [f"v{os.getpid()}{letter}" for letter in "ab"]

    def lay_cable(self) -> str:
        """An empty string, or why there can be no such hosts here."""
        made = [ip("netns", "add", name) for name in self.names]
        made.append(ip("link", "add", self.interfaces[0], "type", "veth", "peer", "name", self.interfaces[1]))
        for name, interface, address in zip(self.names, self.interfaces, self.ADDRESSES, strict=True):
            made.append(ip("link", "set", interface, "netns", name))
            made.append(ip("-n", name, "addr", "add", f"{address}/24", "dev", interface))
            made += [ip("-n", name, "link", "set", link, "up") for link in ("lo", interface)]
        return "".join(done.stderr for done in made)

    def set_cable(self, state: str) -> None:
        assert ip("-n", self.names[0], "link", "set", self.interfaces[0], state).returncode == 0

    def processes(self) -> list[str]:
        return [pid for name in self.names for pid in ip("netns", "pids", name).stdout.split()]

    def are_empty(self, timeout_s: float = 10) -> bool:
        """Whether no process is left on any host, a data worker in its last moment included."""
        deadline = time.monotonic() + timeout_s
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.processes()

    def tear_down(self) -> None:
        for pid in self.processes():
            os.kill(int(pid), 9)
        for name in self.names:
            ip("netns", "del", name)

    def start(self, command: list[str], outputs: list[Path], launcher: bool, hostfile: Path) -> list[subprocess.Popen]:
        """One rank on each host, under `deepspeed` or as plain processes; what they print goes to files."""
        port, started = str(free_port()), []
        hostfile.write_text("host-a slots=1\nhost-b slots=1\n")
        for number, (name, interface) in enumerate(zip(self.names, self.interfaces, strict=True)):
            env = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
            env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface, "DS_ACCELERATOR": "cpu"}
            env |= {"PATH": f"{Path(sys.prefix) / 'bin'}:{env['PATH']}", "LOCAL_SIZE": "1"}
            meeting = {"MASTER_ADDR": self.ADDRESSES[0], "MASTER_PORT": port}
            start = [sys.executable]
            if launcher:
                start = ["deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number)]
                start += ["--master_addr", meeting["MASTER_ADDR"], "--master_port", port]
            else:
                env |= meeting | {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
            with open(outputs[number], "w") as output:
                started.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, *start, *command],
                        cwd=ROOT,
                        env=env,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        return started


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    hosts = Hosts()
    try:
        if reason := hosts.lay_cable():
            pytest.skip(f"no network namespaces here: {reason}")
        yield hosts
    finally:
        hosts.tear_down()


def wait_for_lines(run_dir: Path, num_lines: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < num_lines:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


CASES = [
    pytest.param(2, False, id="stage 2"),
    *(pytest.param(stage, True, marks=pytest.mark.slow, id=f"stage {stage}, deepspeed") for stage in (1, 2, 3)),
]


@pytest.mark.parametrize(("stage", "launcher"), CASES)
@counted("two hosts lose each other", "the cable between two network namespaces is cut")
def test_a_cut_cable_ends_both_hosts_and_the_rerun_equals_one_host(digits, tmp_path, hosts, stage, launcher):
    settings = {"num_steps": STEPS, "save_every": 20, "hang_timeout_s": 10}
    config = config_file(tmp_path, stage, gradient_accumulation_steps=1, vitds=settings)
    command = train_command(config, digits, tmp_path, "two")
    outputs, hostfile = [tmp_path / "host-a.txt", tmp_path / "host-b.txt"], tmp_path / "hostfile"

    cut = hosts.start(command, outputs, launcher, hostfile)
    wait_for_lines(tmp_path / "two", 45, cut)
    hosts.set_cable("down")
    began = time.monotonic()
    try:
        codes = [process.wait(timeout=TIMEOUT_S) for process in cut]
        print(f"stage {stage}: both hosts ended {time.monotonic() - began:.1f} s after the cut, exit {codes}")
    finally:
        hosts.set_cable("up")
    said = [path.read_text() for path in outputs]
    assert codes == [7, 7], said
    for number, text in enumerate(said):
        assert f"no answer for 5 s from rank {1 - number}, last seen in " in text, text
        assert f"stacks of rank {number}:" in text
    assert hosts.are_empty()
    assert not (tmp_path / f"two/checkpoints/global_step{STEPS}").exists(), "the cut came too late to show anything"

    again = hosts.start(command, outputs, launcher, hostfile)
    assert [process.wait(timeout=TIMEOUT_S) for process in again] == [0, 0], [path.read_text() for path in outputs]
    assert "resumed at step " in outputs[0].read_text()
    run_ranks(train_command(config, digits, tmp_path, "one"), 2)
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert_same_weights(weights(tmp_path / "two", STEPS), weights(tmp_path / "one", STEPS))
