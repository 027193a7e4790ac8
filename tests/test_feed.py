import pytest
import torch
from data_sets import write_pixels
from tiny_dataset import write_config

from vitds.feed import global_batch, train_loader
from vitds.preflight import plan_run

MODEL = "custom:width=8,depth=1,heads=1,mlp=8,patch=4"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feed")
    data = write_pixels(folder / "data")
    config = write_config(folder / "run.json", train_batch_size=12, vitds={"model": MODEL, "image_size": 8})

    def plan(num_ranks, *flags):
        arguments = ["--deepspeed_config", config, "--data", data, "--num-steps", 9, "--workers", 0, *flags]
        return plan_run([*map(str, arguments)], {"WORLD_SIZE": str(num_ranks), "RANK": "0"})

    return plan


@pytest.mark.parametrize("step", [1, 6, 9])
def test_a_global_batch_is_what_the_run_sees_at_that_step_on_all_ranks(planned, step):
    flags = ("--set", "data.mixup_alpha=0.8", "--set", "data.cutmix_alpha=1", "--log-every", "1")
    run = list(train_loader(planned(1, *flags), "cpu", 0))[step - 1]
    for num_ranks in (1, 2, 3):
        parts = list(global_batch(planned(num_ranks, *flags, "--micro-batch-size", "2"), step))
        assert [part.index for part in parts] == list(range(6))
        for name in ("images", "targets", "ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(run, name))
        assert sum(part.pixel_hash for part in parts) % 2**64 == run.pixel_hash != 0


def test_only_what_is_asked_for_is_made(planned):
    batches = global_batch(planned(1, "--micro-batch-size", "2"), 4)
    assert next(batches).images.dtype == torch.float32
    batches.close()
