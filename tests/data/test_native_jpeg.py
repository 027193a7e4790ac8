"""The native decoder: its windows are the whole decode's pixels, and nothing that is in a file makes it fail."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rank_processes import ROOT

from vitds.data import decode as decode_room

native_jpeg = pytest.importorskip("vitds.data.native_jpeg", reason="built only where libjpeg-turbo's headers are")
SUBSAMPLINGS = ("444", "422", "420", "440", "411", "gray")
SIZES = ((1, 1), (8, 8), (17, 33), (64, 48), (101, 75), (130, 9))


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Blots and noise, so that neighbouring pixels and chroma samples matter."""
    rng = np.random.default_rng(seed)
    blots = Image.fromarray(rng.integers(0, 256, (max(1, height // 6), max(1, width // 6), 3), dtype=np.uint8))
    pixels = np.asarray(blots.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, subsampling: str, **options) -> bytes:
    if subsampling in ("440", "411"):  # which Pillow cannot write
        encoder = pytest.importorskip("simplejpeg")
        return encoder.encode_jpeg(np.asarray(image), 85, "RGB", subsampling)
    stream = io.BytesIO()
    if subsampling == "gray":
        image.convert("L").save(stream, "JPEG", quality=85, **options)
    else:
        image.save(stream, "JPEG", quality=85, subsampling={"444": 0, "422": 1, "420": 2}[subsampling], **options)
    return stream.getvalue()


def window(data: bytes, box: tuple[int, int, int, int]) -> np.ndarray | None:
    """The window, with what lies beyond it in memory left alone; None when the decoder declines."""
    _, _, height, width = box
    memory = np.full(height * width * 3 + 64, 77, np.uint8)
    done = native_jpeg.read_window(data, box, memory[32:-32])
    assert (memory[:32] == 77).all() and (memory[-32:] == 77).all()
    return memory[32:-32].reshape(height, width, 3) if done else None


def windows(height: int, width: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """All of it, a pixel in each corner, a strip along each edge, and random ones down to a pixel."""
    boxes = [(0, 0, height, width), (0, 0, 1, 1), (0, width - 1, 1, 1), (height - 1, 0, 1, 1)]
    boxes += [(height - 1, width - 1, 1, 1), (0, 0, height, 1), (0, width - 1, height, 1), (0, 0, 1, width)]
    boxes += [(height - 1, 0, 1, width), (height // 2, width // 2, 1, 1)]
    for _ in range(60):
        box_h, box_w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        boxes.append((int(rng.integers(height - box_h + 1)), int(rng.integers(width - box_w + 1)), box_h, box_w))
    return boxes


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 3}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_a_window_has_the_pixels_of_a_whole_decode(subsampling, options):
    if options and subsampling in ("440", "411"):
        pytest.skip("no encoder here writes it")
    rng = np.random.default_rng(1)
    for height, width in SIZES:
        data = jpeg(photo(height, width), subsampling, **options)
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert native_jpeg.header(data) == ((height, width), "progressive" not in options)
        for top, left, box_h, box_w in windows(height, width, rng):
            pixels = window(data, (top, left, box_h, box_w))
            np.testing.assert_array_equal(pixels, whole[top : top + box_h, left : left + box_w])


def test_damage_below_a_window_is_seen_by_the_decoders_that_decode_all(monkeypatch):
    data = bytearray(jpeg(photo(256, 256), "420"))
    whole = decode_room.decode(bytes(data))
    at = len(data) * 7 // 8
    data[at : at + 2] = b"\xff\xc0"  # a marker where none may be
    box = (0, 0, 64, 256)
    np.testing.assert_array_equal(decode_room.open_image(bytes(data)).window(box), whole[:, :64])
    with pytest.raises(decode_room.BadImage):
        decode_room.decode(bytes(data))
    for missing in ("native_jpeg", "simplejpeg"):  # so simplejpeg is first, then Pillow
        monkeypatch.setattr(decode_room, missing, None)
        with pytest.raises(decode_room.BadImage):
            decode_room.open_image(bytes(data)).window(box)


def test_what_is_unusual_is_declined():
    stream = io.BytesIO()
    photo(20, 30).convert("CMYK").save(stream, "JPEG")
    data = jpeg(photo(64, 64), "420")
    for declined in (stream.getvalue(), b"", b"\xff", b"\xff\xd8\xff", b"hello", data[:100]):
        assert native_jpeg.header(declined) == (None, False) and window(declined, (0, 0, 1, 1)) is None
    assert window(data, (0, 0, 64, 65)) is None and window(data, (64, 0, 1, 1)) is None
    assert window(data[:-30], (0, 0, 1, 1)) is None  # cut off


@pytest.mark.parametrize("box", [(-1, 0, 1, 1), (0, 0, 0, 1), (0, 0, 2**40, 2**40), (0, 0, 2, 2)])
def test_memory_of_another_size_is_a_mistake(box):
    with pytest.raises(ValueError):
        native_jpeg.read_window(jpeg(photo(8, 8), "420"), box, np.empty(3, np.uint8))


FUZZ = """
import sys
import numpy as np
from vitds.data import decode as room
from vitds.data.decode import BadImage

def outcome(data, box=None):
    try:
        image = room.open_image(data)
        return image.window(box or (0, 0, image.height, image.width))
    except BadImage:
        return None

room.MAX_PIXELS = 2**16  # a flipped bit of the header may claim any size
rng, native = np.random.default_rng(int(sys.argv[1])), room.native_jpeg
originals = [open(path, "rb").read() for path in sys.argv[3:]]
num_good = 0
for _ in range(int(sys.argv[2])):
    data = bytearray(originals[rng.integers(len(originals))])
    for _ in range(rng.integers(1, 5)):
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    if rng.random() < 0.3:
        del data[rng.integers(len(data)) :]
    if rng.random() < 0.2:
        at = rng.integers(len(data) + 1)
        data[at:at] = rng.bytes(8)
    data = bytes(data)
    ours = outcome(data)
    room.native_jpeg = None
    theirs = outcome(data)
    room.native_jpeg = native
    assert (ours is None) == (theirs is None), "one decoder takes it, the other does not"
    if ours is None:
        outcome(data, (1, 2, 3, 4))  # damage elsewhere is not seen, but nothing breaks
        continue
    num_good += 1
    assert (ours == theirs).all()
    top, left = int(rng.integers(ours.shape[1])), int(rng.integers(ours.shape[2]))
    part = outcome(data, (top, left, ours.shape[1] - top, 1))
    assert (part == theirs[:, top:, left : left + 1]).all()
print(num_good)
"""


def fuzz(tmp_path, seed, count, num_originals):
    paths = []
    for number in range(num_originals):
        subsampling = SUBSAMPLINGS[number % 3]
        options = [{}, {"progressive": True}, {"restart_marker_blocks": 2}][number // 3 % 3]
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(jpeg(photo(40 + number, 56 - number, number), subsampling, **options))
    command = [sys.executable, "-c", FUZZ, str(seed), str(count), *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < int(done.stdout) < count


def test_damage_anywhere_ends_in_pixels_or_a_refusal_as_with_other_decoders(tmp_path):
    fuzz(tmp_path, seed=0, count=2000, num_originals=9)


@pytest.mark.slow
def test_more_damage(tmp_path):
    fuzz(tmp_path, seed=1, count=100_000, num_originals=9)
