"""A checkpoint stays DeepSpeed's: its load_checkpoint goes on from it, and its zero_to_fp32.py reads the weights."""

import shutil

import pytest
import torch
from rank_processes import last_json, run_ranks
from run_directory import assert_same_weights, config_file, metrics, train_command, weights
from warm_ranks import WarmRanks

from vitds.data.loader import TrainLoader
from vitds.data.order import NaturalOrder
from vitds.data.reader import ShardReader
from vitds.ds_config import Batch
from vitds.run_config import DataConfig
from vitds.world import World

pytestmark = pytest.mark.ranks

BF16 = {"bf16": {"enabled": True}}
CLIPPED = ", clipped"  # else the limit is so high that nothing is, and every bit can be asked for
CASES = {  # stage, precision, --train; stage 3 comes last, for it patches torch in its process
    "stage 0": (0, {}, "all"),
    "stage 1": (1, {}, "all"),
    "stage 1, frozen": (1, {}, "last-1"),
    "stage 1, bf16": (1, BF16, "all"),
    "stage 1, bf16, frozen": (1, BF16, "last-1"),
    "stage 2": (2, {}, "all"),
    "stage 2, clipped": (2, {}, "all"),
    "stage 2, bf16, frozen": (2, BF16, "last-1"),
    "stage 3": (3, {}, "all"),
    "stage 3, frozen": (3, {}, "last-1"),
}
SHARDED = [case for case in CASES if case != "stage 0"]
STOP, GO_ON = 6, 9
WORLD_SIZE = 2


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Per case a run `CASE`, stopped and resumed, and a copy `CASE as stopped` of what lay there in between."""
    directory = tmp_path_factory.mktemp("runs")
    with WarmRanks(WORLD_SIZE) as ranks:
        for case, (stage, precision, train) in CASES.items():
            limit = {"gradient_clipping": 1.0 if case.endswith(CLIPPED) else 100.0}
            config = config_file(directory, stage, **precision, **limit, vitds={"dropout": 0.0, "drop_path": 0.0})
            command = train_command(config, digits, directory, case, "--train", train)
            ranks.run([*command, "--stop-at-step", STOP], exit_code=75)
            shutil.copytree(directory / case, directory / f"{case} as stopped")
            ranks.run([*command, "--stop-at-step", GO_ON], exit_code=75)
    return directory


@pytest.fixture(scope="module")
def plain_losses(runs, digits):
    """What DeepSpeed alone computes from each copy on, by case."""
    batch = Batch(global_batch=16, micro_batch=4, accumulation_steps=2, world_size=WORLD_SIZE)
    shares = []
    for rank in range(WORLD_SIZE):
        world = World(rank, rank, WORLD_SIZE, WORLD_SIZE)
        place = {"seed": 42, "samples_seen": STOP * 16, "num_steps_end": GO_ON, "workers": 0, "device": "cpu"}
        data = ShardReader(str(digits), "train")
        how = (NaturalOrder(42, len(data)), DataConfig(), (16, 16), 10, batch, world)
        loader = TrainLoader(data, *how, **place, dtype=torch.float32)
        micro_batches = [(one.images, one.targets) for one in loader]
        shares.append([micro_batches[at : at + 2] for at in range(0, len(micro_batches), 2)])
    torch.save(list(zip(*shares, strict=True)), runs / "batches.pt")
    copies = [str(runs / f"{case} as stopped") for case in CASES]
    command = ["tests/workers/plain_deepspeed_continue.py", str(runs / "batches.pt"), *copies]
    return dict(zip(CASES, last_json(run_ranks(command, WORLD_SIZE)[0])["losses"], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_alone_goes_on_to_the_same_losses(case, runs, plain_losses):
    """To the bit, but for roundings of clipping: DeepSpeed multiplies gradients where vitds' optimizer divides them."""
    lines = [line for line in metrics(runs / case) if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, GO_ON + 1))
    is_clipped = [line["grad_norm"] > 1.0 for line in lines]
    assert not case.endswith(CLIPPED) or all(is_clipped)
    expected = [line["loss"] for line in lines[STOP:]]
    assert plain_losses[case] == (pytest.approx(expected, rel=1e-5) if case.endswith(CLIPPED) else expected)
    assert len(set(plain_losses[case])) == GO_ON - STOP


@pytest.fixture(scope="module")
def extracted(runs):
    """What zero_to_fp32.py wrote, by case."""
    directories = {case: runs / f"{case} as stopped/checkpoints" for case in SHARDED}
    run_ranks(["tests/workers/run_zero_to_fp32.py", *map(str, directories.values())], 1)
    return {case: torch.load(path / "fp32/pytorch_model.bin") for case, path in directories.items()}


@pytest.mark.parametrize("case", SHARDED)
def test_zero_to_fp32_gives_the_weights(case, runs, extracted):
    expected = weights(runs / f"{case} as stopped", STOP)
    assert_same_weights({name: tensor.float() for name, tensor in extracted[case].items()}, expected)


def test_at_stage_0_the_model_file_holds_the_weights_themselves(runs):
    """DeepSpeed's zero_to_fp32.py knows no stage 0: there is nothing to put together."""
    path = runs / "stage 0 as stopped/checkpoints" / f"global_step{STOP}" / "mp_rank_00_model_states.pt"
    assert_same_weights(torch.load(path)["module"], weights(runs / "stage 0 as stopped", STOP))
