"""Counts what happens between two log lines: images, seconds, and the seconds spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Throughput of one rank's loop since the last reading."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._start_s = time.monotonic()
        self._waited_s = 0.0
        self._paused_s = 0.0
        self._images = 0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as data wait."""
        start_s = time.monotonic()
        yield
        self._waited_s += time.monotonic() - start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside (evaluation, saving) out of the training throughput."""
        start_s = time.monotonic()
        yield
        self._paused_s += time.monotonic() - start_s

    def count(self, num_images: int) -> None:
        """Add trained images (of all ranks)."""
        self._images += num_images

    def read(self) -> dict[str, float]:
        """Images per second and the share of time spent waiting for data since the last reading."""
        elapsed_s = max(time.monotonic() - self._start_s - self._paused_s, 1e-9)
        reading = {"images_per_s": self._images / elapsed_s, "data_wait_frac": min(1.0, self._waited_s / elapsed_s)}
        self._restart()
        return reading
