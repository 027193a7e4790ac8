"""A configuration file that remembers where each value came from, and the checks that every value goes through.

The JSON file is read into a `Document`; flags and `--set` then edit it by dotted key. Whatever is said about a value
later can name its flag or its line: `document.where("fp16.enabled")` is `ds_configs/my.json:7` or `--set fp16.enabled`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vitds.errors import ConfigError, nearest

# Every piece of the text that matters for "which key is on which line"; comments and strings hide what is inside them.
_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|\#[^\n]*|/\*.*?\*/) | (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[A-Za-z_]\w*)
      | (?P<open>[{\[]) | (?P<close>[}\]])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass
class Document:
    """A nested configuration: the values, the file and lines they stand on, and the flags that replaced some."""

    values: dict[str, Any] = field(default_factory=dict)
    file: str | None = None
    lines: dict[str, int] = field(default_factory=dict)  # dotted key -> line in the file, from 1
    flags: dict[str, str] = field(default_factory=dict)  # dotted key -> the flag that set it
    filled: dict[str, str] = field(default_factory=dict)  # dotted key -> what gave it a value, as "recipe deit3"

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key, or the default when a step of the way is missing."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def set(self, key: str, value: Any, flag: str) -> None:
        """Put a value at a dotted key, making the sections on the way, and remember the flag."""
        self._put(key, value)
        self.flags[key] = flag

    def fill(self, key: str, value: Any, source: str) -> None:
        """Put a value at a dotted key that neither the file nor a flag gives, and remember what gave it."""
        if self.get(key, _MISSING) is _MISSING:
            self._put(key, value)
            self.filled[key] = source

    def _put(self, key: str, value: Any) -> None:
        *parents, last = key.split(".")
        section = self.values
        for depth, part in enumerate(parents, start=1):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                parent = ".".join(parents[:depth])
                raise ConfigError(f'"{parent}" is no section, so {key} cannot be set in it', where=self.where(parent))
        section[last] = value

    def drop(self, key: str) -> None:
        """Take a value (or a whole section) out, if it is there."""
        *parents, last = key.split(".")
        section = self.get(".".join(parents), {}) if parents else self.values
        section.pop(last, None)
        self.flags = {name: flag for name, flag in self.flags.items() if name != key and not name.startswith(key + ".")}

    def source(self, key: str) -> str:
        """Where a value comes from: "flag --x", "file.json:7", "recipe NAME", or "default" when it is nowhere."""
        if key in self.flags:
            return f"flag {self.flags[key]}"
        if key in self.filled:
            return self.filled[key]
        return (
            f"{self.file}:{self.lines[key]}"
            if key in self.lines and self.get(key, _MISSING) is not _MISSING
            else "default"
        )

    def where(self, key: str) -> str:
        """The place to name in a message: the flag (also one that set a part of a section), else file and line."""
        inside = next((flag for name, flag in self.flags.items() if f"{name}.".startswith(f"{key}.")), None)
        if inside is not None and key not in self.lines:
            return inside
        return self.source(key).removeprefix("flag ").replace("default", self.file or "")


_MISSING = object()


def read_document(path: str) -> Document:
    """Read a JSON file as DeepSpeed does (hjson: comments are legal, duplicate keys are not).

    Raises: ConfigError when the file is missing, cannot be parsed, repeats a key, or is no object.
    """
    import hjson  # a fifth of the time of --help, which does not need it

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        what = "no such configuration file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise ConfigError(what, where=path, fix=_files_like(path)) from None
    except UnicodeDecodeError:
        raise ConfigError("not a text file", where=path) from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                lines = [number for number, line in enumerate(text.splitlines(), 1) if f'"{name}"' in line]
                raise ConfigError(
                    f'"{name}" is given twice in the same section', where=f"{path}:{max(lines, default=1)}"
                )
        return dict(pairs)

    try:
        values = hjson.loads(text, object_pairs_hook=unique)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ConfigError(f"not JSON that can be read: {error}", where=path) from None
    if not isinstance(values, dict):
        raise ConfigError('a configuration is one JSON object: {"train_batch_size": ..., ...}', where=path)
    return Document(values, path, key_lines(text))


def key_lines(text: str) -> dict[str, int]:
    """The line of every key in a JSON or hjson text, by dotted key (keys inside lists are left out)."""
    lines: dict[str, int] = {}
    path: list[str | None] = []  # the key being read at each open brace; None inside a list
    for token in _TOKEN.finditer(text):
        if token["open"]:
            path.append("" if token["open"] == "{" else None)
        elif token["close"]:
            path = path[:-1]
        elif token["text"] and path and path[-1] is not None and re.match(r"\s*:", text[token.end() :]):
            path[-1] = token["text"].strip("\"'")
            if None not in path:
                lines[".".join(typing.cast("list[str]", path))] = text.count("\n", 0, token.start()) + 1
    return lines


def _files_like(path: str) -> str:
    """A fix line for a missing configuration file: files of a similar name beside it and in ds_configs/."""
    folders = dict.fromkeys([Path(path).parent, Path("ds_configs")])
    found = {str(file) for folder in folders if folder.is_dir() for file in folder.glob("*.json")}
    by_name = {Path(file).name: file for file in sorted(found)}
    near = difflib.get_close_matches(Path(path).name, by_name, n=3, cutoff=0.5) or list(by_name)[:8]
    return (
        "did you mean one of: " + ", ".join(by_name[name] for name in near)
        if near
        else "the recipes are in ds_configs/"
    )


# What a value may be: int, float, bool, str, list, dict, Literal["a", "b"], tuple[float, float], and unions of these.
Kind = Any


# What others call a value of ours, where another of ours is spelt more alike.
_ELSEWHERE = {"ce": "softmax", "cross_entropy": "softmax", "cross-entropy": "softmax"}


def check_value(value: Any, kind: Kind) -> Any:
    """Return the value as its kind has it (5e8 becomes a whole number where one is asked for, lists become tuples).

    Raises: ValueError that says what was expected and what was seen.
    """
    fitted = _fit(value, kind)
    if fitted is _MISSING:
        choices = _choices(kind)
        near = None
        if isinstance(value, str):
            elsewhere = _ELSEWHERE.get(value)
            near = elsewhere if elsewhere in choices else nearest(value, choices)
        raise ValueError(f"must be {describe(kind)}, not {show(value)}" + (f'; did you mean "{near}"?' if near else ""))
    return fitted


def _choices(kind: Kind) -> list[str]:
    """The words that a kind allows."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return [option for option in args if isinstance(option, str)]
    return [word for option in args for word in _choices(option)]


def parse_value(text: str, kind: Kind) -> Any:
    """Turn the text after a flag into a value of its kind: JSON where it parses and fits, else the text itself.

    Raises: ValueError that says what was expected and what was seen.
    """
    if re.fullmatch(r"\d+x\d+", text) and _fit([1, 1], kind) is not _MISSING:  # an image size: height x width
        return tuple(int(side) for side in text.split("x"))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if _fit(value, kind) is _MISSING and _fit(text, kind) is not _MISSING:
        return text
    return check_value(value, kind)


def _fit(value: Any, kind: Kind) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return next((fitted for option in args if (fitted := _fit(value, option)) is not _MISSING), _MISSING)
    if origin is Literal:
        return next((option for option in args if type(option) is type(value) and option == value), _MISSING)
    if origin in (tuple, list):
        return _fit_sequence(value, origin, args)
    if kind in (None, types.NoneType):
        return None if value is None else _MISSING
    if kind is Any:
        return value
    if isinstance(value, bool) or kind is bool:
        return value if isinstance(value, bool) and kind is bool else _MISSING
    if kind in (int, float) and isinstance(value, int | float):
        whole = math.isfinite(value) and value == int(value)
        return _MISSING if not math.isfinite(value) or (kind is int and not whole) else kind(value)
    return value if isinstance(value, kind) else _MISSING


def _fit_sequence(value: Any, origin: Any, args: tuple[Kind, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return _MISSING
    if origin is list or args[-1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        return _MISSING
    fitted = [_fit(item, kind) for item, kind in zip(value, args, strict=True)]
    return _MISSING if _MISSING in fitted else origin(fitted)


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a section",
}


def describe(kind: Kind) -> str:
    """A kind, or a table of keys, in words."""
    if isinstance(kind, dict):
        return _WORDS[dict]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in args)
    if origin is Literal:
        return "one of " * (len(args) > 1) + ", ".join(str(option) for option in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} numbers"
    if origin in (tuple, list):
        return f"a list, each {describe(args[0])}"
    return _WORDS.get(kind, "null")


def show(value: Any) -> str:
    """A value as it would stand in the file, shortened, with a word on its type where that is the mistake."""
    text = json.dumps(value, default=str)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"the text {text}" if isinstance(value, str) else text
