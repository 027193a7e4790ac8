"""What people and programs see of a run: metrics.jsonl, train.log, the terminal, and trackers when asked for."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vitds.errors import CheckpointError

METRICS_NAME = "metrics.jsonl"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a disk may get its room, or its rights, back


class RunLog:
    """Writes one flushed JSON object a line; shows a progress display on a terminal, plain lines elsewhere.

    Only rank 0 writes; on other ranks every method does nothing. A run goes on without its terminal or train.log. Lines
    for which the disk has no room wait for it; a run that ends before they found it, or that cannot write metrics.jsonl
    for another reason, ends with an error.
    """

    def __init__(
        self, run_dir: Path, is_main: bool, num_steps: int, start_step: int, track: Sequence[str] = ()
    ) -> None:
        """Open the run's files; metrics.jsonl is cut back to its last whole line at or before `start_step`.

        Raises: CheckpointError when they cannot be written.
        """
        self._is_main = is_main
        self._num_steps = num_steps
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._trackers: list[Any] = []
        if not is_main:
            return
        with _writing(run_dir / METRICS_NAME):
            cut_back(run_dir / METRICS_NAME, start_step)
            self._metrics = open(run_dir / METRICS_NAME, "ab", buffering=0)
            self._unwritten = b""
        with _writing(run_dir / "train.log"):
            self._text = open(run_dir / "train.log", "a", buffering=1)
        self._console = _Terminal(file=sys.stdout, highlight=False)
        self._trackers = [_TRACKERS[name](run_dir, start_step) for name in track]
        if self._console.is_terminal and "CI" not in os.environ:
            self._progress = Progress(
                TextColumn("[bold]{task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=num_steps, completed=start_step, status="")

    def __enter__(self) -> RunLog:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if not self._is_main:
            return
        if self._progress:
            self._progress.stop()
        if error is not None:
            self._keep(f"{type(error).__name__}: {error}")
        for file in (*self._trackers, self._text):
            with suppress(OSError):  # what could not be written was said when it happened
                file.close()
        with self._metrics, _writing(Path(self._metrics.name)) if error is None else suppress(OSError):
            self._write_all()

    def say(self, text: str) -> None:
        """Print a line for people and keep it in train.log."""
        if self._is_main:
            self._keep(text)
            try:
                self._console.print(text, markup=False, soft_wrap=True)
            except OSError:  # the terminal is gone; the run is not about it
                self._console.quiet = True

    def say_from_any_rank(self, text: str) -> None:
        """As `say`, for what only one rank knows; other ranks than 0 print it alone."""
        if self._is_main:
            self.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def record(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and show it; a number that is not finite is written as null.

        Raises: CheckpointError when it cannot be written.
        """
        if not self._is_main:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        self._write(finite)
        for tracker in self._trackers:
            tracker.record(finite)
        text = describe(finite, self._num_steps)
        if self._progress is not None and self._task is not None and line["split"] == "train":
            self._keep(text)
            self._progress.update(self._task, completed=line["step"], status=text.split("  ", 1)[1])
        else:
            self.say(text)

    def go_back(self, step: int) -> None:
        """Cut metrics.jsonl back to `step`, as a resume from there does.

        Raises: CheckpointError when it cannot be written.
        """
        if not self._is_main:
            return
        path = Path(self._metrics.name)
        with _writing(path):
            self._write_all()
            self._metrics.close()
            cut_back(path, step)
            self._metrics = open(path, "ab", buffering=0)
        self.advance(step)

    def event(self, line: dict[str, Any], text: str) -> None:
        """Append what happened at line["step"] to metrics.jsonl, with the split "event", and say it.

        Raises: CheckpointError when it cannot be written.
        """
        if not self._is_main:
            return
        self._write({"split": "event"} | line)
        self.say(text)

    def flush(self) -> OSError | None:
        """Write the lines of metrics.jsonl that waited for room, and give the error when they still do.

        Raises: CheckpointError when it cannot be written for another reason.
        """
        if not self._is_main:
            return None
        with _writing(Path(self._metrics.name)):
            try:
                self._write_all()
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                return error
        return None

    def _write(self, line: dict[str, Any]) -> None:
        had_room = not self._unwritten
        self._unwritten += json.dumps(line).encode() + b"\n"
        if (error := self.flush()) and had_room:
            self.say(f"warning  {self._metrics.name}: {error.strerror}; its lines wait for room")

    def _write_all(self) -> None:
        """Write what is still to be written; what did go out is not written again."""
        while self._unwritten:
            self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]

    def _keep(self, text: str) -> None:
        """Add a line to train.log, if its disk lets us."""
        with suppress(OSError):
            self._text.write(text + "\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raises: CheckpointError in the name of a file of the run directory that cannot be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the run directory cannot be written: {error.strerror}",
            where=str(path),
            fix="the same command goes on from the last checkpoint",
        ) from error


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Fall silent when the reader is gone, as after `| head`; rich would end the process, and the run with it."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(line: dict[str, Any], num_steps: int) -> str:
    """One plain line for people."""
    if line["split"] == "segment":
        return f"step {line['step']}/{num_steps}  new segment: {line['num_steps_before']} -> {line['num_steps']} steps"
    if line["split"] == "val":
        kinds = {"": "", "ema_": "  average:  "} if "ema_loss" in line else {"": ""}
        shown = "".join(said + _describe_figures(line, prefix) for prefix, said in kinds.items())
        return f"step {line['step']}/{num_steps}  val  {shown}"
    parts = [f"step {line['step']}/{num_steps}", f"loss {_number(line['loss'], '.4f')}", f"lr {line['lr']:.3g}"]
    if line["loss_scale"] != 1.0:
        parts.append(f"scale {line['loss_scale']:g}")
    if line["skipped_steps"]:
        parts.append(f"skipped {line['skipped_steps']}")
    parts += [f"{line['images_per_s']:.4g} images/s", f"data-wait {line['data_wait_frac']:.0%}"]
    if line.get("mfu") is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    if "eta_s" in line:
        parts.append(f"ETA {line['eta_s']:.0f} s")
    return "  ".join(parts)


def _describe_figures(line: dict[str, Any], prefix: str) -> str:
    loss = f"loss {_number(line[f'{prefix}loss'], '.4f')}"
    if "map" in line:
        return f"{loss}  mAP {_number(line[f'{prefix}map'], '.2%')}"
    return f"{loss}  top-1 {line[f'{prefix}top1']:.2%}  top-5 {line[f'{prefix}top5']:.2%}"


def cut_back(path: Path, step: int) -> None:
    """Drop everything after the last whole line at or before `step`, so that a resumed file equals an unbroken one.

    A new segment at `step` begins after it, and is written again.
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines(keepends=True):
        try:
            line = json.loads(text)
            if not text.endswith("\n") or line["step"] + (line.get("split") == "segment") > step:
                break
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            break
        kept.append(text)
    temporary = path.with_suffix(".cut")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _number(value: float | None, style: str) -> str:
    return "not finite" if value is None else format(value, style)


class _TensorBoard:
    def __init__(self, run_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A killed run may have written steps after its checkpoint: they are hidden, for they come again.
        self._writer = SummaryWriter(str(run_dir / "tb"), purge_step=start_step + 1)

    def record(self, line: dict[str, Any]) -> None:
        for key, value in line.items():
            if isinstance(value, int | float) and key not in ("step", "split"):
                self._writer.add_scalar(f"{line['split']}/{key}", value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, start_step: int) -> None:
        import wandb

        id_file = run_dir / "wandb_id.txt"  # wandb's own choice, for a name may be another's in the same project
        known = id_file.read_text().strip() if id_file.exists() else None
        self._run = wandb.init(name=run_dir.name, dir=str(run_dir), resume="allow", id=known)
        id_file.write_text(f"{self._run.id}\n")

    def record(self, line: dict[str, Any]) -> None:
        values = {f"{line['split']}/{key}": value for key, value in line.items() if key not in ("step", "split")}
        self._run.log(values, step=line["step"])

    def close(self) -> None:
        self._run.finish()


_TRACKERS = {"tensorboard": _TensorBoard, "wandb": _Wandb}
