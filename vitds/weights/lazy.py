"""Weights that are not in memory: each array is made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np


class LazyArrays(Mapping[str, np.ndarray]):
    """Arrays by name; each lookup makes its array anew, and nothing keeps it but the caller."""

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._makers = dict(makers)

    def replaced(self, name: str, maker: Callable[[], np.ndarray]) -> LazyArrays:
        """The same arrays, but for one."""
        return LazyArrays({**self._makers, name: maker})

    def __getitem__(self, name: str) -> np.ndarray:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
