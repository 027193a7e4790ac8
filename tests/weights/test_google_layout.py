"""big_vision's layouts give big_vision's numbers, and a damaged file of Google's is named before it does harm."""

import numpy as np
import pytest
import torch
from weights.reference import gen_big_vision

import vitds

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("big_vision")
    for name in gen_big_vision.CASES:
        gen_big_vision.write(name, directory / f"{name}.npz")
    return directory


@pytest.mark.parametrize("size", gen_big_vision.SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", gen_big_vision.CASES)
def test_outputs_are_big_visions(name, size, files):
    model = vitds.create_model("auto", image_size=size, weights=files / f"{name}.npz").eval()
    images = torch.from_numpy(gen_big_vision.images(*size)).permute(0, 3, 1, 2)
    with torch.no_grad():
        tokens = model.tokens(images)[:, model.num_prefix_tokens :][:, [0, 1, -1], :8]
        found = {"tokens": tokens, "feature": model.features(images), "logits": model(images)}
    for part, expected in gen_big_vision.expected(name, *size).items():
        assert np.abs(found[part].numpy() - expected).max() <= TOLERANCE, part
