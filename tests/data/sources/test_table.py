"""Tables of paths: CSV, TSV and Parquet that say the same give the same."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitds.data.decode import encode_png
from vitds.data.sources import open_source
from vitds.errors import DataError


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of images a.png ... e.png, and another beside it."""
    for name in ("in/a", "in/b", "in/c", "in/deep/d", "beside/e"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(np.full((3, 4), ord(name[-1]), np.uint8)))
    return tmp_path / "in"


def write(folder: Path, columns: dict[str, list], kind: str) -> Path:
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        texts = [["|".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in line]
                 for line in zip(*columns.values(), strict=True)]  # fmt: skip
        path.write_text("\ufeff" + "\n".join(mark.join(line) for line in [list(columns), *texts]) + "\n\n")
    return path


def opened(path: Path, classes: list[str] | None = None, split: str | None = None) -> dict:
    return open_source(str(path), split, path.parent, classes)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_names_are_numbered_in_sorted_order_and_splits_told_apart(images, kind):
    columns = {
        "path": ["a.png", "deep/d.png", "../beside/e.png", str(images / "b.png")],
        "label": ["dog", "cat", "dog", "cat"], "split": ["train", "Train", "val", "val"],
    }  # fmt: skip
    sources = opened(write(images, columns, kind))
    train, val = sources["train"], sources["val"]
    assert train.classes == val.classes == ["cat", "dog"]
    assert train.labels.tolist() == [1, 0] and val.labels.tolist() == [1, 0]
    assert train.keys == ["a", "deep/d"] and val.keys[0] == "beside/e" and val.keys[1].endswith("in/b")
    assert train.read(1) == (images / "deep/d.png").read_bytes()
    assert val.read(0) == (images.parent / "beside/e.png").read_bytes()
    assert train.sizes().tolist() == [len(train.read(row)) for row in range(2)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("labels", [[[2, 0], [], [1]], [["eel", "cat"], [], ["dog"]]], ids=["integers", "names"])
def test_several_labels_a_sample(images, kind, labels):
    source = opened(write(images, {"path": ["a.png", "b.png", "c.png"], "label": labels}, kind))["train"]
    assert source.labels == [(0, 2), (), (1,)] and not source.bad
    assert source.classes == (["0", "1", "2"] if labels[0][0] == 2 else ["cat", "dog", "eel"])


def test_columns_of_other_types_are_read_or_refused(images):
    path = images / "t.parquet"
    labels = pa.array([[0, 2], [1, 2]], pa.list_(pa.int64(), 2))
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "label": labels}), path)
    assert opened(path)["train"].labels == [(0, 2), (1, 2)]
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "label": [0, 1], "split": [0, 1]}), path)
    with pytest.raises(DataError, match='row 0: "0" is no split'):
        opened(path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_integers_are_positions_and_classes_may_be_given(images, kind):
    path = write(images, {"path": ["a.png", "b.png"], "label": [0, 3]}, kind)
    assert opened(path)["train"].classes == ["0", "1", "2", "3"]
    assert opened(path)["train"].labels.tolist() == [0, 3]
    assert opened(path, ["w", "x", "y", "z"])["train"].classes == ["w", "x", "y", "z"]
    assert opened(path, ["3", "0"])["train"].labels.tolist() == [1, 0]  # here they are names
    source = opened(path, ["w", "x"])["train"]
    assert source.keys == ["a"] and "b.png: label 3 is none of the 2 classes" in source.bad[0]


def test_a_table_is_the_split_that_its_name_or_the_flag_says(images):
    path = write(images, {"path": ["a.png"], "label": [0]}, "csv")
    assert list(opened(path)) == ["train"] and list(opened(path, split="val")) == ["val"]
    assert list(opened(path.rename(images / "my-val.csv"))) == ["val"]


def test_missing_files_unknown_classes_and_missing_labels_are_named(images):
    path = write(images, {"path": ["a.png", "gone.png", "b.png", "c.png"], "label": ["cat", "cat", "dgo", ""]}, "csv")
    source = opened(path, ["cat", "dog"])["train"]
    assert source.keys == ["a"]
    assert source.bad == [
        f"{path} line 3 gone.png: no such file",
        f'{path} line 4 b.png: label dgo is none of the 2 classes (did you mean "dog"?)',
        f"{path} line 5 c.png: no label",
    ]


@pytest.mark.parametrize(
    "text, message, fix",
    [
        ("pth,label\na.png,0\n", 'no column "path" among pth, label', 'rename "pth" to "path"'),
        ("path,kind\na.png,0\n", 'no column "label"', "expected path, label"),
        ("path,label,split\na.png,0,trian\n", 'line 2: "trian" is no split', 'did you mean "train"?'),
        ("path,label\na.png\n", "line 2 has 1 cells, the first line 2", ""),
        ("path,label\na.png,0\nb.png,1O\n", 'labels are names and integers: "1O" in line 3', "--classes"),
        ('path,label\n"a.png,0\n', "cannot be read", ""),
        ("", 'no column "path"', ""),
    ],
)
def test_mistakes_in_a_table_are_named(images, text, message, fix):
    (images / "t.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        opened(images / "t.csv")
    assert message in str(caught.value) and fix in caught.value.fix and str(images / "t.csv") in str(caught.value)


def test_a_table_of_names_like_2_0_is_one_of_integers(images):
    source = opened(write(images, {"path": ["a.png", "b.png"], "label": [2.0, 1.0]}, "csv"))["train"]
    assert source.labels.tolist() == [2, 1]


def test_test_is_validation_where_there_is_no_other_and_the_rest_is_said(images):
    columns = {"path": ["a.png", "b.png", "c.png"], "label": [0, 0, 0], "split": ["train", "test", "val"]}
    sources = opened(write(images, columns, "csv"))
    assert sources["val"].keys == ["c"] and any("not used: the rows of test" in note for note in sources["train"].notes)
