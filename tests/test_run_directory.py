"""The run directory is one for all ranks, or the run does not start."""

import pytest
from rank_processes import run_ranks

pytestmark = pytest.mark.ranks
WORKER = "tests/workers/shared_directory.py"


def test_a_directory_that_all_ranks_see_is_fine_again_and_again(tmp_path):
    for _ in range(2):
        assert run_ranks([WORKER, str(tmp_path), str(tmp_path)], 2) == ["", ""]


@pytest.mark.parametrize("has_run_before", [False, True])
def test_a_host_with_a_directory_of_its_own_is_named(tmp_path, has_run_before):
    """Such a host would keep its part of every checkpoint to itself."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    if has_run_before:
        other.mkdir()
        (other / ".lock").write_text("0123456789abcdef")
    outputs = run_ranks([WORKER, str(mine), str(other)], 2, exit_code=4)
    assert "does not see what rank 0 writes to the run directory" in outputs[0] and "share" in outputs[0]
    assert outputs[1] == ""
