import pytest
from tiny_dataset import write_dataset

from vitds.dataset_facts import check_mixture, read_dataset_facts, split_paths
from vitds.errors import DataError


@pytest.mark.parametrize(
    "path, directories",
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("a,b,c/d", ["a", "b", "c/d"]),
        ("x,y", ["x,y"]),
        ("a,x,y,b", ["a", "x,y", "b"]),
        ("a,,b", ["a", "", "b"]),
        ("http://host/{a,b}/x,b", ["http://host/{a,b}/x", "b"]),
        ("pipe:cat a,b", ["pipe:cat a,b"]),
    ],
)
def test_commas_separate_directories_unless_they_are_part_of_a_name(tmp_path, monkeypatch, path, directories):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x,y").mkdir()
    assert split_paths(path) == directories


def test_a_mixture_adds_up(tmp_path):
    write_dataset(tmp_path / "a", ("cat", "dog"), (5, 4), (2, 1))
    write_dataset(tmp_path / "b", ("eel", "cat"), (3, 2), None)
    facts = read_dataset_facts(f"{tmp_path}/a,{tmp_path}/b")
    assert facts.classes == ["cat", "dog", "eel"]
    assert facts.train_counts == [7, 4, 3] and facts.val_counts == [2, 1, 0]
    assert facts.num_train == 14 and facts.num_val == 3
    assert [part.path for part in facts.parts] == [f"{tmp_path}/a", f"{tmp_path}/b"]


def test_directories_to_validate_on_may_have_nothing_to_train_on(tmp_path):
    write_dataset(tmp_path / "a", ("cat", "dog"), None, (2, 1))
    write_dataset(tmp_path / "b", ("eel", "cat"), None, (3, 2))
    facts = read_dataset_facts(f"{tmp_path}/a,{tmp_path}/b", "val")
    assert facts.classes == ["cat", "dog", "eel"] and facts.val_counts == [4, 1, 3] and facts.num_train == 0


def test_every_directory_of_a_mixture_has_something_to_train_on(tmp_path):
    write_dataset(tmp_path / "a", ("cat", "dog"), (5, 4), None)
    write_dataset(tmp_path / "b", ("cat", "dog"), None, (2, 1))
    for path, has_way_out in ((f"{tmp_path}/a,{tmp_path}/b", True), (f"{tmp_path}/b", False)):
        with pytest.raises(DataError, match="the training split is missing") as caught:
            read_dataset_facts(path)
        assert caught.value.where == f"{tmp_path}/b/train"
        assert ("--set data.val_path=DIR,DIR" in caught.value.fix) == has_way_out


def test_directories_that_share_few_classes_are_warned_about(tmp_path):
    write_dataset(tmp_path / "a", ("cat", "dog", "eel"), (5, 4, 1), None)
    write_dataset(tmp_path / "b", ("cat", "dog"), (5, 4))
    write_dataset(tmp_path / "c", ("n01", "n02", "cat"), (5, 4, 1), None)
    assert check_mixture(read_dataset_facts(f"{tmp_path}/a")) == []
    assert check_mixture(read_dataset_facts(f"{tmp_path}/a,{tmp_path}/b")) == []
    (warning,) = check_mixture(read_dataset_facts(f"{tmp_path}/a,{tmp_path}/b,{tmp_path}/c"))
    assert warning.startswith(f"{tmp_path}/c shares 1 of its 3 classes by name") and "5 outputs" in warning


def test_somebodys_shards_are_to_be_indexed(tmp_path):
    (tmp_path / "train").mkdir()
    for is_there, fix in ((False, f"shard_imagenet.py {tmp_path} OUT"), (True, f"--index-only {tmp_path}")):
        if is_there:
            (tmp_path / "train/0.tar").touch()
        with pytest.raises(DataError, match=r"no classes\.json") as caught:
            read_dataset_facts(str(tmp_path))
        assert fix in caught.value.fix


def test_what_is_no_data_set_says_how_to_make_one_of_it(tmp_path):
    data = write_dataset(tmp_path / "data")
    (data / "train").mkdir(exist_ok=True)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/c-000.tar").touch()
    (tmp_path / "table.csv").touch()
    for name in ("out.partial", "out.part-1-of-3"):
        (tmp_path / name).mkdir()
    for path, message in [
        (data / "train", f"it is a split: --data {data}"),
        (tmp_path / "tars", "tars anew, with an index"),
        (tmp_path / "table.csv", "is a file"),
        (tmp_path / "out.partial", "sharding was not finished"),
        (tmp_path / "out.part-1-of-3", f"--merge {tmp_path / 'out'}"),
        ("htp://host/data", "no address that vitds reads"),
    ]:
        with pytest.raises(DataError) as caught:
            read_dataset_facts(str(path))
        assert message in str(caught.value)
