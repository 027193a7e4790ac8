"""Encoded image bytes to pixels, and what an image file must be to enter a shard. No torch here: arrays only.

JPEG goes through libjpeg-turbo (simplejpeg); everything else, and every JPEG that simplejpeg declines (CMYK, warnings
in the stream), through Pillow, whose verdict is final. Orientation tags are not applied, as in torchvision's
ImageFolder.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 2**26  # 67 million; a few kilobytes of a crafted file can claim far more
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_LOSSLESS_FORMATS = {"BMP", "GIF", "TIFF", "PPM"}
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


class BadImage(ValueError):
    """The bytes are no image that vitds can use; the text says why. Callers add whose bytes they are."""


@dataclass(frozen=True)
class ImageFile:
    """An image as it enters a shard: its bytes, the extension that names their format, and its size in pixels."""

    data: bytes
    extension: str
    width: int
    height: int


def _open(data: bytes) -> Image.Image:
    """Read an image's header with Pillow, within the pixel limit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about what the limit below refuses, and about odd metadata
            image = Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged bytes
        raise BadImage(f"no image: {type(error).__name__}" if data else "empty file") from None
    _check_size(image.width, image.height)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels, the limit is {MAX_PIXELS}")


def _jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """Width, height and colorspace of a JPEG; None when it is none, or none that simplejpeg understands."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height)
    return width, height, colorspace


def decode(data: bytes) -> np.ndarray:
    """Decode an image to RGB: grey is repeated, alpha dropped, CMYK and palettes converted, 16 bits cut to 8.

    Shapes: -> (3, H, W) uint8, a view of an (H, W, 3) array.
    Raises: BadImage when the bytes are damaged or the image is larger than MAX_PIXELS.
    """
    header = _jpeg_header(data)
    if header and header[2] != "CMYK":
        try:
            return simplejpeg.decode_jpeg(data, "RGB").transpose(2, 0, 1)
        except ValueError:
            pass  # simplejpeg is strict about warnings that Pillow knows to be harmless
    return as_rgb(_open(data))


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


def open_image(data: bytes) -> Decoded:
    """An image to take a window of, the same pixels as `decode` gives there.

    Raises: BadImage, here or from `window`, when the bytes are damaged or the image is larger than MAX_PIXELS.
    """
    return Decoded(decode(data))


def as_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a Pillow image, converted as `decode` says.

    Shapes: -> (3, H, W) uint8, a view of an (H, W, 3) array.
    Raises: BadImage when its file turns out to be damaged, or larger than MAX_PIXELS.
    """
    _check_size(image.width, image.height)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(image.convert("RGB")).transpose(2, 0, 1)
    except Exception as error:
        raise BadImage(f"cannot be decoded: {error}") from None


def encode_png(pixels: np.ndarray | Image.Image) -> bytes:
    """Encode pixels, (H, W, 3) or (H, W) uint8 or a Pillow image, as PNG: lossless and free of metadata."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def as_image_file(data: bytes, *, verify: bool = False) -> ImageFile:
    """Take JPEG, PNG and WebP byte for byte, by content and not by name, and turn BMP, GIF (its first frame), TIFF and
    PPM into PNG without loss. `verify` decodes every pixel, where otherwise only the header is read.

    Raises: BadImage for anything else.
    """
    if verify:
        decode(data)
    header = _jpeg_header(data)
    if header:
        return ImageFile(data, "jpg", header[0], header[1])
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
    return ImageFile(data, extension, image.width, image.height)
