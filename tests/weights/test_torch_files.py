"""Damaged and hostile .safetensors and PyTorch files: named, refused with exit code 4, and never run."""

import argparse
import collections
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import timm
import torch
from rank_processes import ROOT
from safetensors.torch import save_file
from torch import _weights_only_unpickler

from vitds import create_model
from vitds.errors import WeightError
from vitds.layouts import torch_pickle
from vitds.weights.load import load_weights
from vitds.weights_header import read_header

CLS = "cls_token"


@pytest.fixture(scope="module")
def state():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=64, num_heads=1, img_size=32, num_classes=3)
    return model.state_dict()


def refused(path, *words):
    """Both the header and the whole road refuse; the message names the file and holds the words."""
    for read in (read_header, load_weights, lambda path: create_model("auto", weights=path)):
        with pytest.raises(WeightError) as caught:
            read(path)
        assert caught.value.exit_code == 4
        message = str(caught.value)
        assert str(path) in message
        for word in words:
            assert word in message, message


def write_safetensors(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def safe(state, tmp_path):
    """A path, and the header and data of a whole file."""
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return path, json.loads(content[8 : 8 + length]), content[8 + length :]


def test_what_a_safetensors_header_may_lie_about(safe):
    path, header, data = safe
    start, stop = header[CLS]["data_offsets"]

    def lie(**changes):
        write_safetensors(path, header | {CLS: header[CLS] | changes}, data)

    lie(data_offsets=[start, stop + 4])
    refused(path, CLS, "expected 256 bytes", "claims 260")
    lie(data_offsets=[start + 4, stop + 4])
    refused(path, "claims bytes", "expected its start at")
    lie(data_offsets=[len(data), len(data) + 256])
    refused(path, "claims bytes", "expected its start at")
    lie(data_offsets=[-256, 0])
    refused(path, CLS, "at bytes -256 to 0")
    lie(dtype="F64")
    refused(path, f"{CLS} is float64 (1, 1, 64), expected 512 bytes")
    lie(dtype="F99")
    refused(path, f'{CLS} has the unknown type "F99"')
    lie(shape=[1, 1, 2**70])
    refused(path, CLS, "expected")
    lie(shape=[1, 1, "64"])
    refused(path, CLS)
    lie(shape=[1, 64, 1])
    refused(path, f"wrong shape {CLS}: (1, 64, 1), expected (1, 1, 64)")
    lie(shape=[1, 1, 32], dtype="I64")
    refused(path, f"wrong shape {CLS}")
    whole = {key: value for key, value in header.items() if key != CLS}
    write_safetensors(path, whole, data)
    refused(path, "expected its start at")
    write_safetensors(path, {**header, CLS: {"dtype": "F32"}}, data)
    refused(path, "it lacks 'shape'")
    text = json.dumps(header).encode()
    write_safetensors(path, text[:-1] + b', "cls_token": ' + json.dumps(header[CLS]).encode() + b"}", data)
    refused(path, f'"{CLS}" appears twice')
    write_safetensors(path, b"{this is no JSON}", data)
    refused(path, "no safetensors header")
    write_safetensors(path, b'{"a":' * 100_000, data)
    refused(path, "no safetensors header")
    path.write_bytes(struct.pack("<Q", 2**62) + text + data)
    refused(path, f"claims {2**62} bytes")
    write_safetensors(path, header, data[:-100])
    refused(path, f"claim {len(data)} bytes of data, the file has {len(data) - 100}")
    last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    refused(path, f"the first beyond its end is {last}, float32 {tuple(header[last]['shape'])}")
    path.write_bytes(struct.pack("<Q", len(text)) + text[:50])
    refused(path, f"claims {len(text)} bytes")
    write_safetensors(path, header, data)
    assert read_header(path).num_classes == 3  # and the same file is read when nothing was changed


def test_an_array_of_integers_is_named(state, tmp_path):
    for write in (save_file, torch.save):
        write(state | {CLS: torch.zeros(1, 1, 64, dtype=torch.int64)}, tmp_path / "w")
        refused(tmp_path / "w", f"{CLS} is int64: float32, float16, bfloat16, float64 are read")


class Bomb:
    """Unpickling it would set a variable in the environment."""

    def __reduce__(self):
        return (os.system, ("touch exploded",))


def hostile_files(state, tmp_path):
    inside = {"model": state, "extra": Bomb()}
    torch.save(inside, tmp_path / "zip.pth")
    torch.save(inside, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(Bomb(), tmp_path / "bare.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Bomb()))
    return [tmp_path / f"{name}.pth" for name in ("zip", "legacy", "bare", "pickle")]


def test_a_file_that_needs_code_is_refused_and_nothing_runs(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *files, plain = hostile_files(state, tmp_path)
    for path in files:
        refused(
            path, "posix.system", "nothing was run", "torch.save(torch.load(FILE, weights_only=False)", "state_dict"
        )
    refused(plain, "a pickle that torch.save did not write")
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "mae.pth")
    refused(tmp_path / "mae.pth", "holds argparse.Namespace")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    refused(tmp_path / "module.pth", "torch.nn.modules.linear.Linear")
    assert not (tmp_path / "exploded").exists()


def test_the_header_is_stricter_than_torch_itself():
    assert set(_weights_only_unpickler._get_allowed_globals()) >= torch_pickle.ALLOWED_GLOBALS


def rewritten(path, out, change):
    """The zip of torch.save with one pickle changed."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as copy:
        for member in archive.namelist():
            content = archive.read(member)
            copy.writestr(member, change(content) if member.endswith("data.pkl") else content)


def test_damaged_pickles_are_refused(state, tmp_path):
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save(state, good)
    long_binput = b"\x80\x02}r\xff\xff\xff\xff."  # a memo index of 4 billion
    for change in (
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\x80\x02" + b"(" * 100,
        lambda content: content.replace(b"FloatStorage", b"DoubleStorage"),
        lambda content: content[:200] + bytes([content[200] ^ 0x55]) + content[201:],
    ):
        rewritten(good, bad, change)
        refused(bad)
    rewritten(good, bad, lambda content: long_binput)
    refused(bad, "holds no state dict")
    rewritten(good, bad, lambda content: content.replace(b"K@", b"KA"))  # sizes of 64 become 65
    refused(bad)

    content = good.read_bytes()
    bad.write_bytes(content[: len(content) // 2])
    refused(bad, "truncated")
    torch.save({"model": [1, 2], "epoch": 3}, bad)
    refused(bad, "holds no state dict", "model, epoch")
    endless: dict = {}
    endless |= {"model": endless, "state_dict": endless}
    torch.save(endless, bad)
    refused(bad, "holds no state dict")
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as copy:
        for member in archive.namelist():
            copy.writestr(member, archive.read(member))
    refused(bad, "is compressed")
    torch.jit.script(torch.nn.Linear(2, 2)).save(bad)
    refused(bad, "TorchScript")


def test_flipped_bits_in_the_data_are_found(state, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True).keys() == state.keys()  # torch itself does not see it
    with pytest.raises(WeightError, match="CRC"):
        load_weights(path)


def test_files_without_checksums_and_of_the_old_format_are_read(state, tmp_path):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "unchecked.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert any("without checksums" in note for note in read_header(tmp_path / "old.pth").notes)
    torch.save({"model_ema": state, "model": {}, "sched": collections.Counter([1])}, tmp_path / "nested.pth")
    for name in ("old", "unchecked", "nested"):
        loaded = load_weights(tmp_path / f"{name}.pth")
        assert np.array_equal(loaded.state_dict[CLS], state[CLS])
    assert '"model_ema" of the file is read; it also holds model' in read_header(tmp_path / "nested.pth").notes


@pytest.mark.parametrize(
    "beside, note",
    [
        (lambda state, other: {"model": state, "ema": other}, '"model" of the file is read; it also holds ema'),
        (
            lambda state, other: {"ema": {"shadow": other}, "state_dict": state},
            '"state_dict" of the file is read; it also',
        ),
        (
            lambda state, other: {"model": other, "model_ema": state},
            '"model_ema" of the file is read; it also holds model',
        ),
        (
            lambda state, other: {"state_dict": other, "state_dict_ema": state},
            '"state_dict_ema" of the file is read; it',
        ),
        (
            lambda state, other: {"model": {"module": state, "ema": other}},
            '"model.module" of the file is read; it also',
        ),
        (lambda state, other: state | {"ema": other}, "the tensors of the file itself are read; it also holds ema"),
    ],
)
def test_weights_and_their_average_are_told_apart_in_a_note(beside, note, state, tmp_path):
    torch.save(beside(state, {key: value + 1 for key, value in state.items()}), tmp_path / "w.pth")
    assert torch.equal(load_weights(tmp_path / "w.pth").state_dict[CLS], state[CLS])
    assert [line for line in read_header(tmp_path / "w.pth").notes if line.startswith(note)]
    torch.save({"model": state, "ema": {}, "ema_decay": 0.9, "schema": {"x": 1}}, tmp_path / "w.pth")
    assert not [line for line in read_header(tmp_path / "w.pth").notes if "also holds" in line]


@pytest.mark.parametrize(
    "beside",
    [
        lambda state: {"state_dict": state, "best_acc1": torch.tensor(0.5), "epoch": 3},
        lambda state: {"model": {"state_dict": state}, "step": torch.tensor(3)},
        lambda state: {"model_ema": {}, "model": state, "model_state_dict": {"step": 3}},
        lambda state: state | {"model": {"step": 3}},
    ],
)
def test_a_state_dict_is_found_beside_other_tensors(beside, state, tmp_path):
    torch.save(beside(state), tmp_path / "w.pth")
    loaded = load_weights(tmp_path / "w.pth").state_dict
    assert all(torch.equal(loaded[key], state[key]) for key in (CLS, "norm.weight"))


@pytest.mark.parametrize("is_torch", [True, False])
def test_a_zip_that_spans_disks_is_refused(is_torch, state, tmp_path):
    if is_torch:
        torch.save(state, tmp_path / "w")
    else:
        np.savez(tmp_path / "w.npz", a=np.zeros(3))
        (tmp_path / "w.npz").rename(tmp_path / "w")
    content = bytearray((tmp_path / "w").read_bytes())
    if (locator := content.rfind(b"PK\x06\x07")) < 0:  # numpy writes none for small files
        locator = content.rfind(b"PK\x05\x06")
        content[locator:locator] = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)
    content[locator + 16] = 3
    (tmp_path / "w").write_bytes(content)
    refused(tmp_path / "w", "span multiple disks")


def test_slices_and_shared_storage_are_read_as_they_are_seen(state, tmp_path):
    table = torch.randn(3, 2, 64, 64).transpose(2, 3)
    strange = state | {"blocks.0.attn.proj.weight": table[1, 1], CLS: table[0, 0, 5].view(1, 1, 64)}
    torch.save(strange, tmp_path / "w.pth")
    loaded = load_weights(tmp_path / "w.pth").state_dict
    for key in ("blocks.0.attn.proj.weight", CLS):
        assert torch.equal(loaded[key], strange[key])


@pytest.mark.parametrize(
    "wrapped",
    [
        ("", "_orig_mod."),
        ("_fsdp_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
        ("module._orig_mod.", ""),
    ],
)
def test_what_wrappers_add_to_names_is_taken_off(wrapped, state, tmp_path):
    whole, block = wrapped
    named = {whole + key.replace("blocks.0.", f"blocks.0.{block}"): value for key, value in state.items()}
    torch.save({"state_dict": named}, tmp_path / "w.pth")
    torch.save(state, tmp_path / "plain.pth")
    loaded, plain = (load_weights(tmp_path / name).state_dict for name in ("w.pth", "plain.pth"))
    assert loaded.keys() == plain.keys() and all(torch.equal(loaded[key], plain[key]) for key in plain)
    left_out = next(key for key in named if key.endswith("norm1.bias"))
    torch.save({key: value for key, value in named.items() if key != left_out}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "norm1.bias")


def test_several_models_and_another_one_are_named(state, tmp_path):
    both = {f"{side}.{key}": value for side in ("student", "momentum") for key, value in state.items()}
    torch.save(both, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", 'several ViTs, under "momentum.", "student."')
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "not a ViT in a layout that is known", "fc.weight")
    torch.save(state | {"norm.weight": torch.ones(65)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "wrong shape norm.weight: (65,), expected (64,)")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightError, match="not ViT-B_16"):
        read_header(tmp_path / "w.pth", "ViT-B_16")


def test_the_header_needs_no_torch_and_a_name_says_nothing(state, tmp_path):
    save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "a.safetensors")
    code = (
        "import sys, vitds.weights_header as w\n"
        "print([w.read_header(path).format for path in sys.argv[1:]], 'torch' in sys.modules)"
    )
    files = [tmp_path / "a.pth", tmp_path / "a.safetensors"]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['safetensors', 'torch'] False"
    from_pickle, from_safetensors = (load_weights(path).state_dict for path in reversed(files))
    assert all(torch.equal(from_pickle[key], value) for key, value in from_safetensors.items())


def test_npz_to_ds_takes_every_kind_and_refuses_in_one_message(state, tmp_path):
    torch.save({"state_dict": state}, tmp_path / "w.pth")

    def convert(*arguments):
        command = [sys.executable, "tools/npz_to_ds.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = convert(tmp_path / "w.pth", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "ImageNet's" in done.stdout  # what the user should know of the file
    assert read_header(tmp_path / "out").spec == read_header(tmp_path / "w.pth").spec
    torch.save({"model": state, "extra": Bomb()}, tmp_path / "w.pth")
    done = convert(tmp_path / "w.pth", tmp_path / "second")
    assert done.returncode == 4
    assert "posix.system" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "second").exists()
