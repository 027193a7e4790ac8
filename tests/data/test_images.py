"""Files, folders and tars as one stream of images, in order, with what cannot be used in its place."""

import io
import tarfile

import pytest
from data_sets import pixel_source

from vitds.data.images import LooseImage, find_images
from vitds.data.writer import WriteOptions, write_dataset
from vitds.errors import DataError


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def found(*paths):
    return list(find_images(paths))


def names(items):
    return [item.name if isinstance(item, LooseImage) else str(item) for item in items]


def test_a_folder_is_read_in_order_by_suffix_and_a_file_whatever_its_name(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png", "sub/c.webp", "sub/.deep/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    write_tar(tmp_path / "sub/t.tar", {"k.png": b"in tar"})
    items = found(tmp_path, tmp_path / "notes.txt")
    assert names(items) == [f"{tmp_path}/{n}" for n in ("a.jpg", "b.PNG", "sub/c.webp", "sub/t.tar:k", "notes.txt")]
    assert [item.read() for item in items] == [b"a.jpg", b"b.PNG", b"sub/c.webp", b"in tar", b"notes.txt"]
    assert {item.label for item in items} == {None}


def test_a_folder_given_by_a_link_inside_it_is_read_once(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "again").symlink_to(tmp_path)
    assert names(found(tmp_path / "again")) == [f"{tmp_path}/again/a.png"]


def test_our_shards_give_keys_labels_and_bytes(tmp_path):
    source = pixel_source(10)
    write_dataset(tmp_path / "data", {"val": source}, WriteOptions("pixels", samples_per_shard=4))
    items = found(tmp_path / "data/val")
    shards = [f"{tmp_path}/data/val/pixels-val-{row // 4:06d}.tar" for row in range(10)]
    assert names(items) == [f"{shard}:image-{row}" for row, shard in enumerate(shards)]
    assert [item.label for item in items] == source.labels.tolist()
    assert [item.read() for item in items] == [source.read(row) for row in range(10)]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_of_others(tmp_path, format):
    long = "folder/" * 30 + "ünïcode"
    members = {
        "./a.cls": b"7\n",  # the label may come first
        "./a.JPG": b"A",
        "b.seg.png": b"seg",
        "b.jpg": b"B",
        "b.json": b"{}",
        "._b.jpg": b"macOS",
        "c.jpg": b"C",
        f"{long}.png": b"D",
        f"{long}.cls": b"3",
    }
    items = found(write_tar(tmp_path / "t.tar", members, format=format))
    assert [(item.name.partition(":")[2], item.read(), item.label) for item in items] == [
        ("a", b"A", 7),
        ("b.seg", b"seg", None),
        ("b", b"B", None),
        ("c", b"C", None),
        (long, b"D", 3),
    ]


def test_what_cannot_be_used_is_named_in_its_place(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", {f"{k}.png": bytes(700) for k in "abcd"}).read_bytes()
    member = 512 + 1024
    damaged = bytearray(whole)
    damaged[2 * member + 20] ^= 1  # in a header, which tarfile takes for the end
    cut = {"header": 2 * member + 100, "content": 3 * member - 300, "end": 2 * member}
    for name, content in {"damaged": damaged, **{name: whole[:size] for name, size in cut.items()}}.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        items = found(tmp_path / f"{name}.tar")
        assert names(items)[:2] == [f"{tmp_path}/{name}.tar:{key}" for key in "ab"], name
        assert [type(item) for item in items[2:]] == [DataError], name
        assert f"{name}.tar" in str(items[-1])

    (tmp_path / "text.tar").write_text("no tar")
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "none.tar", {"a.txt": b""})
    write_tar(tmp_path / "label.tar", {"a.png": b"", "a.cls": b"cat", "b.png": b"", "b.cls": b"1"})
    assert "text.tar  cannot be read" in str(found(tmp_path / "text.tar")[0])
    assert "holds no image" in str(found(tmp_path / "empty")[0])
    assert "holds no image" in str(found(tmp_path / "none.tar")[0])
    bad, good = found(tmp_path / "label.tar")
    assert "label.tar:a  label b'cat' is no integer" in str(bad) and good.label == 1
    with pytest.raises(DataError, match="No such file"):
        found(tmp_path / "gone.jpg")[0].read()


def test_a_name_of_any_bytes_is_text(tmp_path):
    (tmp_path / "caf\udce9.png").write_bytes(b"x")
    (item,) = found(tmp_path)
    assert item.name == f"{tmp_path}/caf\\xe9.png" and item.read() == b"x"


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{k}.png": b"x" for k in range(3)})
    stream = find_images([tmp_path / "a.tar", tmp_path / "later.tar"])
    assert next(stream).name.endswith("a.tar:0")
    write_tar(tmp_path / "later.tar", {"z.png": b"z"})
    assert next(item for item in stream if item.name.endswith(":z")).read() == b"z"
