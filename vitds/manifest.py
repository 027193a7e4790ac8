"""MANIFEST.json: which files make up a checkpoint, their sizes and digests, and what the checkpoint is of.

It proves integrity, its own included, not origin. It is written last, so a directory without one was never committed.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitds.durable import replace_text
from vitds.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"
_SIZE_LIMIT = 2**26  # bytes; that of 21,843 classes has under a million
_OWN_DIGEST = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')  # of every byte before it; format 1 has none


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
    body = {"format": 2, "files": {name: asdict(entry) for name, entry in sorted(manifest.files.items())}}
    text = json.dumps(body | {"info": manifest.info}, indent=1).removesuffix("\n}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    replace_text(directory / MANIFEST_NAME, f'{text},\n "sha256": "{digest}"\n}}\n')


def read_manifest(directory: Path) -> Manifest:
    """Read MANIFEST.json.

    Raises: CheckpointError when there is none, it is damaged, or it cannot be understood.
    """
    path = directory / MANIFEST_NAME
    try:
        with open(path, "rb") as stream:
            text = stream.read(_SIZE_LIMIT + 1)
        if len(text) > _SIZE_LIMIT:
            raise ValueError(f"it is larger than {_SIZE_LIMIT:,} bytes")
        body, own = json.loads(text), _OWN_DIGEST.search(text)
        if own is None:
            is_whole = repr(body["format"]) == "1"  # and not true
        else:
            is_whole = hashlib.sha256(text[: own.start()]).hexdigest().encode() == own[1]
        if not is_whole:
            raise ValueError("its content differs from what was committed (sha256)")
        return Manifest({name: _entry(name, **entry) for name, entry in body["files"].items()}, dict(body["info"]))
    except FileNotFoundError:
        raise CheckpointError("no MANIFEST.json: this checkpoint was never committed", where=str(directory)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(f"MANIFEST.json cannot be read: {error}", where=str(directory)) from None


def _entry(name: str, size_bytes: int, sha256: str) -> FileEntry:
    """Raises: ValueError when it is not of a file beside the manifest."""
    if name != Path(name).name or name in ("", "..") or not name.isprintable():
        raise ValueError(f"{name!r} is no file of this directory")
    if type(size_bytes) is not int or type(sha256) is not str:
        raise ValueError(f"{name} has no size and sha256")
    return FileEntry(size_bytes, sha256)


def damage(directory: Path, manifest: Manifest, names: list[str] | None = None) -> list[str]:
    """Compare files with the manifest (all of them, or `names`): a line for each that is missing, differs, or is extra.

    Extra are files that DeepSpeed would take for a part of the checkpoint; others do no harm.
    """
    found = []
    for name in names if names is not None else list(manifest.files):
        expected = manifest.files[name]
        path = directory / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a device or a pipe has no end
                found.append(f"{path}: is no file")
            elif status.st_size != expected.size_bytes:
                found.append(f"{path}: {status.st_size} bytes, {expected.size_bytes} were committed")
            elif hash_file(path) != expected:
                found.append(f"{path}: content differs from what was committed (sha256)")
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
    extra = sorted(path for path in directory.glob("*_states.pt") if path.name not in manifest.files)
    return found + [f"{path}: was not committed" for path in extra]
