"""The manifest names every missing, truncated or altered file of a checkpoint."""

import hashlib
import json

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
    ],
)
def test_a_manifest_that_cannot_be_understood_is_an_error(tmp_path, body):
    (tmp_path / MANIFEST_NAME).write_text(body)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)
