import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_sets import pixel_source

from vitds.data.decode import encode_png
from vitds.data.sources import PixelSource
from vitds.data.verify import verify_dataset
from vitds.data.writer import WriteOptions, write_dataset


class Large(PixelSource):
    """Images of any size in bytes: what follows a PNG's end is kept."""

    sizes_bytes = (3 * 2**20, 100, 2**22 - 1536 - 512, 9 * 2**20 + 1, 512, 2**22 - 1024)

    def read(self, row: int) -> bytes:
        png = encode_png(self.images[row])
        return png + np.random.default_rng(row).bytes(max(0, self.sizes_bytes[row] - len(png)))


@pytest.mark.parametrize("directory", ["here", "/dev/shm"])
def test_images_of_any_size_around_the_buffer_s_are_written_whole(tmp_path, directory):
    if directory != "here":
        if not Path(directory).is_dir():
            pytest.skip("no file system in memory")
        tmp_path = Path(directory, f"vitds-{tmp_path.parent.name}-{tmp_path.name}")
    out = tmp_path / "out"
    source = Large(**vars(pixel_source(6)))
    try:
        write_dataset(out, {"val": source}, WriteOptions("large"))
        with tarfile.open(out / "val/large-val-000000.tar") as tar:
            images = {name: tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".png")}
        assert images == {f"image-{row}.png": source.read(row) for row in range(6)}
        assert verify_dataset(out, decode_images=False).findings == []
    finally:
        if directory != "here":
            for path in sorted(tmp_path.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            tmp_path.rmdir()
    assert io.BytesIO(images["image-0.png"]).read(4) == b"\x89PNG"
