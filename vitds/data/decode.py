"""Encoded image bytes to pixels, and what an image file must be to enter a shard. No torch here: arrays only.

JPEG goes to the first decoder that is there: our own over libjpeg-turbo, which decodes no more than the window asked
for, else simplejpeg, else Pillow. What one declines (CMYK, damage) the next is asked for. What is not JPEG is Pillow's,
whose verdict is final. All three give the same pixels. Orientation tags are not applied, as in torchvision's
ImageFolder.

Damage outside of a window, where it is not a missing end, shows only when all is decoded: our own takes such a window
where the others refuse the image. Damage that libjpeg only warns about, and covers with grey or shifted blocks, is
an image like any other in training, as it is to Pillow; `as_image_file(verify=True)` refuses it. A checksum in the
index is what tells of bytes that changed.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from vitds.errors import UsageError, did_you_mean

MAX_PIXELS = 2**26  # 67 million; a few kilobytes of a crafted file can claim far more
MAX_SCANS = 100  # of a JPEG; encoders write about ten, and each costs as much as another image
_JPEG_START = b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)  # with something behind it, unlike a restart
_END, _SCAN, _FRAMES, _PROGRESSIVE = b"\xd9", b"\xda", b"\xc0\xc1\xc2\xc9\xca", b"\xc2\xca"
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_LOSSLESS_FORMATS = {"BMP", "GIF", "TIFF", "PPM"}
_MAX_JUNK_BYTES = 32  # behind a scan that is whole; two images of ImageNet have one
_HARMLESS = ("Warning: unknown JFIF revision", "Unknown Adobe color transform", "Invalid SOS parameters")
_SIGNED_OR_32_BITS = {"TIFF"}  # are integers where Pillow's mode is I; in PNG and PGM they are unsigned, of 16 bits
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


JPEG_DECODERS = ("native", "simplejpeg", "pillow")  # the fastest first


def _load(name: str, module: str) -> Any:
    """A decoder's module; None where it is missing, or before the one that $VITDS_JPEG names."""
    first = os.environ.get("VITDS_JPEG", "native")
    if first in JPEG_DECODERS[JPEG_DECODERS.index(name) + 1 :]:
        return None
    try:
        return import_module(module)
    except ImportError:
        return None


native_jpeg, simplejpeg = _load("native", "vitds.data.native_jpeg"), _load("simplejpeg", "simplejpeg")


def jpeg_decoder_name() -> str:
    """Which decoder JPEGs go to first: one of JPEG_DECODERS."""
    return "native" if native_jpeg else "simplejpeg" if simplejpeg else "pillow"


def jpeg_decoder() -> str:
    """Which decoder JPEGs go to first, for people to read, and how to get a faster one.

    Raises: UsageError when $VITDS_JPEG names none.
    """
    first = os.environ.get("VITDS_JPEG", "native")
    if first not in JPEG_DECODERS:
        raise UsageError(f'no JPEG decoder "{first}"', where="VITDS_JPEG", fix=did_you_mean(first, JPEG_DECODERS))
    if native_jpeg:
        return f"native ({native_jpeg.LIBRARY})"
    advice = "" if first != "native" else "; a faster one is built where libjpeg-dev and gcc are: pip install -e ."
    return f"simplejpeg {simplejpeg.__version__}{advice}" if simplejpeg else f"pillow {PIL.__version__}{advice}"


class BadImage(ValueError):
    """The bytes are no image that vitds can use; the text says why. Callers add whose bytes they are."""


class ImageFile(NamedTuple):
    """An image as it enters a shard: its bytes, the extension that names their format, its size in pixels, and the
    format that it came in.
    """

    data: bytes
    extension: str
    width: int
    height: int
    format: str


def _open(data: bytes) -> Image.Image:
    """Read an image's header with Pillow, within the pixel limit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about what the limit below refuses, and about odd metadata
            image = Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged bytes
        raise BadImage(f"no image: {type(error).__name__}" if data else "empty file") from None
    if image.format not in _EXTENSIONS.keys() | _LOSSLESS_FORMATS:  # Pillow would hand PostScript to Ghostscript
        raise BadImage(f"format {image.format} (mode {image.mode}) is not JPEG, PNG or WebP, nor lossless as PNG")
    _check_size(image.height, image.width)
    return image


def _check_size(height: int, width: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels, the limit is {MAX_PIXELS}")


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG of more scans than MAX_SCANS; of one with a single scan no more than the header is looked at."""
    num_scans, num_components, is_progressive = 0, b"", False
    found = _MARKER.search(data, 2)
    while found:
        at, marker = found.end(), found[1]
        if marker in _FRAMES:
            num_components, is_progressive = data[at + 7 : at + 8], marker in _PROGRESSIVE
        elif marker == _SCAN:
            num_scans += 1
            if num_scans > MAX_SCANS:
                raise BadImage(f"more than {MAX_SCANS} scans")
            if not is_progressive and data[at + 2 : at + 3] == num_components:
                return
        elif marker == _END:
            return
        found = _MARKER.search(data, at + int.from_bytes(data[at : at + 2]))


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG; None when it is none, or one that only Pillow may understand.

    Raises: BadImage when it has more than MAX_PIXELS or MAX_SCANS.
    """
    if not data.startswith(_JPEG_START):
        return None
    size = None
    if native_jpeg:
        size, has_one_scan = native_jpeg.header(data)
    else:
        has_one_scan = False
        with suppress(ValueError):
            size = simplejpeg.decode_jpeg_header(data)[:2] if simplejpeg else None
    if not has_one_scan:  # the usual case costs no second look
        _check_scans(data)
    if size:
        _check_size(*size)
    return size


class Decoded:
    """An image whose pixels are all there already, with the face of an opened one."""

    def __init__(self, pixels_CHW: np.ndarray) -> None:
        self.pixels_CHW = pixels_CHW
        self.height, self.width = pixels_CHW.shape[1:]

    def window(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """The pixels in a box (top, left, height, width).

        Shapes: -> (3, h, w) uint8.
        """
        top, left, height, width = box
        return self.pixels_CHW[:, top : top + height, left : left + width]


class _NativeJpeg:
    """A JPEG of which only windows are decoded."""

    def __init__(self, data: bytes, height: int, width: int) -> None:
        self.data, self.height, self.width = data, height, width

    def window(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """As `Decoded.window`. Raises: BadImage when the window, or the end of the file, is damaged."""
        pixels_HWC = np.empty((*box[2:], 3), np.uint8)
        if native_jpeg.read_window(self.data, box, pixels_HWC):
            return pixels_HWC.transpose(2, 0, 1)
        return Decoded(_decode_whole(self.data)).window(box)


def open_image(data: bytes) -> Decoded | _NativeJpeg:
    """An image to take windows of: RGB, where grey is repeated, alpha dropped, CMYK and palettes converted, 16 bits cut
    to 8.

    Raises: BadImage, here or from `window`, when the bytes are damaged, or have more than MAX_PIXELS or MAX_SCANS.
    """
    size = _jpeg_size(data) if native_jpeg else None
    return _NativeJpeg(data, *size) if size else Decoded(_decode_whole(data))


def decode(data: bytes) -> np.ndarray:
    """All of an image, as `open_image` says.

    Shapes: -> (3, H, W) uint8, a view of an (H, W, 3) array.
    Raises: BadImage when the bytes are damaged, or have more than MAX_PIXELS or MAX_SCANS.
    """
    image = open_image(data)
    return image.window((0, 0, image.height, image.width))


def _decode_whole(data: bytes) -> np.ndarray:
    if data.startswith(_JPEG_START):
        _check_scans(data)
    if simplejpeg and data.startswith(_JPEG_START):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(height, width)
            if colorspace != "CMYK":
                return simplejpeg.decode_jpeg(data, "RGB").transpose(2, 0, 1)
        except BadImage:
            raise
        except ValueError:
            pass  # simplejpeg is strict about warnings that Pillow knows to be harmless
    return as_rgb(_open(data))


def as_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a Pillow image, converted as `decode` says.

    Shapes: -> (3, H, W) uint8, a view of an (H, W, 3) array.
    Raises: BadImage when its file turns out to be damaged, or larger than MAX_PIXELS.
    """
    _check_size(image.height, image.width)
    if image.mode == "F":  # convert() would cut them off at 0 and 255, and of [0, 1] leave black
        raise BadImage("its pixels are floating-point numbers, of no known range")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
                image = Image.fromarray((_of_16_bits(image) >> 8).astype(np.uint8))
            return np.array(image.convert("RGB")).transpose(2, 0, 1)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"cannot be decoded: {error}") from None


def _of_16_bits(image: Image.Image) -> np.ndarray:
    """The grey values of a Pillow image whose mode begins with I, which integers of 32 bits and signed ones have, too.

    Raises: BadImage for those.
    """
    grey = np.asarray(image)
    if image.mode == "I" and (image.format in _SIGNED_OR_32_BITS or grey.min() < 0 or grey.max() >= 2**16):
        raise BadImage("its pixels are signed or 32-bit integers, of no known range")
    return grey


def encode_png(pixels: np.ndarray | Image.Image) -> bytes:
    """Encode pixels, (H, W, 3) or (H, W) uint8 or a Pillow image, as PNG: lossless and free of metadata."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def as_image_file(data: bytes, *, verify: bool = False) -> ImageFile:
    """Take JPEG, PNG and WebP byte for byte, by content and not by name, and turn BMP, GIF (its first frame), TIFF and
    PPM into PNG without loss. `verify` decodes every pixel, where otherwise only the header is read.

    Raises: BadImage for anything else; under `verify` also for what a decoder would only warn about.
    """
    file = _image_file(data)
    if verify:
        _check_whole(file.data)
    return file


def _image_file(data: bytes) -> ImageFile:
    if size := _jpeg_size(data):
        return ImageFile(data, "jpg", size[1], size[0], "JPEG")
    image = _open(data)
    extension = _EXTENSIONS.get(image.format or "")
    if extension is None:
        if image.format not in _LOSSLESS_FORMATS or image.mode not in _PNG_MODES:
            raise BadImage(f"format {image.format} (mode {image.mode}) is not JPEG, PNG or WebP, nor lossless as PNG")
        try:
            image.load()
            data, extension = encode_png(image), "png"
        except Exception as error:
            raise BadImage(f"cannot be decoded: {error}") from None
    format_name = "JPEG" if extension == "jpg" else str(image.format)
    return ImageFile(data, extension, image.width, image.height, format_name)


def _check_whole(data: bytes) -> None:
    """Decode every pixel of an image within the limits. Pillow, where it must do, has no ear for libjpeg's warnings.

    Raises: BadImage in the decoder's words.
    """
    words = None
    if not data.startswith(_JPEG_START) or not (native_jpeg or simplejpeg):
        decode(data)
    elif native_jpeg:
        words = native_jpeg.damage(data)
    else:
        try:
            colorspace = simplejpeg.decode_jpeg_header(data)[2]
            simplejpeg.decode_jpeg(data, "CMYK" if colorspace in ("CMYK", "YCCK") else "RGB")
        except ValueError as error:  # the first warning: one that is harmless hides others
            words = None if _is_harmless(str(error)) else str(error)
    if words:
        raise BadImage(words)


def _is_harmless(warning: str) -> bool:
    """As native_jpeg.c has it."""
    junk = re.search(r"(\d+) extraneous bytes before marker 0x(\w+)", warning)
    if junk:
        return int(junk[1]) <= _MAX_JUNK_BYTES and not 0xD0 <= int(junk[2], 16) <= 0xD7  # before restarts it is damage
    return warning.startswith(_HARMLESS)
