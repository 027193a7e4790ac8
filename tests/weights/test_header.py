"""What a weights file is of is read off its headers; whatever does not fit is named."""

import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from weights.reference import gen_npz

from vitds.errors import WeightError
from vitds.layouts.array import shape_for
from vitds.layouts.google import Dialect, google_layout, read_layout
from vitds.layouts.own import parameters
from vitds.model.registry import get_spec, named, pixels_per_token
from vitds.weights.npz import load_npz
from vitds.weights_header import read_header, resolve_checkpoint

TINY = "custom:width=32,depth=2,heads=2,mlp=64,patch=8"
HYBRID = "custom:width=32,depth=2,heads=2,mlp=64,patch=1,resnet=1x2x1,resnet_width=32"
QUERY = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"
POSITIONS = "Transformer/posembed_input/pos_embedding"


@pytest.fixture
def tiny():
    return gen_npz.weights("tiny", "imagenet21k")


def refusal(arrays, tmp_path, model=None):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(WeightError) as caught:
        read_header(path, model)
    assert caught.value.exit_code == 4
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "variant", "name", "size", "classes", "pre_logits"),
    [
        ("tiny", "imagenet21k", TINY, 32, 61, 32),
        ("tiny", "imagenet21k+imagenet2012", TINY, 48, 10, None),
        ("tiny", "augreg-21k", TINY, 32, 61, None),
        ("tiny-hybrid", "imagenet21k", HYBRID, 64, 61, 32),
        ("tiny-hybrid", "imagenet21k+imagenet2012", HYBRID, 96, 10, None),
    ],
)
def test_architecture_size_and_head_are_read_off_the_shapes(model, variant, name, size, classes, pre_logits, tmp_path):
    np.savez(tmp_path / "w.npz", **gen_npz.weights(model, variant))
    header = read_header(tmp_path / "w.npz")
    assert header.spec.name == name
    assert (header.image_size, header.num_classes, header.pre_logits) == ((size, size), classes, pre_logits)


@pytest.mark.parametrize("model", ["ViT-B_16", "ViT-L_32", "ViT-H_14", "R50-ViT-B_16", "R-ViT-Ti_16"])
def test_published_models_are_known_by_name(model):
    spec = get_spec(model)
    grid = 224 // pixels_per_token(spec)
    shapes = {array.key: array.shape for array in google_layout(spec, 1 + grid * grid, 21843, None)}
    found = read_layout(shapes)
    assert named(found.spec) == spec
    assert (found.image_size, found.num_classes, found.unknown) == ((224, 224), 21843, [])


def test_group_norm_vectors_may_be_flat(tmp_path):
    arrays = gen_npz.weights("tiny-hybrid", "imagenet21k")
    flat = {key: array.reshape(-1) if array.shape[:-1] == (1, 1, 1) else array for key, array in arrays.items()}
    assert any(flat[key].shape != arrays[key].shape for key in arrays)
    np.savez(tmp_path / "w.npz", **flat)
    assert read_header(tmp_path / "w.npz").spec.name == HYBRID


def test_the_header_needs_no_torch(tmp_path, tiny):
    np.savez(tmp_path / "w.npz", **tiny)
    code = "import sys, vitds.weights_header as w; w.read_header(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "w.npz"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("key", [QUERY, "cls", "embedding/kernel", POSITIONS, "head/bias", "pre_logits/kernel"])
def test_a_missing_array_is_named(key, tmp_path, tiny):
    del tiny[key]
    assert f"missing {key}" in refusal(tiny, tmp_path)


@pytest.mark.parametrize("key", [QUERY, "cls", "embedding/kernel", POSITIONS, "head/bias"])
def test_a_wrong_shape_is_named_with_both_shapes(key, tmp_path, tiny):
    right = tiny[key].shape
    tiny[key] = tiny[key][..., :-1]
    message = refusal(tiny, tmp_path)
    assert f"wrong shape {key}: {tiny[key].shape}, expected {right}" in message


def test_positions_that_are_no_square_are_named(tmp_path, tiny):
    tiny[POSITIONS] = tiny[POSITIONS][:, :12]
    assert f"wrong shape {POSITIONS}" in refusal(tiny, tmp_path)


def test_everything_wrong_is_named_at_once(tmp_path, tiny):
    del tiny["cls"]
    tiny["surplus/kernel"] = np.zeros(3, np.float32)
    tiny["head/kernel"] = tiny["head/kernel"].T
    tiny["head/bias"] = tiny["head/bias"].astype(np.float16)
    message = refusal(tiny, tmp_path)
    for line in ("missing cls", "extra surplus/kernel", "wrong shape head/kernel", "head/bias is float16"):
        assert line in message


def test_a_long_list_is_cut_short(tmp_path, tiny):
    message = refusal({key: array for key, array in tiny.items() if "encoderblock_0" not in key}, tmp_path)
    assert "and 8 more" in message
    assert len(message.splitlines()) <= 10


def test_a_file_of_something_else_is_refused(tmp_path):
    message = refusal({"conv1.weight": np.zeros((3, 3), np.float32)}, tmp_path)
    assert "missing embedding/kernel" in message


def test_a_file_of_another_model_says_which(tmp_path, tiny):
    message = refusal(tiny, tmp_path, model="ViT-B_16")
    assert TINY in message
    assert "patch_size: 8, ViT-B_16 has 16" in message
    assert "embedding/kernel (8, 8, 3, 32), expected (16, 16, 3, 768)" in message
    for model, line in [
        ("custom:width=32,depth=2,heads=4,mlp=64,patch=8", "query/kernel (32, 2, 16), expected (32, 4, 8)"),
        ("custom:width=32,depth=2,heads=2,mlp=48,patch=8", "Dense_0/kernel (32, 64), expected (32, 48)"),
        ("custom:width=32,depth=1,heads=2,mlp=64,patch=8", "encoderblock_1/LayerNorm_0/scale (32,): custom"),
        ("custom:width=32,depth=3,heads=2,mlp=64,patch=8", "no array for blocks.2.norm1.weight (32,) of custom"),
    ]:
        assert line in refusal(tiny, tmp_path, model)


@pytest.mark.parametrize("other", ["ViT-L_32", "R50-ViT-L_32", "ViT-B_32:pooling=map"])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_shape_expected_of_an_array_is_the_other_models_own(stacked, other):
    dialect = Dialect(linen=True, positions="pos_embedding", stacked=stacked)
    for mine in ("ViT-B_16:pooling=map", "R50-ViT-B_16"):
        theirs = {array.key: array.shape for array in google_layout(get_spec(other), 50, 7, 96, dialect)}
        shapes = parameters(get_spec(other), 50, 7, 96)
        for array in google_layout(get_spec(mine), 50, 7, 96, dialect):
            if array.key in theirs and array.name in shapes:
                expected = shape_for(array, shapes[array.name], get_spec(other).heads, get_spec(other).depth)
                assert expected == theirs[array.key]


class Bomb:
    def __reduce__(self):
        return (exec, ("import os; os.environ['VITDS_TEST_BOMB'] = 'went off'",))


def test_pickled_objects_are_refused_and_never_loaded(tmp_path, tiny, monkeypatch):
    monkeypatch.delenv("VITDS_TEST_BOMB", raising=False)
    tiny["head/bias"] = np.array([Bomb()] * 61, dtype=object)
    assert "head/bias holds pickled Python objects" in refusal(tiny, tmp_path)
    with pytest.raises(WeightError):
        dict(load_npz(tmp_path / "bad.npz"))
    assert "VITDS_TEST_BOMB" not in os.environ


def test_files_that_are_no_npz_are_refused(tmp_path, tiny):
    path = tmp_path / "w.npz"
    np.savez(path, **tiny)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(WeightError, match=r"no \.npz"):
            read_header(path)
    with pytest.raises(WeightError, match="does not exist"):
        read_header(tmp_path / "none.npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", b"not an array")
    with pytest.raises(WeightError, match=r"cls\.npy"):
        read_header(path)


def test_damaged_data_is_found_when_it_is_loaded(tmp_path, tiny):
    path = tmp_path / "w.npz"
    np.savez(path, **tiny)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightError, match="CRC"):
        dict(load_npz(path))


def test_directories_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(WeightError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("global_step5")
    with pytest.raises(WeightError, match="global_step5"):
        read_header(tmp_path)
