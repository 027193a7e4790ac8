"""Every (ranks, ZeRO stage) to every other: 16 x 16 pairs in fp32, 12 x 12 in bf16; the counts for RELIABILITY.md.

Each source is trained once, and each target goes on with all of them in one set of processes, stage 3 last. The cases
(SGD, AdamW, with an average of the weights, with a frozen backbone, with layer-wise decay switched on) are spread over
the sources: VITDS_ELASTIC_CASES=all runs every pair with every case.
"""

import os
from pathlib import Path

import pytest
from counts import record
from elastic_runs import CASES, TOLERANCE, Place, assert_loads_bit_for_bit, go_on, train_source
from warm_ranks import WarmRanks

WORLD_SIZES = [int(size) for size in os.environ.get("VITDS_ELASTIC_RANKS", "1 2 3 4").split()]
STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}


def cases_of(source: Place) -> list[str]:
    """The cases that a source is trained for; all together meet every target."""
    if os.environ.get("VITDS_ELASTIC_CASES") == "all":
        return list(CASES)
    return [list(CASES)[(source.world_size + 2 * source.stage) % len(CASES)]]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("dtype", STAGES)
def test_every_world_size_and_stage_to_every_other(digits, tmp_path, dtype):
    """Right after each load every state equals the saved one bit for bit; then the losses of the next 20 steps."""
    places = [Place(world_size, stage) for world_size in WORLD_SIZES for stage in STAGES[dtype]]
    sources: dict[tuple[Place, str], Path] = {}
    for world_size in WORLD_SIZES:
        with WarmRanks(world_size) as ranks:
            for place in (place for place in places if place.world_size == world_size):
                for case in cases_of(place):
                    sources[place, case] = train_source(ranks, tmp_path, digits, place, case, dtype)
    failures = []
    how = f"{dtype}, {len(places)} x {len(places)} (ranks, stage), SGD, AdamW, average, frozen, layer decay switched on"
    for world_size in WORLD_SIZES:
        with WarmRanks(world_size) as ranks:
            for target in (place for place in places if place.world_size == world_size):
                for (source, case), run_dir in sources.items():
                    deviation = None
                    try:
                        assert_loads_bit_for_bit(ranks, tmp_path, digits, target, case, dtype, run_dir)
                        deviation = go_on(ranks, tmp_path, digits, target, case, dtype, run_dir)
                        assert deviation <= TOLERANCE[dtype], f"the losses differ by {deviation:.2g}"
                    except AssertionError as error:
                        failures.append(f"{case}: {source} to {target}: {error}"[:600])
                    kept = int(deviation is not None and deviation <= TOLERANCE[dtype])
                    record("goes on with another number of ranks or ZeRO stage", how, kept, 1, deviation=deviation)
    assert not failures, "\n".join(failures)
