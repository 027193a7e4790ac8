"""A run goes on with any number of ranks, at any ZeRO stage: the same state, the same samples, the same losses."""

import pytest
from elastic_runs import TOLERANCE, Place, assert_loads_bit_for_bit, go_on, train_source
from run_directory import config_file, metrics, train_command
from warm_ranks import WarmRanks

from vitds.elastic import Fragment, parts_of_rank, runs_of_rank

# Each number of ranks and each stage once as source and once as target: a ring.
RING = [
    ("sgd", "fp32", Place(1, 0), Place(2, 3)),
    ("layer decay", "fp32", Place(2, 3), Place(3, 1)),
    ("ema", "bf16", Place(3, 1), Place(4, 2)),
    ("frozen", "fp32", Place(4, 2), Place(1, 0)),
]


@pytest.fixture(scope="module")
def one_rank():
    with WarmRanks(1) as ranks:
        yield ranks


@pytest.mark.ranks
def test_every_world_size_and_stage_hands_over_to_another(one_rank, digits, tmp_path):
    """Every process is at one stage all its life: stage 3 patches torch."""

    def arrives(ranks, case, dtype, place, source):
        assert_loads_bit_for_bit(ranks, tmp_path, digits, place, case, dtype, source)
        deviation = go_on(ranks, tmp_path, digits, place, case, dtype, source)
        assert deviation <= TOLERANCE[dtype], (case, source.name, place, deviation)

    case, dtype, start, target = RING[0]
    source = train_source(one_rank, tmp_path, digits, start, case, dtype)
    for next_case, next_dtype, place, next_target in RING[1:]:
        assert place == target
        with WarmRanks(place.world_size) as ranks:
            arrives(ranks, case, dtype, place, source)
            source = train_source(ranks, tmp_path, digits, place, next_case, next_dtype)
        case, dtype, target = next_case, next_dtype, next_target
    arrives(one_rank, case, dtype, target, source)


@pytest.mark.ranks
def test_the_loss_scale_of_fp16_goes_along(one_rank, digits, tmp_path):
    """It doubles after every third good step, so that step 10 lies between two of its changes."""
    source = train_source(one_rank, tmp_path, digits, Place(1, 1), "adamw", "fp16")
    scales = [line["loss_scale"] for line in metrics(tmp_path / f"{source.name}-unbroken")]
    assert scales[9] > 64
    assert len(set(scales[9:])) > 1
    assert_loads_bit_for_bit(one_rank, tmp_path, digits, Place(1, 2), "adamw", "fp16", source)
    assert go_on(one_rank, tmp_path, digits, Place(1, 2), "adamw", "fp16", source) <= TOLERANCE["fp16"]


@pytest.mark.ranks
def test_masters_and_moments_move_to_host_memory_and_back(one_rank, digits, tmp_path):
    check_offloading(2, one_rank, digits, tmp_path)


@pytest.mark.ranks
@pytest.mark.slow
def test_they_move_at_stage_3_too(digits, tmp_path):
    with WarmRanks(1) as ranks:  # stage 3 patches torch for the rest of its process
        check_offloading(3, ranks, digits, tmp_path)


def check_offloading(stage, one_rank, digits, tmp_path):
    """A ZeRO stage is often changed together with offloading."""
    ours = {"num_steps": 6, "save_every": 2, "dropout": 0.0, "drop_path": 0.0, "workers": 0}
    offloaded = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    for name, stops in {"plain": (None,), "moved": (2, 4, None)}.items():
        for number, stop in enumerate(stops):
            zero = offloaded if number == 1 else {"stage": 1}
            config = config_file(tmp_path, zero["stage"], zero_optimization=zero, vitds=ours)
            flags = ["--stop-at-step", str(stop)] if stop else []
            one_rank.run(train_command(config, digits, tmp_path, name, *flags), exit_code=75 if stop else 0)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "moved")]
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE["fp32"])


def test_every_element_of_every_parameter_lies_in_one_vector_once():
    shapes, paddings = {"a": (3, 5), "b": (2,), "c": ()}, (1, 0, 3)
    for world_size in (1, 2, 3, 4, 24):
        size = -(-22 // world_size)
        of_runs = [runs_of_rank(shapes, paddings, rank, size) for rank in range(world_size)]
        of_parts = [parts_of_rank(shapes, rank, world_size) for rank in range(world_size)]
        for ranks in (of_runs, of_parts):
            for name, numel in (("a", 15), ("b", 2), ("c", 1)):
                held = [f for fragments in ranks for f in fragments if f.name == name]
                assert len(held) == world_size
                assert [i for f in held for i in range(f.start, f.start + f.numel)] == list(range(numel))
    assert runs_of_rank(shapes, paddings, 1, 11) == [
        Fragment("a", 11, 4, 0),
        Fragment("b", 0, 2, 5),
        Fragment("c", 0, 1, 7),
    ]
    assert parts_of_rank(shapes, 1, 2) == [Fragment("a", 8, 7, 0), Fragment("b", 1, 1, 8), Fragment("c", 0, 0, 0)]
