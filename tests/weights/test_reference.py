"""Weights in Google's layout give Google's numbers."""

import numpy as np
import pytest
import torch
from weights.reference import gen_npz

import vitds

CASES = sorted(path.stem for path in (gen_npz.HERE / "expected").glob("*.npz"))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_features_are_googles(case, tmp_path):
    variant, model_name, size = case.split("__")
    np.savez(tmp_path / "weights.npz", **gen_npz.weights(model_name, variant))
    model = vitds.create_model("auto", image_size=int(size), weights=tmp_path / "weights.npz").eval()
    images = torch.from_numpy(gen_npz.normalise(gen_npz.images(size))).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits, features = model(images).numpy(), model.features(images).numpy()

    expected = gen_npz.expected(case)
    tolerance = expected["meta"]["atol_fp32"]
    assert tolerance == (1e-4 if "hybrid" in case else 2e-5)
    assert logits.shape == (2, expected["meta"]["classes"])
    assert np.abs(logits[:, expected["logits_index"]] - expected["logits"]).max() <= tolerance
    assert np.abs(features - expected["feature"]).max() <= tolerance


def test_every_reference_case_is_here():
    assert len(CASES) == 6
