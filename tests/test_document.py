from typing import Any, Literal

import pytest

from vitds.document import check_value, parse_value, read_document
from vitds.errors import ConfigError

TEXT = """{
  // a comment with "bf16": {
  "optimizer": {"type": "AdamW",   # "lr": 3
    "params": {"lr": 1e-3, "betas": [0.9, {"lr": 1}]}},
  /* "fp16": 1
  */ "fp16": {
    "enabled": true
  },
  "bf16": {"enabled": false}
}
"""


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "my.json"
    path.write_text(TEXT)
    return read_document(str(path))


def test_a_key_knows_its_line_whatever_comments_and_strings_say(document):
    lines = {
        "optimizer": 3,
        "optimizer.type": 3,
        "optimizer.params.lr": 4,
        "fp16": 6,
        "fp16.enabled": 7,
        "bf16.enabled": 9,
    }
    assert {key: document.lines[key] for key in lines} == lines
    assert document.where("fp16.enabled") == f"{document.file}:7"


def test_a_flag_wins_and_is_named(document):
    document.set("fp16.enabled", False, "--set fp16.enabled")
    document.set("scheduler.params.warmup_num_steps", 5, "--warmup-steps")
    assert document.get("fp16.enabled") is False
    assert document.source("fp16.enabled") == "flag --set fp16.enabled"
    assert document.where("scheduler") == "--warmup-steps"
    assert document.source("nothing.here") == "default"
    with pytest.raises(ConfigError, match="no section"):
        document.set("fp16.enabled.deeper", 1, "--set x")


def test_a_dropped_section_is_gone(document):
    document.set("optimizer.params.lr", 2, "--set optimizer.params.lr")
    document.drop("optimizer")
    assert document.get("optimizer") is None
    assert document.source("optimizer.params.lr") == "default"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2,\n "a": 3}', 'json:2  "a" is given twice'),
        ('{"a": [1, 2}', "not JSON"),
        ("[1]", "one JSON object"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "my.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_document(str(path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("value", "kind", "fitted"),
    [
        (5e8, int, 500_000_000),
        (3, float, 3.0),
        (None, int | None, None),
        ([1, 2], int | tuple[int, int] | None, (1, 2)),
        ([0.5, 1], tuple[float, ...], (0.5, 1.0)),
        ("full", Literal["none", "full"] | int, "full"),
        ("anything", Any, "anything"),
    ],
)
def test_values_that_fit(value, kind, fitted):
    assert check_value(value, kind) == fitted
    assert type(check_value(value, kind)) is type(fitted)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (5.5, int, "a whole number, not 5.5"),
        ("1e-3", float, 'a number, not the text "1e-3"'),
        (True, int, "a whole number, not true"),
        (1, bool, "true or false, not 1"),
        (float("nan"), float, "a number, not NaN"),
        (float("inf"), float, "a number, not Infinity"),
        ([1, 2, 3], tuple[int, int], "a list of 2 numbers"),
        ("half", Literal["none", "full"], "one of none, full"),
        (True, Literal[0, 1], "one of 0, 1"),
        (3, str, "text, not 3"),
    ],
)
def test_values_that_do_not(value, kind, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check_value(value, kind)


def test_the_text_after_a_flag():
    assert parse_value("1e-3", float) == 0.001
    assert parse_value("123", str | None) == "123"  # a run may be called 123
    assert parse_value("224x192", int | tuple[int, int] | None) == (224, 192)
    assert parse_value("4", Literal["none", "full"] | int) == 4
    assert parse_value("null", int | None) is None
    with pytest.raises(ValueError, match="whole number"):
        parse_value("x", int)
