"""The manifest names every missing, truncated or altered file of a checkpoint."""

import hashlib
import json
import os

import pytest

from vitds.errors import CheckpointError
from vitds.manifest import MANIFEST_NAME, FileEntry, Manifest, damage, hash_file, read_manifest, write_manifest

CONTENT = {"a.pt": b"first file", "b.pt": bytes(range(256)) * 40, "empty.pt": b""}


@pytest.fixture
def directory(tmp_path):
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    files = {name: hash_file(tmp_path / name) for name in CONTENT}
    write_manifest(tmp_path, Manifest(files, {"model": "ViT-B_16", "step": 7}))
    return tmp_path


def test_a_file_is_its_size_and_sha256(directory):
    for name, content in CONTENT.items():
        assert hash_file(directory / name) == FileEntry(len(content), hashlib.sha256(content).hexdigest())


def test_what_is_written_is_read_back(directory):
    manifest = read_manifest(directory)
    assert manifest.info == {"model": "ViT-B_16", "step": 7}
    assert set(manifest.files) == set(CONTENT)
    assert damage(directory, manifest) == []


def test_every_damage_is_named_once(directory):
    (directory / "a.pt").unlink()
    flipped = bytearray(CONTENT["b.pt"])
    flipped[5000] ^= 1
    (directory / "b.pt").write_bytes(flipped)
    (directory / "empty.pt").write_bytes(b"grown")
    found = damage(directory, read_manifest(directory))
    assert len(found) == 3
    assert "a.pt: No such file" in found[0]
    assert "b.pt: content differs" in found[1]
    assert "empty.pt: 5 bytes, 0 were committed" in found[2]


def test_a_truncated_file_is_named_with_both_sizes(directory):
    (directory / "b.pt").write_bytes(CONTENT["b.pt"][:-1])
    (line,) = damage(directory, read_manifest(directory))
    assert line == f"{directory / 'b.pt'}: 10239 bytes, 10240 were committed"


def test_only_the_files_asked_for_are_compared(directory):
    (directory / "a.pt").unlink()
    manifest = read_manifest(directory)
    assert damage(directory, manifest, ["b.pt", "empty.pt"]) == []
    assert len(damage(directory, manifest, ["a.pt"])) == 1


def test_a_directory_without_a_manifest_was_never_committed(tmp_path):
    with pytest.raises(CheckpointError, match="never committed"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        json.dumps({"files": {}}),
        json.dumps({"files": [], "info": {}}),
        json.dumps({"files": {"a.pt": {"size": 1}}, "info": {}}),
        json.dumps({"files": {}, "info": 5}),
        "[" * 100_000,
        " " * (2**26 + 1),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_an_error(tmp_path, body):
    (tmp_path / MANIFEST_NAME).write_text(body)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)


def test_a_flip_in_every_byte_and_every_cut_of_the_manifest_itself_is_seen(directory):
    path = directory / MANIFEST_NAME
    whole = path.read_bytes()
    flips = (whole[:at] + bytes([whole[at] ^ 1 << 3 * at % 8]) + whole[at + 1 :] for at in range(len(whole)))
    for content in [*flips, *(whole[:at] for at in range(len(whole)))]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_manifest(directory)
    path.write_bytes(whole)
    assert damage(directory, read_manifest(directory)) == []


def test_manifests_from_before_they_had_a_digest_are_read(directory):
    body = json.loads((directory / MANIFEST_NAME).read_text())
    del body["sha256"]
    (directory / MANIFEST_NAME).write_text(json.dumps(body | {"format": 1}, indent=1) + "\n")
    assert damage(directory, read_manifest(directory)) == []
    (directory / MANIFEST_NAME).write_text(json.dumps(body, indent=1) + "\n")
    with pytest.raises(CheckpointError, match="differs from what was committed"):
        read_manifest(directory)


@pytest.mark.parametrize("name", ["../a.pt", "/etc/passwd", "sub/a.pt", "..", ".", "", "a\0.pt", "\ud800.pt"])
def test_a_manifest_that_names_files_elsewhere_is_refused(directory, name):
    write_manifest(directory, Manifest({name: hash_file(directory / "a.pt")}, {}))
    with pytest.raises(CheckpointError, match="is no file of this directory"):
        read_manifest(directory)


def test_what_is_no_file_is_never_opened(directory):
    (directory / "a.pt").unlink()
    os.mkfifo(directory / "a.pt")
    (directory / "empty.pt").unlink()
    (directory / "empty.pt").symlink_to("/dev/zero")
    found = damage(directory, read_manifest(directory))
    assert [line.partition(": ")[2] for line in found] == ["is no file"] * 2


def test_a_file_that_deepspeed_would_load_and_nobody_committed_is_named(directory):
    (directory / "notes.txt").write_text("harmless")
    (directory / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"of another run")
    (line,) = damage(directory, read_manifest(directory))
    assert line.endswith("zero_pp_rank_1_mp_rank_00_optim_states.pt: was not committed")
