"""Images inside tar files, read where they lie: nothing is ever extracted."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from vitds.data.decode import BadImage
from vitds.data.sources.base import Source

_MAX_OPEN = 256  # of the 1024 descriptors that a process usually has


@dataclass(kw_only=True)
class TarSource(Source):
    """Images at known places of tar files.

    Shapes: tar, offset and size (N,); `tar` counts `tars`.
    Units:  bytes.
    """

    tars: list[str]
    tar: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    _descriptors: dict[int, int] = field(default_factory=dict, repr=False)

    def read(self, row: int) -> bytes:
        """The image's bytes."""
        size = self.size.item(row)
        data = os.pread(self._descriptor(self.tar.item(row)), size, self.offset.item(row))
        if len(data) != size:
            raise BadImage("the tar ends inside it")
        return data

    def sizes(self) -> np.ndarray:
        """The members' sizes."""
        return self.size

    def files(self) -> list[str]:
        """The tars."""
        return self.tars

    def where(self, row: int) -> str:
        """The tar and the key."""
        return f"{self.tars[self.tar[row]]} {self.keys[row]}"

    def _descriptor(self, tar: int) -> int:
        descriptor = self._descriptors.get(tar)
        if descriptor is None:
            if len(self._descriptors) >= _MAX_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = self._descriptors[tar] = os.open(self.tars[tar], os.O_RDONLY)
        return descriptor

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_descriptors": {}}
