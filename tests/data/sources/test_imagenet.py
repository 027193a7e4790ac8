"""The official archives in their layout, made small: a tar of class tars, a flat tar, and the devkit."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitds.data.reader import ShardReader
from vitds.data.sources import open_source
from vitds.data.sources.devkit import leaf_synsets
from vitds.data.writer import WriteOptions, write_dataset
from vitds.errors import DataError

WNIDS = ["n02119789", "n01440764", "n03478589"]  # by ILSVRC2012_ID; not in the order of their names
SORTED = sorted(WNIDS)
TRUTH = [3, 1, 2, 2, 1, 3, 3]
DEVKIT = "ILSVRC2012_devkit_t12"


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def tar_of(files: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def meta_mat(compressed: bool) -> bytes:
    """A meta.mat as the devkit has it: leaf classes first, then the synsets above them."""
    savemat = pytest.importorskip("scipy.io").savemat
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros((len(WNIDS) + 1, 1), dtype=[(name, object) for name in [*names, "num_train_images"]])
    for row, wnid in enumerate([*WNIDS, "n00001740"]):
        is_leaf = row < len(WNIDS)
        children = np.zeros((1, 0)) if is_leaf else np.array([[1.0, 2.0, 3.0]])
        synsets[row, 0] = (float(row + 1), wnid, f"thing {row}, é", "", 0.0 if is_leaf else 3.0, children, 1.0, 1300.0)
    stream = io.BytesIO()
    savemat(stream, {"before": np.arange(5), "synsets": synsets}, do_compression=compressed)
    return stream.getvalue()


def put_devkit(directory: Path, form: str) -> None:
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    files = {"meta.mat": meta_mat(form != "folder"), "ILSVRC2012_validation_ground_truth.txt": truth}
    if form == "archive":
        packed = [(f"{DEVKIT}/readme.txt", b"hello")] + [(f"{DEVKIT}/data/{name}", of) for name, of in files.items()]
        with tarfile.open(directory / f"{DEVKIT}.tar.gz", "w:gz") as tar:
            for name, content in packed:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    elif form == "wnids":
        lines = "".join(f"{WNIDS[number - 1]}\n" for number in TRUTH)
        (directory / "imagenet_2012_validation_synset_labels.txt").write_text(lines)
    else:
        folder = directory / DEVKIT / "data" if form == "folder" else directory
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)


@pytest.fixture
def official(tmp_path) -> Path:
    """A directory of the archives, and a tree of the same images beside it."""
    archives, tree = tmp_path / "archives", tmp_path / "tree"
    archives.mkdir()
    inner = []
    for label, wnid in enumerate(WNIDS):
        images = [(f"{wnid}_{number}.JPEG", jpeg(10 * label + number)) for number in (7, 10, 3)]
        inner.append((f"{wnid}.tar", tar_of(images)))
        for name, content in images:
            (tree / "train" / wnid).mkdir(parents=True, exist_ok=True)
            (tree / "train" / wnid / name).write_bytes(content)
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    flat = []
    for number, wnid in enumerate((WNIDS[of - 1] for of in TRUTH), 1):
        flat.append((f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(100 + number)))
        (tree / "val" / wnid).mkdir(parents=True, exist_ok=True)
        (tree / "val" / wnid / flat[-1][0]).write_bytes(flat[-1][1])
    (archives / "ILSVRC2012_img_val.tar").write_bytes(tar_of(flat[::-1]))
    return archives


def write(source: Path, out: Path, split: str | None = None, **options) -> dict[str, bytes]:
    write_dataset(out, open_source(str(source), split, out.parent), WriteOptions("imagenet", 4, **options))
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["archive", "folder", "two files", "wnids"])
def test_the_archives_give_the_shards_of_the_extracted_tree(official, tmp_path, form):
    put_devkit(official, form)
    from_archives = write(official, tmp_path / "out", workers=2)
    from_tree = write(tmp_path / "tree", tmp_path / "out-of-tree")
    assert {name for name in from_tree if name.endswith(".tar")} and from_archives == from_tree


def test_one_archive_alone_is_known_by_its_content(official, tmp_path):
    put_devkit(official, "archive")
    train = open_source(str((official / "ILSVRC2012_img_train.tar").rename(official / "t.tar")), None, tmp_path)
    assert list(train) == ["train"] and train["train"].classes == SORTED
    assert train["train"].sizes().tolist() == [len(train["train"].read(row)) for row in range(9)]
    assert train["train"].where(0) == f"{official}/t.tar n01440764/n01440764_10"
    val = open_source(str(official / "ILSVRC2012_img_val.tar"), None, tmp_path)
    assert list(val) == ["val"] and val["val"].classes == SORTED
    numbers = [int(key[-8:]) for key in val["val"].keys]
    assert [SORTED.index(WNIDS[TRUTH[number - 1] - 1]) for number in numbers] == val["val"].labels.tolist()


def test_training_needs_no_devkit_and_validation_says_that_it_does(official, tmp_path):
    assert list(open_source(str(official), "train", tmp_path)) == ["train"]
    with pytest.raises(DataError, match="the devkit that does is not beside it") as caught:
        open_source(str(official), None, tmp_path)
    assert f"{DEVKIT}.tar.gz" in caught.value.fix and "--split train" in caught.value.fix
    (official / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    with pytest.raises(DataError, match=r"mean nothing without the devkit's meta\.mat"):
        open_source(str(official), None, tmp_path)


def test_damage_inside_a_class_tar_is_named_and_costs_one_image(official, tmp_path):
    path = official / "ILSVRC2012_img_train.tar"
    whole = bytearray(path.read_bytes())
    place = whole.index(b"n01440764_10.JPEG")
    whole[place] ^= 1
    path.write_bytes(whole)
    source = open_source(str(official), "train", tmp_path)["train"]
    assert len(source.bad) == 1 and "n01440764.tar: damaged header" in source.bad[0] and str(path) in source.bad[0]
    assert source.classes == SORTED and len(source.keys) == 8
    with pytest.raises(DataError, match=r"(?s)1 of 9 .*n01440764\.tar: damaged header"):
        write(official, tmp_path / "out", "train")
    write(official, tmp_path / "out", "train", skip_bad=True)
    assert len(ShardReader(tmp_path / "out", "train")) == 8


def test_an_archive_cut_anywhere_is_named(official, tmp_path):
    path = official / "ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    end = max(place for place in range(0, len(whole), 512) if any(whole[place : place + 512])) + 512
    for size in range(512, end, 1024):
        path.write_bytes(whole[:size])
        if size < whole.index(b"n01440764.tar"):
            with pytest.raises(DataError, match=r"nothing in it can be used: .*cut off"):
                open_source(str(official), "train", tmp_path)
            continue
        source = open_source(str(official), "train", tmp_path)["train"]
        assert any(f"{path}: cut off" in line for line in source.bad), size
        assert all(source.read(row) == (tmp_path / "tree/train" / f"{key}.JPEG").read_bytes() for row, key in
                   enumerate(source.keys))  # fmt: skip


@pytest.mark.parametrize("size", [b"-0000003000\0", b"-0000000001\0"])
def test_a_devkit_with_a_size_below_zero_is_refused(official, tmp_path, size):
    info = tarfile.TarInfo(f"{DEVKIT}/readme.txt")
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with gzip.open(official / f"{DEVKIT}.tar.gz", "wb") as packed:
        packed.write(tar_of([("a", b"x" * 2000)])[:2560] + header + bytes(10240))
    with pytest.raises(DataError, match="cannot be read: damaged size"):
        open_source(str(official), "val", tmp_path)


@pytest.mark.parametrize("number", ["1" * 5000, "²", "-1", "99"])
def test_a_line_of_the_ground_truth_that_is_no_class_is_named(official, tmp_path, number):
    put_devkit(official, "two files")
    (official / "ILSVRC2012_validation_ground_truth.txt").write_text(f"1\n{number}\n3\n")
    with pytest.raises(DataError, match=r"line 2 of .* names no class"):
        open_source(str(official), "val", tmp_path)


def test_a_ground_truth_that_does_not_fit_is_refused(official, tmp_path):
    put_devkit(official, "two files")
    truth = official / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n2\n3\n")
    source = open_source(str(official), "val", tmp_path)["val"]
    assert len(source.keys) == 3 and sum("has no label for it" in line for line in source.bad) == 4
    truth.write_text("1\n" * 9)
    assert any(
        "7 images, the ground truth has 9" in note for note in open_source(str(official), "val", tmp_path)["val"].notes
    )
    truth.write_text("1\n4\n")  # the synset above the others
    with pytest.raises(DataError, match="line 2"):
        open_source(str(official), "val", tmp_path)
    (official / "meta.mat").write_bytes((official / "meta.mat").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"meta\.mat cannot be read"):
        open_source(str(official), "val", tmp_path)


@pytest.mark.parametrize("compressed", [True, False])
def test_the_table_of_synsets_is_read_as_scipy_writes_it(compressed):
    mat = meta_mat(compressed)
    assert leaf_synsets(mat) == dict(enumerate(WNIDS, 1))
    loaded = pytest.importorskip("scipy.io").loadmat(io.BytesIO(mat), squeeze_me=True)["synsets"]
    assert [row["WNID"] for row in loaded][:3] == WNIDS
