"""The supervisor around commands that play a launcher: signals, orphans, verdicts, restarts; without torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_processes import ROOT

from vitds.process_tree import descendants
from vitds.supervise import _hosts_by_ssh

# What a rank writes, from the shell: the verdict's file appears whole.
RECORD = 'record() { echo "{\\"exit_code\\": $1, \\"step\\": 5}" > "$VITDS_EXIT_FILE"; }; '


def supervise(script: str, *flags: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "launch/supervise.py", *flags, "bash", "-c", RECORD + script],
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    try:
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    return process.returncode, output


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("record 0", 0),
        ("record 75; exit 1", 75),  # launch.py's own code after SIGTERM
        ("record 7; exit 0", 7),
        ("record null", 7),  # `deepspeed` exits 0 and the ranks are gone
        ("record null; kill -9 $$", 7),
        ("exit 247", 7),  # a rank was killed before it had begun
        ("exit 0", 7),
        ("exit 2", 2),  # the launcher's own complaint
        ("exit 127", 127),
        ('echo "half a ver" > "$VITDS_EXIT_FILE"', 7),
    ],
)
def test_the_verdict_counts_and_not_the_launchers_code(script, code):
    assert end_of(supervise(script))[0] == code


@pytest.mark.parametrize(("code", "starts"), [(7, 3), ("null", 3), (0, 1), (1, 1), (2, 1), (6, 1), (75, 1), (130, 1)])
def test_only_a_lost_rank_is_started_again(tmp_path, code, starts):
    exit_code, output = end_of(supervise(f"echo start >> {tmp_path}/starts; record {code}", "--restarts", "2"))
    assert (tmp_path / "starts").read_text().count("start") == starts
    assert exit_code == (7 if code == "null" else code)
    assert ("restart 2 of 2, from the last checkpoint" in output) == (starts == 3), output


def test_a_restart_that_goes_well_is_the_end(tmp_path):
    script = f"[ -e {tmp_path}/lost ] && record 0 || {'{'} touch {tmp_path}/lost; record 7; {'}'}"
    exit_code, output = end_of(supervise(script, "--restarts=5"))
    assert exit_code == 0 and output.count("restart") == 1 and "a rank was lost after step 5; restart 1 of 5" in output


RANK = "import os,signal,time\n"
RANK += "signal.signal(signal.SIG{name}, lambda *_: (open(os.environ['OUT']+'/'+str(os.getpid()),'a').write('x'),"
RANK += " time.sleep(1), os._exit(0)))\n"
RANK += "open(os.environ['OUT']+'/ready-'+str(os.getpid()),'w')\nwhile True: time.sleep(0.1)"


def wait_for(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def two_ranks(tmp_path: Path, name: str = "TERM") -> str:
    """A launcher that is deaf, with two ranks that note what they hear, and take a second to end."""
    (tmp_path / "rank.py").write_text(RANK.format(name=name))
    start = "; ".join(f"LOCAL_RANK={rank} {sys.executable} {tmp_path}/rank.py &" for rank in (0, 1))
    return f"{start.replace('&;', '&')} record null; wait; exit 0"


@pytest.mark.parametrize(("name", "code"), [("TERM", 75), ("USR1", 75), ("INT", 130)])
def test_the_ranks_hear_a_signal_once_and_are_waited_for(tmp_path, name, code):
    process = supervise(two_ranks(tmp_path, name).replace("wait;", f"wait; record {code};"), OUT=str(tmp_path))
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert end_of(process)[0] == code
    assert [path.read_text() for path in tmp_path.glob("[0-9]*")] == ["x", "x"]


def test_ranks_without_their_launcher_are_told_and_no_process_is_left(tmp_path):
    process = supervise(two_ranks(tmp_path), OUT=str(tmp_path))
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    (launcher,) = [pid for pid, parent in descendants(process.pid).items() if parent == process.pid]
    ranks = [int(path.name.removeprefix("ready-")) for path in tmp_path.glob("ready-*")]
    os.kill(launcher, signal.SIGKILL)
    exit_code, output = end_of(process)
    assert exit_code == 7 and "gone without a word" in output
    assert [path.read_text() for path in tmp_path.glob("[0-9]*")] == ["x", "x"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_what_does_not_end_is_killed_in_the_end(tmp_path):
    deaf = f"(trap '' TERM; touch {tmp_path}/deaf; sleep 1000) & until [ -e {tmp_path}/deaf ]; do sleep 0.01; done"
    process = supervise(f"record 75; {deaf}; exit 0", "--patience", "1")
    exit_code, output = end_of(process)
    assert exit_code == 75 and "processes are left after 1 s and are killed now" in output


def test_a_signal_before_any_rank_began_ends_the_command():
    process = supervise("echo started; sleep 1000")
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    exit_code, output = end_of(process)
    assert exit_code == 130 and "stopped before training began" in output


def test_a_stop_that_only_one_of_the_ranks_heard_is_said(tmp_path):
    """launch.py ends the others before Python hears anything in them."""
    reason = "stopped before training began"
    words = json.dumps({"exit_code": 75, "step": None, "reason": reason})
    exit_code, output = end_of(supervise(f"echo '{words}' > \"$VITDS_EXIT_FILE\"; exit 241"))
    assert exit_code == 75 and output.count(reason) == 1


def test_the_command_line():
    for words in ([], ["--restarts"], ["--restarts", "-1", "true"], ["--restart", "1", "true"]):
        done = subprocess.run([sys.executable, "launch/supervise.py", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "usage: python launch/supervise.py" in done.stderr
    missing = subprocess.run(
        [sys.executable, "launch/supervise.py", "no-such-command"], cwd=ROOT, capture_output=True, text=True
    )
    assert missing.returncode == 2 and "no-such-command: No such file" in missing.stderr


def test_ranks_that_ssh_would_start_elsewhere_are_refused(tmp_path):
    (tmp_path / "hostfile").write_text("# two of them\nnode-a slots=8\n\nnode-b slots=8\n")
    words = ["deepspeed", "-q", f"--hostfile={tmp_path}/hostfile"]
    start = [sys.executable, "launch/supervise.py", *words]
    done = subprocess.run([*start, "launch/train.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "node-a, node-b" in done.stderr and "--no_ssh" in done.stderr
    assert _hosts_by_ssh([*words, "launch/train.py"]) == ["node-a", "node-b"]
    assert _hosts_by_ssh([*words, "--num_nodes", "1", "launch/train.py"]) == ["node-a"]
    assert _hosts_by_ssh([*words, "--no_ssh", "launch/train.py"]) == []
    assert _hosts_by_ssh(["deepspeed", "-q", "launch/train.py"]) == _hosts_by_ssh(["deepspeed", "-H"]) == []
    assert _hosts_by_ssh(["torchrun", *words[1:]]) == []


def test_a_verdict_stands_and_a_lost_rank_gives_way(tmp_path, monkeypatch):
    from vitds.verdict import Verdict

    monkeypatch.setenv("VITDS_EXIT_FILE", str(tmp_path / "supervisors.json"))
    for first, second, stays in ((75, 5, 75), (7, 5, 5), (5, 7, 5), (0, 7, 0)):
        (tmp_path / "supervisors.json").unlink(missing_ok=True)
        one, other = Verdict(), Verdict()
        one.begin()
        one.belongs_to(tmp_path, is_main=True)
        assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] is None
        other.belongs_to(tmp_path, is_main=False)
        one.step = 3
        one.record(first, "")
        other.record(second, "")
        for name in ("exit.json", "supervisors.json"):
            assert json.loads((tmp_path / name).read_text())["exit_code"] == stays
