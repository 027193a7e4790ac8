"""The ranks watch each other: every kind of end has its exit code, and its rank and phase are named."""

import re
import socket
import threading

import pytest
from rank_processes import start_ranks

from vitds import watchdog

HANG_TIMEOUT_S = 5


def end(fault, faulty_rank, world_size=2):
    """Exit codes and outputs of ranks of which one has a fault; it is killed when the others have ended."""
    processes = start_ranks(["tests/workers/watched.py", fault, str(faulty_rank), str(HANG_TIMEOUT_S)], world_size)
    others = [process for rank, process in enumerate(processes) if rank != faulty_rank]
    try:
        for process in others:
            process.wait(timeout=90)
        if fault != "SIGSTOP":
            processes[faulty_rank].wait(timeout=90)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [process.communicate()[0] for process in processes]


@pytest.mark.ranks
@pytest.mark.parametrize(("faulty_rank", "world_size"), [(0, 2), (2, 3)])
def test_a_killed_rank_is_named_by_each_of_the_others_with_their_stacks(faulty_rank, world_size):
    codes, outputs = end("SIGKILL", faulty_rank, world_size)
    del codes[faulty_rank], outputs[faulty_rank]
    assert set(codes) == {7}, outputs
    for output in outputs:
        assert f"rank lost  rank {faulty_rank} died, last seen in data at step 20\n" in output
        assert "stacks of rank " in output and "watched.py" in output


@pytest.mark.ranks
@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_a_stopped_rank_is_named(faulty_rank):
    codes, outputs = end("SIGSTOP", faulty_rank)
    assert codes[1 - faulty_rank] == 7
    assert f"no answer for 5 s from rank {faulty_rank}, last seen in data at step 20" in outputs[1 - faulty_rank]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("fault", "faulty_rank", "phase"), [("hang", 0, "data"), ("hang in a phase of waiting", 1, "backward")]
)
def test_the_rank_that_the_others_wait_for_is_named_and_shows_where_it_hangs(fault, faulty_rank, phase):
    codes, outputs = end(fault, faulty_rank)
    assert codes == [7, 7], outputs
    for output in outputs:
        assert re.search(rf"rank {faulty_rank} hangs in {phase} at step 20 \(\S+watched.py:\d+ \w+\)", output), output
        assert "rank lost" in output and f"rank {1 - faulty_rank} hangs" not in output


@pytest.mark.ranks
def test_a_bug_of_one_rank_is_told_apart_from_a_death():
    codes, outputs = end("bug", 1)
    assert codes == [7, 1], outputs
    assert "rank 1 failed in data at step 20: TypeError: there is no such thing" in outputs[0]
    assert "Traceback" in outputs[1] and "Traceback" not in outputs[0]


@pytest.mark.ranks
def test_what_one_rank_alone_cannot_have_is_said_by_it_alone_and_is_every_ranks_exit_code():
    codes, outputs = end("data error", 1)
    assert codes == [3, 3], outputs
    assert outputs[0] == "" and outputs[1] == "rank 1: data error  the server is silent\n"


@pytest.mark.ranks
def test_an_error_of_all_ranks_is_said_once_by_rank_0_even_when_it_comes_late():
    codes, outputs = end("same error", 0)
    assert codes == [6, 6], outputs
    assert outputs == ["diverged  the loss is nan at step 20\n", ""]


@pytest.mark.ranks
@pytest.mark.parametrize("fault", ["slow start", "slow data"])
def test_what_was_never_finished_before_has_time_and_data_processes_that_are_looked_after(fault):
    codes, outputs = end(fault, 0)
    assert (codes, outputs) == ([0, 0], ["", ""])


def test_strangers_on_the_port_are_left_out():
    with watchdog._listener("127.0.0.1") as listener:
        address = listener.getsockname()
        strangers = [socket.create_connection(address) for _ in range(4)]
        for stranger, words in zip(
            strangers, (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"secret": "guess", "rank": 1}\n', b"[1]\n"), strict=True
        ):
            stranger.sendall(words)
        strangers[0].shutdown(socket.SHUT_WR)
        links = {}
        peer = threading.Thread(target=lambda: links.update(watchdog._reach(*address, "word", 1)))
        peer.start()
        admitted = watchdog._admit(listener, "word", 1)
        peer.join()
    assert list(admitted) == [1] and list(links) == [0]
    links[0].send({"motion": 1})
    while not (received := admitted[1].receive()):
        pass
    assert received == [{"motion": 1}]
    for one in (*strangers, *links.values(), *admitted.values()):
        one.close()
