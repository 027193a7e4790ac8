"""The arithmetic counts what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitds.flops import TRAINING_FACTOR, describe_mfu, forward_flops, mfu
from vitds.model.registry import MODELS, get_spec
from vitds.model.vit import VisionTransformer


@pytest.mark.parametrize(
    ("name", "image_size", "pre_logits"),
    [
        *((name, (224, 224), None) for name in MODELS),
        ("ViT-L_16", (384, 384), 1024),
        ("R-ViT-Ti_16", (96, 64), None),
        ("custom:width=64,depth=2,heads=4,mlp=96,patch=8,pooling=map,registers=3", (32, 64), None),
        ("custom:width=64,depth=2,heads=4,mlp=96,patch=8,pooling=gap", (32, 64), None),
    ],
)
def test_forward_flops_equal_the_counter(name, image_size, pre_logits):
    spec = get_spec(name)
    with torch.device("meta"):
        model = VisionTransformer(spec, image_size, 1000, pre_logits)
        images = torch.empty(1, 3, *image_size)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert forward_flops(spec, image_size, 1000, pre_logits) == counter.get_total_flops()


def test_what_training_leaves_out_is_not_counted():
    spec = get_spec("custom:width=64,depth=3,heads=4,mlp=96,patch=8,registers=3")
    with torch.device("meta"):
        model = VisionTransformer(spec, (32, 64), 10, drop_path=0.4, drop_path_subset=True, token_drop=0.25)
        images = torch.empty(10, 3, 32, 64)  # 0.2 and 0.4 of it are whole images
    with FlopCounterMode(display=False) as counter:
        model.train()(images)
    flops = forward_flops(spec, (32, 64), 10, None, token_drop=0.25, subset_drop_path=0.4)
    assert 10 * flops == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert forward_flops(spec, (32, 64), 10, subset_drop_path=0.1) == forward_flops(spec, (32, 64), 10)  # masks, below


def test_training_is_three_forwards_but_for_the_gradient_of_the_images():
    spec = get_spec("ViT-Ti_16")
    with torch.device("meta"):
        model = VisionTransformer(spec, (224, 224), 1000)
        images = torch.empty(2, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    patches = 2 * 14 * 14 * (16 * 16 * 3) * spec.width
    forward = forward_flops(spec, (224, 224), 1000)
    assert counter.get_total_flops() == 2 * (TRAINING_FACTOR * forward - patches)


@pytest.mark.parametrize(
    ("device", "said"), [("NVIDIA H200", "2 x 989 TFLOP/s, the dense 16-bit peak of NVIDIA H200"), ("CPU", "no peak")]
)
def test_the_log_states_the_denominator(device, said):
    line = describe_mfu(forward_flops(get_spec("ViT-B_16"), (224, 224), 1000), 2, device)
    assert said in line and "3 x 35.13 GFLOP an image" in line


def test_mfu_has_a_stated_denominator():
    flops = forward_flops(get_spec("ViT-L_16"), (224, 224), 1000)
    assert mfu(flops, 1500.0, 1, "NVIDIA H200") == pytest.approx(3 * flops * 1500 / 989e12)
    assert mfu(flops, 3000.0, 2, "NVIDIA H200") == mfu(flops, 1500.0, 1, "NVIDIA H200")
    assert mfu(flops, 1500.0, 1, "x86_64") is None
