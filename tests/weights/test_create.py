"""`create_model`: what is kept of the weights, what is new, and what is refused."""

import numpy as np
import pytest
import torch
from weights.reference import gen_npz

from vitds import create_model
from vitds.checkpoint import save_weights
from vitds.errors import ConfigError, WeightError
from vitds.weights.load import load_weights, resize_posembed

TINY = "custom:width=32,depth=2,heads=2,mlp=64,patch=8"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """61 classes, pre_logits of width 32, 32 px."""
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **gen_npz.weights("tiny", "imagenet21k"))
    return path


def test_without_weights_the_defaults_are_224_pixels_and_1000_classes():
    model = create_model("custom:width=32,depth=1,heads=2,mlp=64,patch=56")
    assert (model.image_size, model.num_classes, model.head.pre_logits) == ((224, 224), 1000, None)
    assert not model.head.weight.any()
    with pytest.raises(ConfigError, match="auto"):
        create_model("auto")
    with pytest.raises(ConfigError, match="num_classes is -1"):
        create_model("ViT-B_16", num_classes=-1)


def test_what_is_none_comes_from_the_weights(file):
    model = create_model(TINY, weights=file)
    assert (model.image_size, model.num_classes, model.head.pre_logits.out_features) == ((32, 32), 61, 32)
    by_shape = create_model("auto", weights=str(file))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_shape.parameters(), strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_conversion_moves_every_number_to_its_place(file):
    state, arrays = create_model("auto", weights=file).state_dict(), gen_npz.weights("tiny", "imagenet21k")
    block = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    query, key = arrays[f"{block}/query/kernel"], arrays[f"{block}/key/kernel"]  # (width, heads, head width)
    qkv = state["blocks.1.attn.qkv.weight"].numpy()
    assert np.array_equal(qkv[16 + 3], query[:, 1, 3])
    assert np.array_equal(qkv[32 + 5], key[:, 0, 5])
    assert np.array_equal(state["blocks.1.attn.proj.weight"].numpy()[7, 16 + 3], arrays[f"{block}/out/kernel"][1, 3, 7])
    assert np.array_equal(state["blocks.1.attn.qkv.bias"].numpy()[64:].reshape(2, 16), arrays[f"{block}/value/bias"])
    assert np.array_equal(state["patch_embed.weight"].numpy()[4, 2], arrays["embedding/kernel"][:, :, 2, 4])
    assert np.array_equal(state["head.weight"].numpy(), arrays["head/kernel"].T)
    assert sum(p.numel() for p in state.values()) == sum(array.size for array in arrays.values())


@pytest.mark.parametrize("choice", [{}, {"num_classes": 61}, {"image_size": 64}, {"pre_logits": 32}])
def test_the_head_stays_with_its_pre_logits(file, choice):
    model = create_model("auto", weights=file, **choice)
    assert model.head.pre_logits is not None
    assert model.head.weight.any()


@pytest.mark.parametrize("choice", [{"num_classes": 10}, {"reset_head": True}, {"num_classes": 61, "reset_head": True}])
def test_a_new_head_is_zero_and_takes_pre_logits_with_it(file, choice):
    model = create_model("auto", weights=file, **choice)
    assert model.head.pre_logits is None
    assert model.head.weight.shape == (choice.get("num_classes", 61), 32)
    assert not model.head.weight.any() and not model.head.bias.any()


def test_pre_logits_false_drops_that_layer_alone(file):
    model, kept = create_model("auto", weights=file, pre_logits=False), create_model("auto", weights=file)
    assert model.head.pre_logits is None
    assert torch.equal(model.head.weight, kept.head.weight)
    images = torch.zeros(1, 3, 32, 32)
    assert torch.equal(model(images), model.head(kept.features(images)))


def test_a_new_pre_logits_layer_comes_with_a_new_head_only(file):
    model = create_model("auto", weights=file, num_classes=5, pre_logits=16)
    assert model.head.pre_logits.weight.any() and not model.head.weight.any()
    with pytest.raises(WeightError, match="pre_logits of width 16"):
        create_model("auto", weights=file, pre_logits=16)


@pytest.mark.parametrize("weights", [True, False])
def test_sizes_that_are_none_are_refused(weights, file):
    path = file if weights else None
    for size in (0, "48", 48.0, (48, 48, 3), (48.0, 48), [], -8):
        with pytest.raises(ConfigError, match=r"image.size"):
            create_model(TINY, image_size=size, weights=path)
    for width in (True, 0, -1, "32"):
        with pytest.raises(ConfigError, match="the width of that layer"):
            create_model(TINY, num_classes=5, weights=path, pre_logits=width)
    assert create_model(TINY, image_size=np.array([48, 32]), weights=path).image_size == (48, 32)


def test_pre_logits_of_another_width_cannot_be_dropped_alone(tmp_path):
    arrays = gen_npz.weights("tiny", "imagenet21k")
    arrays |= {
        "pre_logits/kernel": arrays["pre_logits/kernel"][:, :16],
        "pre_logits/bias": arrays["pre_logits/bias"][:16],
    }
    np.savez(tmp_path / "w.npz", **arrays | {"head/kernel": arrays["head/kernel"][:16]})
    assert create_model("auto", weights=tmp_path / "w.npz").head.pre_logits.out_features == 16
    with pytest.raises(WeightError, match="16 pre_logits"):
        create_model("auto", weights=tmp_path / "w.npz", pre_logits=False)


def test_weights_that_do_not_fit_the_name_or_the_size_are_refused(file):
    with pytest.raises(WeightError, match="not ViT-B_32"):
        create_model("ViT-B_32", weights=file)
    with pytest.raises(ConfigError, match="not divisible"):
        create_model("auto", weights=file, image_size=36)
    with pytest.raises(WeightError, match="does not exist"):
        create_model("auto", weights=file.with_name("none.npz"))


def test_a_directory_gives_the_same_model_as_the_file(file, tmp_path):
    from_file = create_model("auto", weights=file, image_size=(64, 32))
    header = load_weights(file).header
    info = {"model": header.spec.name, "image_size": [64, 32], "num_classes": 61, "pre_logits": 32}
    save_weights(tmp_path / "w", from_file.state_dict(), info)
    for path in (tmp_path / "w", tmp_path / "w" / "global_step0"):
        model = create_model("auto", weights=path)
        assert model.image_size == (64, 32)
        assert all(torch.equal(tensor, from_file.state_dict()[name]) for name, tensor in model.state_dict().items())
    resized = create_model("auto", weights=tmp_path / "w", image_size=(32, 64))
    assert resized.pos_embed.shape == (1, 1 + 4 * 8, 32)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    arrays = gen_npz.weights("tiny", "imagenet21k")
    arrays["Transformer/encoder_norm/bias"][3] = np.nan
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(WeightError, match=r"w\.npz  norm\.bias holds a NaN"):
        create_model("auto", weights=tmp_path / "w.npz")


@pytest.mark.parametrize(("old", "new"), [((3, 3), (5, 4)), ((4, 4), (2, 2)), ((2, 2), (7, 7)), ((3, 5), (4, 4))])
def test_positions_are_resized_as_scipy_zooms(old, new):
    from scipy.ndimage import zoom

    positions = torch.randn(1, 1 + old[0] * old[1], 6, generator=torch.Generator().manual_seed(0))
    resized = resize_posembed(positions, new, from_grid_hw=old)
    assert torch.equal(resized[:, 0], positions[:, 0])
    factors = (new[0] / old[0], new[1] / old[1], 1)
    expected = zoom(positions[0, 1:].numpy().reshape(*old, 6), factors, order=1).reshape(-1, 6)
    assert np.abs(resized[0, 1:].numpy() - expected).max() < 2e-6


def test_the_same_grid_keeps_every_bit_and_no_square_needs_its_grid():
    positions = torch.randn(1, 10, 4)
    assert resize_posembed(positions, (3, 3)) is positions
    assert resize_posembed(positions[:, 1:], (6, 6), has_class_token=False).shape == (1, 36, 4)
    with pytest.raises(WeightError, match="no 3 x 3 grid"):
        resize_posembed(torch.randn(1, 12, 4), (4, 4))
