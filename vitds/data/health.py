"""What people should know of a data set before they train on it: classes, sizes, formats, damage, duplicates.

All of it goes to OUT/health.json, as a pure function of the data set's content, and a short form to the terminal.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

HEALTH_NAME = "health.json"
TINY_SIDE = 32  # pixels; CIFAR's images are just large enough
HUGE_PIXELS = 2**24
_QUANTILES = {"min": 0.0, "1%": 0.01, "25%": 0.25, "median": 0.5, "75%": 0.75, "99%": 0.99, "max": 1.0}
_NUM_NAMED = 1000  # in the file, of each kind
_NUM_SHOWN = 5  # in the terminal
_BAR_WIDTH = 30


def split_health(
    records: pa.Table, class_counts: list[int], classes: list[str], bad: list[str], fingerprint: str
) -> dict[str, Any]:
    """The part of one split, but for its duplicates: see `with_duplicates`.

    `records` has the columns of `vitds.data.shard.RECORD_SCHEMA`.
    """
    counts = np.array(class_counts)
    used = counts[counts > 0]
    keys, width, height = records["key"], records["width"].to_numpy(), records["height"].to_numpy()
    formats = {entry["values"]: entry["counts"] for entry in pc.value_counts(records["format"]).to_pylist()}
    return {
        "fingerprint": fingerprint,
        "num_images": len(records),
        "classes": {
            "min": int(counts.min()),
            "median": float(np.median(counts)),
            "max": int(counts.max()),
            "imbalance": round(float(used.max() / used.min()), 3) if len(used) else None,
            "empty": [classes[label] for label in np.flatnonzero(counts == 0)],
            "counts": class_counts,
        },
        "width": _quantiles(width),
        "height": _quantiles(height),
        "image_bytes": _quantiles(records["image_bytes"].to_numpy()),
        "tiny": {"below_side": TINY_SIDE} | _named(keys, np.minimum(width, height) < TINY_SIDE),
        "huge": {"above_pixels": HUGE_PIXELS} | _named(keys, width.astype(np.int64) * height > HUGE_PIXELS),
        "formats": dict(sorted(formats.items())),
        "unreadable": bad,
    }


def _quantiles(values: np.ndarray) -> dict[str, int]:
    found = np.quantile(values, list(_QUANTILES.values()), method="nearest") if len(values) else [0] * len(_QUANTILES)
    return {name: int(value) for name, value in zip(_QUANTILES, found, strict=True)}


def _named(keys: pa.ChunkedArray, chosen: np.ndarray) -> dict[str, Any]:
    rows = np.flatnonzero(chosen)
    return {"count": len(rows), "keys": keys.take(pa.array(rows[:_NUM_NAMED])).to_pylist()}


Groups = list[list[tuple[str, int]]]
"""Images that are equal byte for byte: each group's (split, row), in the order of splits and rows."""


def equal_images(records: Mapping[str, pa.Table], read: Callable[[str, int], bytes]) -> Groups:
    """Find all images that are equal to others, of all splits: by length and crc32 first, then by their bytes."""
    splits = list(records)
    place = [np.full(len(table), number) for number, table in enumerate(records.values())]
    split, row = np.concatenate(place), np.concatenate([np.arange(len(table)) for table in records.values()])
    size, checksum = (
        np.concatenate([table[name].to_numpy() for table in records.values()])
        for name in ("image_bytes", "image_crc32")
    )
    order = np.lexsort((row, split, checksum, size))
    same = (np.diff(size[order]) == 0) & (np.diff(checksum[order].astype(np.int64)) == 0)
    groups: Groups = []
    for candidates in _runs(order, same):
        by_content: dict[bytes, list[tuple[str, int]]] = {}
        for entry in candidates:
            image = splits[split[entry]], int(row[entry])
            by_content.setdefault(hashlib.sha256(read(*image)).digest(), []).append(image)
        groups += [group for group in by_content.values() if len(group) > 1]
    return sorted(groups, key=lambda group: (splits.index(group[0][0]), group[0][1]))


def _runs(order: np.ndarray, same: np.ndarray) -> Iterator[np.ndarray]:
    """The runs, of two or more, of entries that are the same as their neighbour."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        yield order[first : last + 1]


def duplicates_within(split: str, records: pa.Table, groups: Groups) -> dict[str, Any]:
    """The part of a split's health about its duplicates."""
    inside = [rows for group in groups if len(rows := [row for where, row in group if where == split]) > 1]
    labels = records["label"]
    conflicts = [len({str(labels[row]) for row in rows}) > 1 for rows in inside]
    worst_first = [rows for want in (True, False) for rows, has in zip(inside, conflicts, strict=True) if has is want]
    return {
        "redundant": sum(len(rows) - 1 for rows in inside),
        "groups": len(inside),
        "groups_of_several_labels": sum(conflicts),
        "keys": [[records["key"][row].as_py() for row in rows] for rows in worst_first[:_NUM_NAMED]],
    }


def leakage(records: Mapping[str, pa.Table], groups: Groups) -> dict[str, Any]:
    """Validation images that are training images too; `keys` are pairs of their names."""
    pairs = []
    for group in groups:
        trained = [row for split, row in group if split == "train"]
        pairs += [(row, trained[0]) for split, row in group if split == "val" and trained]
    pairs.sort()
    val, train = (records[split]["key"] for split in ("val", "train"))
    return {
        "val_images": len(pairs),
        "keys": [[val[row].as_py(), train[trained].as_py()] for row, trained in pairs[:_NUM_NAMED]],
    }


# The terminal


def health_report(health: dict[str, Any]) -> RenderableType:
    """The short form of health.json: a column for each split, a histogram of the training classes, what is odd."""
    splits = health["splits"]
    table = Table(*("", *splits), box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"

    def line(title: str, show: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(title, *(show(part) for part in splits.values()))

    line("images", lambda part: f"{part['num_images']:,}")
    line("classes", lambda part: f"{sum(count > 0 for count in part['classes']['counts']):,}")
    line("images per class", lambda part: _range(part["classes"]))
    line("imbalance", lambda part: f"{part['classes']['imbalance']:.1f}x" if part["classes"]["imbalance"] else "")
    line("width", lambda part: _range(part["width"]))
    line("height", lambda part: _range(part["height"]))
    line("kB", lambda part: _range(part["image_bytes"], 1000))
    line("formats", lambda part: ", ".join(f"{name} {count:,}" for name, count in part["formats"].items()))
    line("left out", lambda part: f"{len(part['unreadable']):,}")
    line("duplicates", lambda part: f"{part['duplicates']['redundant']:,}" if part["duplicates"] else "not looked for")
    if health["leakage"]:
        table.add_row(
            "in train and in val", *("" for _ in splits if _ != "val"), f"{health['leakage']['val_images']:,}"
        )
    first = next(iter(splits))
    return Group(table, *_histogram(first, splits[first]["classes"]["counts"]), *_odd(health))


def _range(values: dict[str, Any], unit: int = 1) -> str:
    low, median, high = (f"{values[name] / unit:,.{unit > 1:d}f}" for name in ("min", "median", "max"))
    return low if low == high else f"{low} - {high}, median {median}"


def _histogram(split: str, counts: list[int], num_bins: int = 6) -> Iterator[str]:
    """How many classes have how many images, as bars; nothing when all have the same."""
    if min(counts) == max(counts):
        return
    edges = np.unique(np.linspace(min(counts), max(counts) + 1, num_bins + 1).astype(int))
    heights, _ = np.histogram(counts, edges)
    ranges = [f"{low:,} - {high - 1:,}" if high - low > 1 else f"{low:,}" for low, high in itertools.pairwise(edges)]
    width = max(map(len, ranges))
    yield f"  {split}: classes by their number of images"
    for text, height in zip(ranges, heights, strict=True):
        bar = "█" * round(height / heights.max() * _BAR_WIDTH) or ("▏" if height else "")
        yield f"  {text:>{width}}  {bar} {height}"


def _odd(health: dict[str, Any]) -> Iterator[str]:
    """A line for each thing that its user may want to look at."""
    for split, part in health["splits"].items():
        tiny, huge = part["tiny"], part["huge"]
        odd = [
            (len(part["classes"]["empty"]), "classes without images", part["classes"]["empty"]),
            (tiny["count"], f"images narrower or lower than {tiny['below_side']} pixels", tiny["keys"]),
            (huge["count"], f"images of more than {huge['above_pixels'] / 1e6:.0f} million pixels", huge["keys"]),
        ]
        if part["duplicates"]:
            same = part["duplicates"]
            conflict = same["groups_of_several_labels"]
            note = f" ({conflict} of {same['groups']} groups under different labels)" if conflict else ""
            keys = [" = ".join(keys[:3]) for keys in same["keys"]]
            odd.append((same["redundant"], f"images that repeat others{note}", keys))
        yield from (f"  {split}: {_some(count, what, names)}" for count, what, names in odd if count)
    leaked = health["leakage"]
    if leaked and leaked["val_images"]:
        pairs = [" = ".join(pair) for pair in leaked["keys"]]
        yield "  val: " + _some(leaked["val_images"], "validation images that are training images too", pairs)


def _some(count: int, what: str, names: list[str]) -> str:
    return f"{count:,} {what}: {', '.join(names[:_NUM_SHOWN])}{', ...' if count > _NUM_SHOWN else ''}"
