"""The optional native decoder, built from native_jpeg.c where libjpeg-turbo's headers and a compiler are."""

import numpy as np

LIBRARY: str

def size(data: bytes) -> tuple[int, int] | None: ...
def read_window(data: bytes, box: tuple[int, int, int, int], pixels_HWC: np.ndarray) -> bool: ...
