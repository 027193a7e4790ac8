"""MANIFEST.json: which files make up a checkpoint, their sizes and digests, and what the checkpoint is of.

It proves integrity, not origin. It is written last, so a directory without one was never committed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitds.durable import replace_text
from vitds.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size and the sha256 of its bytes."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of MANIFEST.json: `files` by name, and `info` (model, image size, classes, step, world size, ...)."""

    files: dict[str, FileEntry]
    info: dict[str, Any]


def hash_file(path: Path) -> FileEntry:
    """Read a file once and describe it."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(path.stat().st_size, digest)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write MANIFEST.json; it is on the disk when this returns."""
    body = {"format": 1, "files": {name: asdict(entry) for name, entry in sorted(manifest.files.items())}}
    replace_text(directory / MANIFEST_NAME, json.dumps(body | {"info": manifest.info}, indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read MANIFEST.json.

    Raises: CheckpointError when there is none or it cannot be understood.
    """
    path = directory / MANIFEST_NAME
    try:
        body = json.loads(path.read_text())
        files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
        return Manifest(files, dict(body["info"]))
    except FileNotFoundError:
        raise CheckpointError("no MANIFEST.json: this checkpoint was never committed", where=str(directory)) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"MANIFEST.json cannot be read: {error}", where=str(directory)) from None


def damage(directory: Path, manifest: Manifest, names: list[str] | None = None) -> list[str]:
    """Compare files with the manifest (all of them, or `names`): one line for each that is missing or differs."""
    found = []
    for name in names if names is not None else list(manifest.files):
        expected = manifest.files[name]
        path = directory / name
        try:
            size_bytes = path.stat().st_size
            if size_bytes != expected.size_bytes:
                found.append(f"{path}: {size_bytes} bytes, {expected.size_bytes} were committed")
            elif hash_file(path) != expected:
                found.append(f"{path}: content differs from what was committed (sha256)")
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
    return found
