"""A dataset directory as far as a check without pyarrow reads it, and a configuration file, written by hand."""

import json
from pathlib import Path


def write_dataset(
    path: Path,
    classes: tuple[str, ...] = ("cat", "dog"),
    train: tuple[int, ...] | None = (5, 5),
    val: tuple[int, ...] | None = (2, 2),
    multi_label: bool = False,
) -> Path:
    """classes.json and _info.json with these counts per class; None is a data set without that split.

    With `multi_label` each split holds as many samples as its most frequent class.
    """
    path.mkdir(parents=True, exist_ok=True)
    counts = {name: of for name, of in (("train", train), ("val", val)) if of is not None}
    splits = {
        name: {"name": name, "num_samples": sum(of), "filenames": [], "shard_lengths": [], "class_counts": list(of)}
        for name, of in counts.items()
    }
    for split in splits.values() if multi_label else ():
        split |= {"multi_label": True, "num_samples": max(split["class_counts"])}
    (path / "classes.json").write_text(json.dumps(list(classes)))
    (path / "_info.json").write_text(json.dumps({"splits": splits}))
    return path


def write_config(path: Path, **keys: object) -> Path:
    """A configuration of eight images a step and ten steps, with `keys` on top (None takes a key out)."""
    content = {"train_batch_size": 8, "vitds": {"model": "ViT-Ti_16", "num_steps": 10}} | keys
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}, indent=2))
    return path
