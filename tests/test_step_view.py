import numpy as np
import pytest
import torch
from data_sets import pixel_source, write_pixels
from tiny_dataset import write_config

from vitds.preflight import plan_run
from vitds.step_view import names_of, seen_at, sheet_of_step

CLASSES = ["cat", "dog", "a name that is longer than any caption has room for", "fish", "bird", "horse"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    data = write_pixels(folder / "data")
    vitds = {"model": "custom:width=8,depth=1,heads=1,mlp=8,patch=3", "image_size": [12, 15]}
    config = write_config(folder / "run.json", train_batch_size=12, vitds=vitds)

    def plan(*flags):
        arguments = ["--deepspeed_config", config, "--data", data, "--num-steps", 9, *flags]
        return plan_run([*map(str, arguments)], {"WORLD_SIZE": "1", "RANK": "0"})

    return plan


@pytest.mark.parametrize("mean, std", [("0.5", "0.5"), ("[0.485,0.456,0.406]", "[0.229,0.224,0.225]")])
def test_what_the_model_sees_are_the_pixels_themselves(planned, mean, std):
    settings = ["data.train_crop=none", "data.flip=0", f"data.mean={mean}", f"data.std={std}"]
    plan = planned(*[text for setting in settings for text in ("--set", setting)])
    source = pixel_source(53, seed=1)
    seen = list(seen_at(plan, 5))
    assert len(seen) == 12
    for one in seen:
        row = int(one.key.removeprefix("image-"))
        expected = source.images[row].transpose(2, 0, 1)
        np.testing.assert_array_equal(one.image, expected)
        np.testing.assert_array_equal(one.original, expected)
        assert one.target == source.classes[source.labels[row]]


def test_mixed_images_carry_both_names_with_their_shares(planned):
    seen = [one.target.split(" / ") for one in seen_at(planned("--set", "data.mixup_alpha=1"), 1)]
    for own, other in zip(seen[::2], seen[1::2], strict=True):
        assert {name.split()[0] for name in own} == {name.split()[0] for name in other}
        assert len(own) == 1 or sum(float(name.split()[1]) for name in own) == pytest.approx(1, abs=0.011)
    assert max(map(len, seen)) == 2


@pytest.mark.parametrize(
    "target, words",
    [
        (torch.tensor(1), "dog"),
        (torch.tensor([0.7, 0.3, 0, 0, 0, 0]), "cat 0.70 / dog 0.30"),
        (torch.tensor([0.3, 0, 0.7, 0, 0, 0]), "a name that is longer than ... 0.70 / cat 0.30"),
        (torch.tensor([0.0, 1, 0, 0, 0, 0]), "dog"),
        (torch.tensor([0.0, 1, 0, 1, 0, 0]), "dog + fish"),
        (torch.tensor([1.0, 1, 0, 1, 1, 1]), "cat + dog + fish + bird and 1 more"),
        (torch.zeros(6), "no class"),
    ],
)
def test_a_target_in_words(target, words):
    assert names_of(target, CLASSES) == words


def test_a_sheet_holds_as_many_images_as_asked_or_there_are(planned):
    widths = [sheet_of_step(planned(), 2, num).width for num in (1, 3, 4)]
    assert widths == sorted(set(widths))
    assert sheet_of_step(planned(), 2, 12).size == sheet_of_step(planned(), 2, 99).size
