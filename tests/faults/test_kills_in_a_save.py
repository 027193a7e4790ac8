"""SIGKILL of a rank at every operation of a save on the file system, then of the other: a whole checkpoint is there."""

import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from counts import record
from forked_ranks import ForkedRanks
from run_directory import config_file, train_command
from run_state import check_store, fingerprint

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(shutil.which("cc") is None, reason="the library that kills at a system call needs a C compiler"),
]

FIRST, LAST = 2, 4  # the steps that are saved; the save of the second is the one that is killed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two ranks with the killing library in them."""
    library = tmp_path_factory.mktemp("library") / "kill_point.so"
    source = Path(__file__).with_name("kill_point.c")
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    with ForkedRanks(2, LD_PRELOAD=str(library)) as ranks:
        yield ranks


@dataclass
class SaveUnderFire:
    """A run with a checkpoint, copied for every kill in its next save, and how the run ends unkilled."""

    ranks: ForkedRanks
    directory: Path
    command: list[str]
    reference: dict[str, str]
    operations: list[list[str]]  # by rank, in their order

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def rewind(self):
        """Put the run back to its first checkpoint, with what a killed save and a killed deletion left beside it."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.copytree(self.directory / "first", self.run_dir)
        for left in (f".writing-global_step{LAST - 1}", ".trash-global_step1"):
            (self.run_dir / "checkpoints" / left).mkdir()
            (self.run_dir / "checkpoints" / left / "torn").write_text("half")

    def start(self, **environment_by_rank):
        """Start the ranks, each with its additions to the environment."""
        below = {"KILL_BELOW": str(self.run_dir / "checkpoints")}
        environments = [below | environment_by_rank.get(f"rank{rank}", {}) for rank in (0, 1)]
        self.ranks.start(self.command, self.directory / "output.txt", *environments)

    def survives(self, rank: int, point: int) -> bool:
        """Kill `rank` at operation number `point` and then the other; whether the run ends as if unkilled."""
        self.rewind()
        self.start(**{f"rank{rank}": {"KILL_AT": str(point)}})
        assert self.ranks.kill_after(rank) == -9, (self.directory / "output.txt").read_text()[-6000:]
        step = check_store(self.run_dir)
        assert step in (FIRST, LAST)
        if step == FIRST:
            self.ranks.run(self.command, self.directory / "output.txt")
        return fingerprint(self.run_dir, LAST) == self.reference


def prepare(ranks, digits, directory, stage, background) -> SaveUnderFire:
    keys = {"num_steps": LAST, "save_every": FIRST, "keep_last": 1, "save_in_background": background}
    config = config_file(directory, stage, scheduler={"type": "constant"}, vitds=keys)
    command = train_command(config, digits, directory, "run")
    output = directory / "output.txt"
    ranks.start([*command, "--stop-at-step", str(FIRST)], output)
    assert set(ranks.wait()) == {75}, output.read_text()[-6000:]
    (directory / "run").rename(directory / "first")
    save = SaveUnderFire(ranks, directory, command, {}, [])
    save.rewind()
    save.start(**{f"rank{rank}": {"KILL_LOG": str(directory / f"{rank}.log")} for rank in (0, 1)})
    assert set(ranks.wait()) == {0}, output.read_text()[-6000:]
    save.reference = fingerprint(save.run_dir, LAST)
    save.operations = [(directory / f"{rank}.log").read_text().split() for rank in (0, 1)]
    return save


def test_some_points_of_a_save(ranks, digits, tmp_path):
    """The rename that commits on rank 0, and a write in the middle of the other rank's file."""
    save = prepare(ranks, digits, tmp_path, 2, True)
    renames = [number for number, name in enumerate(save.operations[0], 1) if name == "rename"]
    assert len(renames) >= 3, save.operations[0]  # MANIFEST.json, the directory, latest
    assert save.survives(0, renames[1])
    assert save.survives(1, len(save.operations[1]) // 2)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "background"), [(1, True), (1, False), (3, True)])
def test_every_point_of_a_save(ranks, digits, tmp_path, stage, background):
    """The checkpoints on the disk verify, and the same command ends as if nothing had happened."""
    save = prepare(ranks, digits, tmp_path, stage, background)
    survived, kinds = 0, Counter()
    points = [(rank, point) for rank in (0, 1) for point in range(1, len(save.operations[rank]) + 1)]
    for rank, point in points:
        survived += save.survives(rank, point)
        kinds[save.operations[rank][point - 1]] += 1
    how = f"ZeRO stage {stage}, {'background' if background else 'waiting'} save; each rank in turn"
    detail = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
    record("SIGKILL at every operation of a save on the file system", how, survived, len(points), detail)
    assert survived == len(points)
