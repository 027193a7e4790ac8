import numpy as np
import pytest
from PIL import Image

from vitds.contact_sheet import beside, contact_sheet

WHITE = (255, 255, 255)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8))


def find(sheet, image):
    """Where an image lies on a sheet, to the pixel."""
    pixels, sought = np.asarray(sheet), np.asarray(image)
    corners = np.argwhere((pixels == sought[0, 0]).all(2)).tolist()
    return next((top, left) for top, left in corners if is_at(pixels, sought, top, left))


def is_at(pixels, sought, top, left):
    there = pixels[top : top + sought.shape[0], left : left + sought.shape[1]]
    return there.shape == sought.shape and (there == sought).all()


@pytest.mark.parametrize("num, columns, rows", [(1, 4, 1), (3, 4, 1), (4, 2, 2), (9, 4, 3)])
def test_every_image_is_on_the_sheet_in_order_and_over_ink(num, columns, rows):
    images = [picture(90, 60, seed) for seed in range(num)]
    sheet = contact_sheet(images, [f"key-{seed}\ncat" for seed in range(num)], "a title", columns)
    corners = [find(sheet, image) for image in images]
    assert corners == sorted(corners) and len({top for top, _ in corners}) == rows
    for top, left in corners:
        under = np.asarray(sheet)[top + 60 : top + 60 + 4 + 2 * 18, left : left + 90]
        assert (under.min(axis=(1, 2)) < 128).sum() > 15  # two lines of text
    assert (np.asarray(sheet)[: corners[0][0]].min(axis=(1, 2)) < 128).any()  # the title


@pytest.mark.parametrize(
    "caption", ["k" * 300, "k\n" + "word " * 300, "k\n" + "w" * 300, "\n\n\n", "ключ\n猫 0.70 / 犬 0.30", ""]
)
def test_no_caption_leaves_its_tile(caption):
    images = [picture(120, 40, seed) for seed in range(3)]
    sheet = contact_sheet(images, ["left", caption, "right"])
    pixels, (top, left) = np.asarray(sheet), find(sheet, images[1])
    assert (pixels[top + 40 :, left - 6 : left] == 255).all() and (
        pixels[top + 40 :, left + 120 + 1 : left + 130] == 255
    ).all()
    assert (pixels[-6:] == 255).all() and sheet.height < 40 + 4 * 20 + 40


def test_pictures_lie_beside_each_other_small_ones_in_whole_pixels_and_none_distorted():
    small, wide = picture(8, 8), picture(400, 200)
    row = beside([small, wide], side=100)
    assert row.size == (204, 100)
    blown_up = np.asarray(small).repeat(12, 0).repeat(12, 1)  # 12 x 8 = 96 of 100
    assert is_at(np.asarray(row), blown_up, 2, 2)
    right = np.asarray(row)[:, 104:]
    assert (right[:25] == 255).all() and (right[75:] == 255).all() and (right[25:75].min(axis=2) < 255).all()
    assert beside([picture(1, 3000)], side=50).size == (50, 50)
