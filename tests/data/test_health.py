import io
import json

import numpy as np
import pytest
from data_sets import files_of, pixel_source, with_images, write_pixels
from PIL import Image
from rich.console import Console

from vitds.data.health import health_report
from vitds.data.writer import WriteOptions, write_dataset


def shown(health: dict) -> str:
    console = Console(file=io.StringIO(), width=160, markup=False)
    console.print(health_report(health))
    return console.file.getvalue()


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Duplicates inside a class, across classes and across splits; an empty class; sizes of all kinds."""
    train, val = pixel_source(20, seed=1, side=40), pixel_source(6, seed=2, side=40)
    train.classes = val.classes = [*train.classes, "nobody"]
    train.images[5] = train.images[0]  # of the same class
    train.images[7] = train.images[1]  # of another class
    train.images[8] = train.images[1]
    val.images[3] = train.images[1]
    val.images[4] = val.images[0]
    out = tmp_path_factory.mktemp("odd") / "out"
    write_dataset(out, {"train": train, "val": val}, WriteOptions("odd", 4))
    return out


def test_duplicates_and_leaks_are_named(odd):
    health = json.loads((odd / "health.json").read_text())
    same = health["splits"]["train"]["duplicates"]
    assert (same["redundant"], same["groups"], same["groups_of_several_labels"]) == (3, 2, 1)
    assert {frozenset(keys) for keys in same["keys"]} == {
        frozenset({"image-0", "image-5"}),
        frozenset({"image-1", "image-7", "image-8"}),
    }
    assert set(same["keys"][0]) == {"image-1", "image-7", "image-8"}  # conflicting labels come first
    assert health["splits"]["val"]["duplicates"]["keys"] == [["image-0", "image-4"]]
    [[of_val, of_train]] = health["leakage"]["keys"]
    assert of_val == "image-3" and of_train in {"image-1", "image-7", "image-8"}
    text = shown(health)
    assert "1 validation images that are training images too" in text
    assert "3 images that repeat others (1 of 2 groups under different labels)" in text
    assert "1 classes without images: nobody" in text


def test_a_split_that_is_added_later_is_compared_with_the_one_that_is_there(tmp_path, odd):
    train, val = pixel_source(20, seed=1), pixel_source(6, seed=2)
    val.images[3] = train.images[1]
    write_dataset(tmp_path / "out", {"train": train}, WriteOptions("odd", 4))
    write_dataset(tmp_path / "out", {"val": val}, WriteOptions("odd", 4))
    write_dataset(tmp_path / "whole/out", {"train": train, "val": val}, WriteOptions("odd", 4))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole/out")
    assert json.loads((tmp_path / "out/health.json").read_text())["leakage"]["keys"] == [["image-3", "image-1"]]


def test_the_search_for_duplicates_can_be_switched_off(tmp_path, odd):
    out = write_pixels(tmp_path / "out", 20, 6, find_duplicates=False)
    health = json.loads((out / "health.json").read_text())
    assert health["leakage"] is None and health["splits"]["train"]["duplicates"] is None
    assert "not looked for" in shown(health)


def encoded(width: int, height: int, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


def test_sizes_formats_and_what_could_not_be_read(tmp_path):
    images = [
        encoded(40, 30, "JPEG"),
        encoded(50, 60, "PNG"),
        encoded(70, 80, "BMP"),
        encoded(5000, 4000, "PNG"),
        b"not an image",
        encoded(90, 100, "WEBP"),
    ]
    options = WriteOptions("kinds", skip_bad=True)
    summary = write_dataset(tmp_path / "out", {"train": with_images(pixel_source(6), images)}, options)
    part = summary.health["splits"]["train"]
    assert part["formats"] == {"BMP": 1, "JPEG": 1, "PNG": 2, "WEBP": 1}
    assert (part["width"]["min"], part["width"]["median"], part["width"]["max"]) == (40, 70, 5000)
    assert (part["height"]["min"], part["height"]["max"]) == (30, 4000)
    assert part["tiny"]["keys"] == ["image-0"] and part["huge"]["keys"] == ["image-3"]
    assert part["unreadable"] == ["image-4: no image: UnidentifiedImageError"]
    assert part["classes"]["counts"] == [2, 1, 1, 1, 0] and part["classes"]["empty"] == ["class-4"]
    text = shown(summary.health)
    assert "40 - 5,000, median 70" in text and "left out" in text and "image-3" in text
