"""Saving a run while it goes on: the state is copied, and a thread writes and commits it."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from vitds.checkpoint import CheckpointStore
from vitds.engine import Engine
from vitds.errors import CheckpointError
from vitds.log import RunLog
from vitds.preflight import Plan
from vitds.resume import Progress, checkpoint_info
from vitds.run_directory import COMMITTED_NAME
from vitds.snapshot import Snapshot


class Saver:
    """Commits checkpoints of one run, one at a time; a context manager, whose end waits for the last one.

    The thread's collectives run over the store's own group, in the same order on all ranks; those of the training
    thread never meet them.
    """

    def __init__(self, plan: Plan, engine: Engine, store: CheckpointStore, log: RunLog, progress: Progress) -> None:
        self._plan, self._engine, self._store, self._log = plan, engine, store, log
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._pending: Future[bool] | None = None
        self._best_kept = self._best_next = progress.best
        self._has_warned = False

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)

    def save(self, progress: Progress) -> None:
        """Commit a checkpoint; collective. It returns when the state is copied, and the commit goes on behind it.

        A failed save is said, and training goes on with the checkpoints it has.
        """
        self.settle(progress)
        state = {"vitds": dataclasses.asdict(progress) | {"last_save_failed": False}}
        info = checkpoint_info(self._plan, self._engine, progress.step) | progress.place_in_data
        snapshot = self._engine.snapshot(state)
        is_copied = self._plan.run.save_in_background and snapshot.copy_to_host(self._plan.world.local_world_size)
        self._best_next = progress.best
        place = progress.step, progress.best_step, info, self._log.flush()
        self._pending = self._thread.submit(self._commit, snapshot, *place)
        if not is_copied:
            self._warn_of_memory()
            self.settle(progress)

    def settle(self, progress: Progress) -> None:
        """Wait for the save that is under way, and note what became of it, on all ranks alike.

        After a failure the best result is again the one that has a checkpoint.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        progress.last_save_failed = not pending.result()
        if progress.last_save_failed:
            progress.best = self._best_kept
        self._best_kept = progress.best if progress.last_save_failed else self._best_next

    def _commit(
        self, snapshot: Snapshot, step: int, best_step: int | None, info: dict[str, object], unlogged: OSError | None
    ) -> bool:
        """In the thread: whether the checkpoint was committed.

        None is while lines of metrics.jsonl up to it are `unlogged`: a kill would lose them.
        """

        def write(directory: Path, tag: str) -> None:
            if unlogged is not None:
                raise unlogged
            snapshot.write(directory, tag)

        try:
            self._store.save(write, step, info, snapshot.num_bytes)
        except CheckpointError as error:
            self._log.say(str(error))
            return False
        finally:
            snapshot.release()
        if self._plan.world.is_main:
            with suppress(OSError):  # it matters only to who deletes the checkpoints
                (self._plan.run_dir / COMMITTED_NAME).touch()
        self._tidy(step, best_step)
        return True

    def tidy(self, progress: Progress) -> None:
        """Do what follows a commit, again; collective."""
        self._tidy(progress.step, progress.best_step)

    def _tidy(self, step: int, best_step: int | None) -> None:
        if best_step is not None:
            self._store.mark_best(best_step)
        self._store.prune(step, self._plan.run.keep_last, self._plan.run.keep_every)

    def _warn_of_memory(self) -> None:
        if self._plan.run.save_in_background and not self._has_warned:
            self._log.say_from_any_rank("warning  no memory for a copy of the state: training waits for every save")
            self._has_warned = True
