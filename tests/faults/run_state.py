"""What of a run must not depend on how often it was killed, and what a killed run must have left on the disk."""

import hashlib
import json
from pathlib import Path

from run_directory import metrics

from vitds.checkpoint import committed_checkpoints, step_of
from vitds.manifest import damage, read_manifest
from vitds.weights.zero import open_checkpoint, read_checkpoint


def fingerprint(run_dir: Path, step: int) -> dict[str, str]:
    """Digests of the loss log and of every state of every parameter at `step`: masters, moments, step counts."""
    directory = run_dir / "checkpoints" / f"global_step{step}"
    states = {"master": open_checkpoint(directory)}  # verifies all files
    saved = read_checkpoint(directory)
    states |= {state: saved.arrays(state) for state in saved.states}
    digests = {"metrics": hashlib.sha256(json.dumps(metrics(run_dir)).encode()).hexdigest()}
    for state, arrays in states.items():
        sha256 = hashlib.sha256()
        for name, array in sorted(arrays.items()):
            sha256.update(f"{name} {array.shape}".encode() + array.tobytes())
        digests[state] = sha256.hexdigest()
    return digests


def check_store(run_dir: Path) -> int:
    """After a kill: each committed checkpoint verifies, and `latest` names the newest or the one before it.

    Returns: the step of the newest, 0 when nothing was committed yet.
    """
    committed = committed_checkpoints(run_dir / "checkpoints")
    for directory in committed:
        assert not damage(directory, read_manifest(directory))
    pointer = run_dir / "checkpoints" / "latest"
    named = pointer.read_text() if pointer.exists() else None
    assert named in [directory.name for directory in committed] or (named is None and len(committed) <= 1)
    return step_of(committed[0]) if committed else 0
