"""Damage of a checkpoint of two ranks: every one is seen before any state changes, and the newest whole one is used."""

import itertools
import random
import shutil

import pytest
from counts import record
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

from vitds.checkpoint import CheckpointStore
from vitds.manifest import MANIFEST_NAME
from vitds.world import World

OLDER, NEWER = "global_step2", "global_step4"
STEPS = {"num_steps": 6, "save_every": 2, "stop_at_step": 4}


@pytest.fixture(scope="module")
def ranks():
    """Two ranks that stay warm; a stage-3 engine patches torch for its process, so stage 1 is first."""
    with WarmRanks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module", params=[1, 3])
def stopped(request, ranks, digits, tmp_path_factory):
    """A run of two ranks with checkpoints of steps 2 and 4, and the command that goes on with it."""
    output = tmp_path_factory.mktemp(f"stage{request.param}")
    config = config_file(output, request.param, vitds=STEPS)
    ranks.run(train_command(config, digits, output, "stopped"), exit_code=75)
    return output / "stopped"


def store_of(directory):
    return CheckpointStore(directory, World())


def files_of(directory):
    return sorted(path for path in directory.iterdir())


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def flipped(content, chance):
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def cut(content, chance):
    return content[: chance.randrange(len(content))]


def is_seen(checkpoints, named):
    """True when the older checkpoint is chosen, and one of the files is named."""
    choice = store_of(checkpoints).newest_whole()
    assert choice.directory == checkpoints / OLDER
    return any(str(path) in line for line in choice.passed_over for path in named)


def tried(checkpoints, damages):
    """How many damages were seen, of how many; each is {path: content, or None for a file that goes}."""
    num_seen = num_tried = 0
    for damage in damages:
        before = {path: path.read_bytes() if path.exists() else None for path in damage}
        put(damage)
        # Whatever is wrong with a manifest is told of its directory.
        named = [path.parent if path.name == MANIFEST_NAME else path for path in damage]
        num_seen += is_seen(checkpoints, named)
        num_tried += 1
        put(before)
    choice = store_of(checkpoints).newest_whole()
    assert choice.directory == checkpoints / NEWER and not choice.passed_over
    return num_seen, num_tried


def put(files):
    for path, content in files.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)


def random_damages(directory, change, count, seed):
    """As many bytes as a file has, so often is it hit; but a manifest and a small file are hit now and then too."""
    chance = random.Random(seed)
    files = files_of(directory)
    sizes = [path.stat().st_size for path in files]
    for number in range(count):
        path = chance.choice(files) if number % 2 else chance.choices(files, sizes)[0]
        yield {path: change(path.read_bytes(), chance)}


def swaps(directory):
    """Two files of the checkpoint under each other's name; some are alike, as what two ranks know of a run."""
    for one, other in itertools.combinations(files_of(directory), 2):
        if one.read_bytes() != other.read_bytes():
            yield {one: other.read_bytes(), other: one.read_bytes()}


def mixtures(newer, older):
    """Some of the files are those of an older step, the manifest among them or not."""
    names = [path.name for path in files_of(newer)]
    for chosen in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names) + 1)):
        damage = {newer / name: (older / name).read_bytes() for name in chosen}
        if damage := {path: content for path, content in damage.items() if content != path.read_bytes()}:
            yield damage


def missing_and_extra(directory):
    for path in files_of(directory):
        yield {path: None}
        if path.suffix == ".pt":
            yield {path.with_name(path.name.replace("mp_rank_00", "mp_rank_01")): path.read_bytes()}


def copied(stopped, tmp_path):
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def check(fault, how, seen, of):
    record(fault, how, seen, of, "the file named, the checkpoint before it used")
    assert seen == of


@pytest.mark.ranks
@pytest.mark.parametrize("count", [(40, 20), pytest.param((500, 100), marks=pytest.mark.slow)])
def test_flips_and_cuts_of_any_file_are_seen(stopped, tmp_path, count):
    checkpoints = copied(stopped, tmp_path)
    num_flips, num_cuts = count
    flips = tried(checkpoints, random_damages(checkpoints / NEWER, flipped, num_flips, 1))
    check("bit flip in a checkpoint", "one random bit of any file, the manifest too; 2 ranks, stages 1 and 3", *flips)
    cuts = tried(checkpoints, random_damages(checkpoints / NEWER, cut, num_cuts, 2))
    check("truncated checkpoint", "any file cut at a random byte; 2 ranks, stages 1 and 3", *cuts)


@pytest.mark.ranks
def test_swaps_mixtures_missing_and_extra_files_are_seen(stopped, tmp_path):
    checkpoints = copied(stopped, tmp_path)
    newer = checkpoints / NEWER
    check("swapped files", "every two different files, stages 1 and 3", *tried(checkpoints, swaps(newer)))
    mixed = tried(checkpoints, mixtures(newer, checkpoints / OLDER))
    check("mixture of two steps", "every subset of files taken from the step before, stages 1 and 3", *mixed)
    odd = tried(checkpoints, missing_and_extra(newer))
    check("missing or extra file", "every file gone, every file under the name of one rank more", *odd)


@pytest.mark.ranks
def test_a_directory_under_another_step_is_seen_and_the_pointers_are_not_trusted(stopped, tmp_path):
    checkpoints = copied(stopped, tmp_path)
    shutil.copytree(checkpoints / OLDER, checkpoints / "global_step6")
    choice = store_of(checkpoints).newest_whole()
    assert choice.directory == checkpoints / NEWER
    assert choice.passed_over == [f"{checkpoints / 'global_step6'}: is the checkpoint of step 2"]
    shutil.rmtree(checkpoints / "global_step6")
    for content in (b"", b"global_step9", b"global_step2", b"\xff\xfe\0", b"../../elsewhere", b"x" * 100_000):
        for pointer in ("latest", "best"):
            (checkpoints / pointer).write_bytes(content)
        choice = store_of(checkpoints).newest_whole()
        assert choice.directory == checkpoints / NEWER and not choice.passed_over


@pytest.mark.ranks
def test_a_damaged_run_resumes_from_the_checkpoint_before_and_ends_the_same(stopped, ranks, digits, tmp_path):
    """Damage of the manifest, of one rank's file, and a mixture; each run ends as the one that nobody damaged."""
    (config_of,) = stopped.parent.glob("*.json")
    config = config_file(tmp_path, int(config_of.stem[-1]), vitds=STEPS | {"stop_at_step": None})
    chance = random.Random(3)

    def resumed(name):
        command = train_command(config, digits, tmp_path, name)
        return ranks.run(command).output

    shutil.copytree(stopped, tmp_path / "whole")
    assert "resumed at step 4 of 6" in resumed("whole")
    newer = stopped / "checkpoints" / NEWER
    victims = [newer / MANIFEST_NAME, next(path for path in files_of(newer) if "rank_1_mp" in path.name)]
    for number, victim in enumerate(victims):
        name = f"damaged{number}"
        shutil.copytree(stopped, tmp_path / name)
        path = tmp_path / name / "checkpoints" / NEWER / victim.name
        path.write_bytes(flipped(path.read_bytes(), chance))
        output = resumed(name)
        assert "passed over a damaged checkpoint" in output and victim.name in output
        assert "resumed at step 2 of 6" in output
        assert metrics(tmp_path / name) == metrics(tmp_path / "whole")
        assert_same_weights(weights(tmp_path / name, 6), weights(tmp_path / "whole", 6))
