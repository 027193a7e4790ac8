import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rank_processes import ROOT

from vitds.data import decode as decode_room
from vitds.data.decode import BadImage, as_image_file, decode

DECODER_MODULES = {"native": "native_jpeg", "simplejpeg": "simplejpeg"}


@pytest.fixture(autouse=True, params=decode_room.JPEG_DECODERS)
def decoder(request, monkeypatch):
    """The decoder that JPEGs go to first."""
    for name in decode_room.JPEG_DECODERS[: decode_room.JPEG_DECODERS.index(request.param)]:
        monkeypatch.setattr(decode_room, DECODER_MODULES[name], None)
    if request.param != "pillow" and getattr(decode_room, DECODER_MODULES[request.param]) is None:
        pytest.skip(f"{request.param} is not there")
    return request.param


def gradient(mode: str = "RGB", width: int = 40, height: int = 30) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 8, columns * 6, rows * 4 + columns * 3], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(data: bytes) -> np.ndarray:
    pixels = decode(data)
    assert pixels.dtype == np.uint8 and pixels.shape[0] == 3
    return pixels.transpose(1, 2, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpeg_is_what_pillow_makes_of_it(mode, options):
    data = encoded(gradient(mode), "JPEG", **options)
    np.testing.assert_array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_of_every_mode_becomes_rgb(mode):
    image = gradient(mode)
    np.testing.assert_array_equal(decoded(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_cut_to_eight_not_clipped():
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    pixels = decoded(encoded(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(pixels[..., 0], grey >> 8)


def test_integers_of_32_bits_are_refused_and_those_of_16_are_not():
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    pgm = b"P5 32 32 65535\n" + grey.astype(">u2").tobytes()
    assert Image.open(io.BytesIO(pgm)).mode == "I"
    for data in (pgm, encoded(Image.fromarray(grey), "TIFF")):
        np.testing.assert_array_equal(decoded(data)[..., 0], grey >> 8)
    np.testing.assert_array_equal(decode_room.as_rgb(Image.fromarray(grey.astype(np.int32)))[0], grey >> 8)
    for values in (grey >> 8, grey):
        data = encoded(Image.fromarray(values.astype(np.int32)), "TIFF")
        with pytest.raises(BadImage, match="its pixels are signed or 32-bit integers, of no known range"):
            decode(data)
        with pytest.raises(BadImage, match=r"format TIFF \(mode I\)"):
            as_image_file(data)
    signed = io.BytesIO()
    Image.fromarray(grey).save(signed, "TIFF", tiffinfo={339: 2})  # SampleFormat
    with pytest.raises(BadImage, match="signed or 32-bit integers"):
        decode(signed.getvalue())
    for odd in (-1, 2**16):
        with pytest.raises(BadImage, match="32-bit integers"):
            decode_room.as_rgb(Image.fromarray(np.full((2, 2), odd, np.int32)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_images_are_refused(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    for damaged in (data[: len(data) // 2], data[:20], b"", b"\xff\xd8\xff", b"hello"):
        with pytest.raises(BadImage):
            decode(damaged)


def test_harmless_warnings_in_a_jpeg_are_no_damage():
    data = encoded(gradient(), "JPEG")
    np.testing.assert_array_equal(decode(data + b"trailing"), decode(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_that_claims_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch, kind):
    monkeypatch.setattr(decode_room, "MAX_PIXELS", 40 * 30 - 1)
    with pytest.raises(BadImage, match="40x30 pixels, the limit is 1199"):
        decode(encoded(gradient(), kind))
    with pytest.raises(BadImage, match="40x30 pixels"):
        as_image_file(encoded(gradient(), kind))


def with_scans(data: bytes, num_scans: int) -> bytes:
    """A JPEG with its last scan repeated until it has that many."""
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * (num_scans - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded():
    grey, colour = encoded(gradient("L"), "JPEG", progressive=True), encoded(gradient(), "JPEG", subsampling=0)
    header = colour.rindex(b"\xff\xda")
    one_channel = colour[:header] + b"\xff\xda\0\x08\1\1\0\0?\0" + colour[header + 14 :]  # each scan a third of it
    assert decode(with_scans(grey, 100)).shape == (3, 30, 40)
    for bomb in (with_scans(grey, 101), with_scans(grey, 101)[:-2], with_scans(one_channel, 101)):
        for refuses in (decode, as_image_file):
            with pytest.raises(BadImage, match="more than 100 scans"):
                refuses(bomb)


def test_what_only_looks_like_scans_is_none():
    data = encoded(gradient(), "JPEG")
    mark = b"\xff\xda\0\x0c" * 300
    comment = b"\xff\xfe" + (len(mark) + 2).to_bytes(2, "big") + mark
    for kept in (data + mark, data[:2] + comment + data[2:]):
        np.testing.assert_array_equal(decode(kept), decode(data))


@pytest.mark.parametrize("kind, mode, extension", [
    ("JPEG", "RGB", "jpg"), ("JPEG", "CMYK", "jpg"), ("PNG", "P", "png"), ("WEBP", "RGB", "webp"),
])  # fmt: skip
def test_jpeg_png_and_webp_keep_their_bytes(kind, mode, extension):
    data = encoded(gradient(mode), kind)
    file = as_image_file(data)
    assert (file.data, file.extension, file.width, file.height) == (data, extension, 40, 30)


@pytest.mark.parametrize("kind, mode", [("BMP", "RGB"), ("GIF", "P"), ("TIFF", "RGB"), ("TIFF", "L"), ("PPM", "RGB")])
def test_other_lossless_formats_become_png_without_loss(kind, mode):
    data = encoded(gradient(mode), kind)
    file = as_image_file(data)
    assert file.extension == "png" and file.data.startswith(b"\x89PNG")
    np.testing.assert_array_equal(decoded(file.data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert as_image_file(data).data == file.data


def test_what_png_cannot_hold_is_refused_by_name():
    with pytest.raises(BadImage, match="TIFF"):
        as_image_file(encoded(gradient("CMYK"), "TIFF"))


def test_verify_finds_what_the_header_hides():
    data = encoded(gradient(), "JPEG")[:-30]
    assert as_image_file(data).width == 40
    with pytest.raises(BadImage):
        as_image_file(data, verify=True)


def photo_jpeg(**options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise).resize((256, 192), Image.Resampling.BILINEAR), "JPEG", quality=95, **options)


DAMAGE = {
    "cut by a third, and ended": lambda data: data[: len(data) * 2 // 3] + b"\xff\xd9",
    "4 KB of zeros": lambda data: data[:9000] + bytes(4096) + data[13096:],
    "a stretch doubled": lambda data: data[:9000] + data[8000:],
    "another frame's mark in its scan": lambda data: data[:9000] + b"\xff\xc4" + data[9002:],
}


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
@pytest.mark.parametrize("what", DAMAGE)
def test_verify_finds_what_decoders_only_warn_about(what, options, decoder):
    data = photo_jpeg(**options)
    assert len(data) > 16000 and as_image_file(data, verify=True).data == data
    damaged = DAMAGE[what](data)
    assert as_image_file(damaged).width == 256
    if decoder == "pillow":
        return  # has no ear for libjpeg's warnings
    with pytest.raises(BadImage, match=r"Corrupt JPEG data|Premature end|Bogus|DHT"):
        as_image_file(damaged, verify=True)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_verify_keeps_what_is_odd_but_whole(mode, progressive):
    data = encoded(gradient(mode), "JPEG", progressive=progressive)
    odd = [data[:-2] + b"\x7f" + data[-2:], data + b"trailing", data[:2] + b"\xff\xfe\0\3!" + data[2:]]
    if mode != "CMYK":
        assert data[6:11] == b"JFIF\0"
        odd.append(data[:11] + b"\3" + data[12:])  # a revision that nobody knows
    for kept in (data, *odd):
        assert as_image_file(kept, verify=True).data == kept


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_opened_image_knows_its_size_and_gives_any_window(kind):
    data = encoded(gradient(), kind)
    image = decode_room.open_image(data)
    assert (image.height, image.width) == (30, 40)
    np.testing.assert_array_equal(image.window((3, 5, 7, 11)), decode(data)[:, 3:10, 5:16])


def test_a_file_that_was_cut_off_is_refused_whatever_window_is_asked_for():
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    for end in range(len(data) - 20, 700, -97):
        with pytest.raises(BadImage):
            decode_room.open_image(data[:end]).window((0, 0, 1, 1))


def test_the_decoder_in_use_is_said(decoder):
    assert decode_room.jpeg_decoder().startswith(decoder)


@pytest.mark.parametrize("missing, expected", [
    (["vitds.data.native_jpeg"], "simplejpeg"), (["vitds.data.native_jpeg", "simplejpeg"], "pillow")
])  # fmt: skip
def test_decoders_that_are_missing_are_done_without(missing, expected):
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); import vitds.data.decode as d; "
    command = [sys.executable, "-c", code + "print(d.jpeg_decoder())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(expected) and "libjpeg-dev" in done.stdout


@pytest.mark.parametrize("name, code", [("pillow", 0), ("pilow", 2)])
def test_a_decoder_can_be_chosen_by_name(name, code):
    lines = "from vitds.errors import exit_with; from vitds.data.decode import jpeg_decoder; "
    command = [sys.executable, "-c", lines + "exit_with(lambda: print(jpeg_decoder()))"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"VITDS_JPEG": name}, capture_output=True, text=True)
    assert done.returncode == code and (done.stdout.startswith("pillow") or 'did you mean "pillow"' in done.stderr)
