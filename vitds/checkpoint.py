"""State on disk: checkpoints that appear whole or not at all, and are verified before anything is loaded.

`checkpoints/{latest, best, global_stepN/}` stays DeepSpeed's layout: DeepSpeed loads it, zero_to_fp32.py reads it.
What makes it safe is the commit (write to a temporary directory, fsync, hash, agree, MANIFEST.json, rename, pointer)
and the choice of what to load: the newest checkpoint that verifies, on all ranks together. `latest` is for DeepSpeed's
own tools; nothing here trusts it.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitds import collectives
from vitds.durable import fsync, replace_text
from vitds.errors import CheckpointError
from vitds.manifest import MANIFEST_NAME, FileEntry, Manifest, damage, hash_file, read_manifest, write_manifest
from vitds.weights.ds_file import model_states
from vitds.weights.zero import read_file
from vitds.world import World

_TAG = re.compile(r"global_step(\d+)")
_RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_")


@dataclass
class Choice:
    """The checkpoint to go on from, None for a run that never committed one, and what was passed over."""

    directory: Path | None
    passed_over: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the user should know of the choice
    extended_from: int | None = None  # the length of the run until here, in steps, where --extend-to makes it longer

    @property
    def step(self) -> int:
        """The step to go on from."""
        return step_of(self.directory) if self.directory is not None else 0


class CheckpointStore:
    """The `checkpoints/` directory of one run."""

    def __init__(self, directory: Path, world: World, group: Any = None) -> None:
        """The ranks agree over `group`, where another thread than the training one saves."""
        self.directory = directory
        self.world = world
        self._group = group

    def committed(self) -> list[Path]:
        """Checkpoint directories by falling step, whole or not."""
        return committed_checkpoints(self.directory)

    def has_commit_on_record(self) -> bool:
        """True when this run committed a checkpoint at some time, whatever is left of it."""
        return (self.directory / "latest").exists() or bool(self.committed())

    def newest_whole(self) -> Choice:
        """The newest checkpoint that verifies; collective.

        Raises: CheckpointError when a commit is on record and nothing verifies.
        """
        passed_over: list[str] = []
        for directory in collectives.broadcast(self.committed(), self._group):
            found = self.verify(directory)
            if not found:
                return Choice(directory, passed_over)
            passed_over += found
        if collectives.broadcast(self.has_commit_on_record(), self._group):
            raise CheckpointError(
                "checkpoints were committed here, and none of them verifies",
                where=str(self.directory),
                fix="\n".join(
                    [*passed_over[:4], "nothing was changed; start anew under another --name, or --resume another run"]
                ),
            )
        return Choice(None)

    def verify(self, directory: Path) -> list[str]:
        """Compare a checkpoint with its manifest, its files shared out over the ranks; a line for each damage.

        A directory under the name of another step is damage too, and a file that only code could restore.
        """
        try:
            manifest = read_manifest(directory)
            names = sorted(manifest.files)[self.world.rank :: self.world.world_size]
            found = damage(directory, manifest, names)
            step = manifest.info.get("step")
            if isinstance(step, int) and step != step_of(directory):
                found.append(f"{directory}: is the checkpoint of step {step}")
            for name in names if not found else ():
                if name.endswith(".pt"):
                    read_file(directory / name)
        except CheckpointError as error:
            found = [f"{error.where}: {error.what}"]
        return list(dict.fromkeys(line for lines in collectives.gather(found, self._group) for line in lines))

    def save(
        self, write: Callable[[Path, str], None], step: int, info: dict[str, Any], needed_bytes: int | None = None
    ) -> Path:
        """Commit the checkpoint of `step`; `write(directory, tag)` writes DeepSpeed's files on every rank. Collective.

        `needed_bytes` is what this rank is about to write, for the message of a full disk.
        Raises: CheckpointError on every rank when any rank failed to write; what was committed before is untouched.
        """
        tag = f"global_step{step}"
        temporary = self.directory / f".writing-{tag}"
        failure = self._on_main(lambda: self._prepare(temporary))
        files: dict[str, FileEntry] = {}
        if failure is None:
            try:
                write(temporary, tag)
                files = _seal_files(temporary / tag, self.world)
            except (OSError, RuntimeError) as error:
                failure = f"rank {self.world.rank}: {error}"
        reports = collectives.gather((failure, files, needed_bytes), self._group)
        failures = [report[0] for report in reports if report[0]]
        if not failures:
            manifest = Manifest({name: entry for report in reports for name, entry in report[1].items()}, info)
            failure = self._on_main(lambda: self._publish(temporary, tag, manifest))
            failures = [failure] if failure else []
        if failures:
            self._on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            sizes = [report[2] for report in reports if report[2] is not None]
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written: {failures[0]}",
                where=str(self.directory),
                fix=self._room(sum(sizes)) + "; the checkpoints committed before are untouched",
            )
        return self.directory / tag

    def mark_best(self, step: int) -> None:
        """Point `best` at the checkpoint of `step`, if it is there; else, or on a full disk, it stays as it is."""
        tag = f"global_step{step}"
        self._on_main(lambda: replace_text(self.directory / "best", tag) if (self.directory / tag).is_dir() else None)

    def prune(self, step: int, keep_last: int, keep_every: int | None = None) -> None:
        """After the save of `step`, delete all but it, the `keep_last` - 1 before it, and those that are kept for good.

        These are the best one, and those whose step `keep_every` divides. Checkpoints of later steps are the damaged
        future that this run went back from.
        """
        self._on_main(lambda: self._delete_all_but(step, keep_last, keep_every))

    def _delete_all_but(self, step: int, keep_last: int, keep_every: int | None) -> None:
        reached = [directory for directory in self.committed() if step_of(directory) <= step]
        kept = {directory.name for directory in reached[:keep_last]} | {self._best()}
        if keep_every is not None:
            kept |= {directory.name for directory in reached if step_of(directory) % keep_every == 0}
        for directory in self.committed():
            if directory.name not in kept:
                shutil.rmtree(self._trash(directory), ignore_errors=True)

    def _best(self) -> str | None:
        """The directory that `best` names; None when it is damaged."""
        pointer = self.directory / "best"
        named = re.fullmatch(rb"global_step\d+\s*", pointer.read_bytes()) if pointer.is_file() else None
        return named[0].decode().strip() if named else None

    def _prepare(self, temporary: Path) -> None:
        """Clear what a killed save or deletion left, and make an empty directory to write to.

        What cannot be deleted (on NFS what another process still reads) is in nobody's way.
        """
        for left in [*self.directory.glob(".writing-*"), *self.directory.glob(".trash-*")]:
            shutil.rmtree(left, ignore_errors=True)
        if temporary.exists():
            self._trash(temporary)
        temporary.mkdir(parents=True)

    def _trash(self, directory: Path) -> Path:
        """Rename a directory, so that a kill in its deletion leaves nothing that looks like a checkpoint."""
        return directory.rename(self.directory / f".trash-{directory.name}-{secrets.token_hex(4)}")

    def _publish(self, temporary: Path, tag: str, manifest: Manifest) -> None:
        target = self.directory / tag
        write_manifest(temporary / tag, manifest)
        damaged = None
        if target.exists():  # damaged: this run went back to an older checkpoint
            if self._best() == tag:  # which never names what is not there
                (self.directory / "best").unlink()
            damaged = self._trash(target)
        (temporary / tag).rename(target)
        for script in temporary.glob("*.py"):  # DeepSpeed's zero_to_fp32.py and zero_to_torch.py
            script.replace(self.directory / script.name)
        replace_text(self.directory / "latest", tag)
        # The checkpoint is committed; what is left of the old one is cleared at the next save if not now.
        shutil.rmtree(temporary, ignore_errors=True)
        if damaged is not None:
            shutil.rmtree(damaged, ignore_errors=True)

    def _on_main(self, action: Callable[[], None]) -> str | None:
        """Run a file-system action on rank 0 and tell every rank whether it failed."""
        failure = None
        if self.world.is_main:
            try:
                action()
            except OSError as error:
                failure = error.strerror or str(error)
        return collectives.broadcast(failure, self._group)

    def _room(self, needed_bytes: int) -> str:
        """How much room a save needs, as the last one had if that is not known, and how much there is."""
        if not needed_bytes:
            for directory in self.committed()[:1]:
                with suppress(CheckpointError):
                    needed_bytes = sum(entry.size_bytes for entry in read_manifest(directory).files.values())
        try:
            free = f"{shutil.disk_usage(self.directory).free:,} bytes are free there"
        except OSError as error:
            free = f"the free room cannot be told: {error.strerror}"
        return f"it needs about {needed_bytes:,} bytes, {free}" if needed_bytes else free


def committed_checkpoints(directory: Path) -> list[Path]:
    """The global_stepN directories below `directory` by falling step."""
    found = [path for path in directory.glob("global_step*") if path.is_dir() and _TAG.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(directory: Path) -> int:
    """The step in the name of a global_stepN directory."""
    match = _TAG.fullmatch(directory.name)
    if match is None:
        raise CheckpointError("not a global_stepN directory", where=str(directory))
    return int(match[1])


def save_weights(directory: Path, state_dict: dict[str, Tensor], info: dict[str, Any]) -> Path:
    """Write weights alone as a directory of a run's shape: latest, global_step0/ and its manifest."""

    def write(temporary: Path, tag: str) -> None:
        (temporary / tag).mkdir()
        torch.save(model_states(state_dict, info), temporary / tag / "mp_rank_00_model_states.pt")

    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot be created: {error.strerror}", where=str(directory)) from None
    return CheckpointStore(directory, World()).save(write, 0, info)


def _seal_files(directory: Path, world: World) -> dict[str, FileEntry]:
    """Fsync and hash the files that this rank wrote."""
    entries = {}
    for path in sorted(directory.iterdir()):
        match = _RANK_FILE.search(path.name)
        owner = int(match[1]) if match else 0
        if owner == world.rank and path.name != MANIFEST_NAME:
            fsync(path)
            entries[path.name] = hash_file(path)
    return entries
