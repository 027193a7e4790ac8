"""`:timm` after a model name makes Google's arrays compute what timm computes with them, and stays with the weights."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from rank_processes import ROOT
from timm.models.vision_transformer import checkpoint_filter_fn
from weights.reference import gen_npz

from vitds import create_model
from vitds.errors import WeightError
from vitds.weights_header import read_header

TINY = "custom:width=32,depth=2,heads=2,mlp=64,patch=8"


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Tiny, 10 classes at 48 px."""
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **gen_npz.weights("tiny", "imagenet21k+imagenet2012"))
    return path


def timm_model(npz, image_size):
    """timm with these arrays, resized as it resizes the weights of its hub."""
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 10}
    native, resized = (timm.create_model("vit_base_patch16_224", img_size=size, **sizes) for size in (48, image_size))
    native.load_pretrained(npz)
    resized.load_state_dict(checkpoint_filter_fn(native.state_dict(), resized))
    return resized.eval()


@pytest.mark.parametrize("image_size", [48, 32, (64, 40)])
def test_the_switch_gives_timms_logits(npz, image_size):
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    google, as_timm = (create_model(name, image_size, weights=npz).eval() for name in ("auto", "auto:timm"))
    with torch.no_grad():
        expected = timm_model(npz, image_size)(images)
        assert (as_timm(images) - expected).abs().max() < 1e-5
        assert (google(images) - expected).abs().max() > 1e-4, "Google's GELU and resizing should differ"


def test_the_switch_is_recorded_with_the_weights(npz, tmp_path):
    command = [sys.executable, "tools/npz_to_ds.py", npz, tmp_path / "w", "--model", TINY + ",gelu=erf,resize=bicubic"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Asked for by its architecture alone, the checkpoint keeps its conventions; another one is refused.
    for name in (None, "auto", TINY, TINY + ",gelu=erf"):
        assert read_header(tmp_path / "w", name).spec.name == TINY + ",gelu=erf,resize=bicubic"
    with pytest.raises(WeightError, match="gelu: erf"):
        read_header(tmp_path / "w", TINY + ",gelu=tanh")
    images = torch.randn(1, 3, 64, 64)
    first, second = (
        create_model(name, 64, weights=path) for name, path in ((TINY, tmp_path / "w"), ("auto:timm", npz))
    )
    assert torch.equal(first(images), second(images))
