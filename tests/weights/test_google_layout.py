"""big_vision's layouts give big_vision's numbers, every bit finds its way back, and a damaged file does no harm."""

import io
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from rank_processes import ROOT
from weights.reference import gen_big_vision, gen_npz

import vitds
from vitds.errors import WeightError
from vitds.weights.convert import from_parameter
from vitds.weights.load import load_weights
from vitds.weights.open import open_weights
from vitds.weights_header import read_header

TOLERANCE = 2e-5
QUERY = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"


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


@pytest.mark.parametrize("name", gen_big_vision.CASES)
def test_what_a_file_is_of_is_read_off_its_shapes(name, files):
    case, header = gen_big_vision.CASES[name], read_header(files / f"{name}.npz")
    pooling = {"tok": "", "gap": ",pooling=gap", "map": ",pooling=map"}[case.pool]
    positions = ",positions=sincos2d" * case.sincos
    assert header.spec.name == f"custom:width=32,depth=2,heads=2,mlp=64,patch=8{pooling}{positions}"
    assert header.image_size == ((224, 224) if case.sincos else (gen_big_vision.NATIVE, gen_big_vision.NATIVE))
    assert (header.num_classes, header.pre_logits) == (case.num_classes, case.rep_size or None)
    assert any("sincos2d" in note for note in header.notes) == case.sincos
    assert any(f'outside of "{case.prefix}"' in note for note in header.notes) == bool(case.beside)


def test_bfloat16_is_widened_without_rounding(files):
    stored = gen_big_vision.arrays("gap")["params/embedding/kernel"]
    assert stored.dtype == "V2"
    found = load_weights(files / "gap.npz").state_dict["patch_embed.weight"].permute(2, 3, 1, 0)
    assert found.dtype == torch.float32
    assert found.contiguous().numpy().tobytes() == (stored.view("<u2").astype("<u4") << 16).tobytes()


def test_computed_positions_become_parameters_and_stay_exact_at_any_size(files):
    model = vitds.create_model("auto", image_size=(16, 40), weights=files / "tok-sincos.npz")
    assert model.pos_embed.shape == (1, 1 + 2 * 5, 32)
    assert torch.all(model.pos_embed[:, 0] == 0)  # the class token has none
    y, x = divmod(7, 5)
    omega = 10_000.0 ** -(np.arange(8) / 7)
    expected = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)])
    assert np.abs(model.pos_embed[0, 1 + 7].detach().numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("key", ["params/Transformer/encoderblock/LayerNorm_1/scale", "params/MAPHead_0/probe"])
def test_a_missing_array_is_named_as_the_file_would(key, tmp_path):
    arrays = gen_big_vision.arrays("map-scan")
    del arrays[key]
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(WeightError, match=f"missing {key}"):
        read_header(tmp_path / "w.npz")


def test_only_what_stands_outside_of_the_prefix_is_left_out(tmp_path):
    arrays = gen_big_vision.arrays("map-two-towers") | {"params/img/surplus": np.zeros(3, np.float32)}
    arrays["params/txt/counter"] = np.zeros(3, np.int64)  # no business of ours
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(WeightError) as caught:
        read_header(tmp_path / "w.npz")
    assert caught.value.fix == "extra params/img/surplus (3,)"


@pytest.mark.parametrize("model", ["tiny", "tiny-hybrid"])
@pytest.mark.parametrize("variant", ["imagenet21k", "imagenet21k+imagenet2012", "augreg-21k"])
def test_every_array_comes_back_with_every_bit(model, variant, tmp_path):
    original = gen_npz.weights(model, variant)
    original["head/kernel"][0, :3] = [np.nan, -0.0, np.float32(1e-42)]  # what arithmetic would not keep
    np.savez(tmp_path / "w.npz", **original)
    weights = open_weights(tmp_path / "w.npz")
    back = {
        entry.key: np.ascontiguousarray(from_parameter(weights.arrays[entry.name], entry))
        for entry in weights.header.arrays
    }
    assert back.keys() == original.keys()
    for key, array in original.items():
        assert (back[key].shape, back[key].dtype) == (array.shape, array.dtype)
        assert back[key].tobytes() == array.tobytes(), key


def save_with(path, key, member, **options):
    """A whole file, but for one member that is written as given."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in gen_npz.weights("tiny", "imagenet21k").items():
            if name != key:
                with archive.open(f"{name}.npy", "w") as stream:
                    np.lib.format.write_array(stream, array)
        archive.writestr(f"{key}.npy", member, **options)


def header_of(shape):
    """The header of a float32 .npy."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def truncate(path):
    np.savez(path, **gen_npz.weights("tiny", "imagenet21k"))
    with zipfile.ZipFile(path) as archive:
        end = archive.getinfo(f"{QUERY}.npy").header_offset + 2000
    path.write_bytes(path.read_bytes()[:end])


def flip_a_bit(path):
    np.savez(path, **gen_npz.weights("tiny", "imagenet21k"))
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo(f"{QUERY}.npy").header_offset + 2000
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def bomb_beside_its_shape(path):
    member = header_of((32, 2, 16)) + bytes(100_000_000)
    save_with(path, QUERY, member, compress_type=zipfile.ZIP_DEFLATED, compresslevel=1)


def bomb_of_many_classes(path):
    member = header_of((32, 800_000)) + bytes(4 * 32 * 800_000)
    save_with(path, "head/kernel", member, compress_type=zipfile.ZIP_DEFLATED, compresslevel=1)


def bomb_of_a_header(path):
    member = np.lib.format.magic(2, 0) + (90_000_000).to_bytes(4, "little") + bytes(90_000_000)
    save_with(path, QUERY, member, compress_type=zipfile.ZIP_DEFLATED, compresslevel=1)


def pickle_an_array(path):
    arrays = gen_npz.weights("tiny", "imagenet21k")
    np.savez(path, **arrays | {QUERY: np.array([{}] * 3, dtype=object)})


def transpose_an_array(path):
    arrays = gen_npz.weights("tiny", "imagenet21k")
    np.savez(path, **arrays | {QUERY: arrays[QUERY].T})


BAD = {
    truncate: [f"it ends in {QUERY} float32 (32, 2, 16)", "truncated"],
    flip_a_bit: [f"{QUERY}, expected float32 (32, 2, 16)", "CRC"],
    bomb_beside_its_shape: [QUERY, "float32 (32, 2, 16) takes 4,224 bytes, it claims 100,000,128"],
    bomb_of_many_classes: ["head/kernel float32 (32, 800000), 102,400,128 bytes", "nothing was unpacked"],
    bomb_of_a_header: [QUERY, "its header claims 90,000,000 bytes"],
    pickle_an_array: [f"{QUERY} holds pickled Python objects", "expected (32, 2, 16)"],
    transpose_an_array: [f"wrong shape {QUERY}: (16, 2, 32), expected (32, 2, 16)"],
}


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_file_is_refused_in_one_message_with_file_array_and_shape(spoil, tmp_path):
    path = tmp_path / "bad.npz"
    spoil(path)
    tracemalloc.start()
    with pytest.raises(WeightError) as caught:
        vitds.create_model("auto", weights=path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.exit_code == 4
    for part in (str(path), *BAD[spoil]):
        assert part in str(caught.value)
    assert peak_bytes < 20_000_000

    out = tmp_path / "out"
    command = [sys.executable, "tools/npz_to_ds.py", path, out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    said = " ".join(done.stderr.split())
    for part in ("bad.npz", *BAD[spoil]):
        assert part in said
    assert "Traceback" not in said
    assert not out.exists()


def test_a_file_of_another_model_is_refused_with_the_shapes_that_it_should_have(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **gen_npz.weights("tiny", "imagenet21k"))
    with pytest.raises(WeightError) as caught:
        vitds.create_model("ViT-B_16", weights=path)
    assert caught.value.exit_code == 4
    first_array = "embedding/kernel (8, 8, 3, 32), expected (16, 16, 3, 768)"
    for part in (str(path), "patch_size: 8, ViT-B_16 has 16", "width: 32, ViT-B_16 has 768", first_array):
        assert part in str(caught.value)


def test_a_list_of_members_that_swallows_some_is_no_list(tmp_path):
    """One wrong length in a zip's directory hides entries from Python's zipfile: here those of the head."""
    path = tmp_path / "w.npz"
    np.savez(path, **gen_npz.weights("tiny", "augreg-21k"))
    with zipfile.ZipFile(path) as archive:
        last_kept = archive.namelist().index("Transformer/encoder_norm/bias.npy")
        hidden = archive.infolist()[last_kept + 1 :]
    content = path.read_bytes()
    swallowed = sum(46 + len(member.filename) + len(member.extra) for member in hidden)
    entry = content.rindex(b"Transformer/encoder_norm/bias.npy") - 46
    content = content[: entry + 32] + swallowed.to_bytes(2, "little") + content[entry + 34 :]
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert "head/bias.npy" not in archive.namelist()
    with pytest.raises(WeightError, match="lists"):
        read_header(path)
