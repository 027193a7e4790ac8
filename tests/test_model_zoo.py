"""MODEL_ZOO.md: a row for every published file, and no number that the code's table or arithmetic does not have."""

import math
import re

import pytest
from rank_processes import ROOT

from vitds.layouts.google import google_layout
from vitds.model.registry import get_spec, grid_size
from vitds.published_weights import PUBLISHED

PAGE = (ROOT / "MODEL_ZOO.md").read_text()
SETS = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "ImageNet": "imagenet"}

# Published fine-tunings of imagenet21k files at 384 px, top-1 in percent: with dropout 0 and 0.1 for CIFAR-10,
# CIFAR-100 and ImageNet (Google's README.md); of ViT-H_14 without the dropout (the paper, table 5).
FINE_TUNED = {
    "R50-ViT-B_16": [(98.72, 98.94), (90.88, 92.30), (83.72, 85.08)],
    "ViT-B_16": [(99.02, 98.76), (92.06, 91.92), (84.53, 84.12)],
    "ViT-B_32": [(98.88, 98.75), (92.31, 92.05), (81.66, 81.31)],
    "ViT-L_16": [(99.13, 99.14), (92.91, 93.22), (84.47, 85.05)],
    "ViT-L_32": [(99.06, 99.09), (93.29, 93.34), (81.89, 81.13)],
    "ViT-H_14": [(99.27,), (93.82,), (85.13,)],
}
# What issue and facts name: the better of Google's two dropouts on ImageNet at 384 px.
BEST_ON_IMAGENET = {"ViT-B_16": 84.53, "ViT-B_32": 81.66, "ViT-L_16": 85.05, "ViT-L_32": 81.89, "R50-ViT-B_16": 85.08}
NOT_RUN = "not run here"


def tables():
    """Every table of the page, as a list of rows by column name."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        assert all(len(row) == len(header) for row in rows), block
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


CHECKPOINTS = [row for table in tables() for row in table if row.get("name", "").startswith("`")]
BY_NAME = {row["name"].strip("`"): row for row in CHECKPOINTS}


def percents(cell):
    return [float(number) for number in cell.split(" / ")] if re.match(r"\d", cell) else []


def test_every_published_file_has_one_row():
    assert [row["name"].strip("`") for row in CHECKPOINTS] == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_says_what_is_in_the_file(name):
    weights, row = PUBLISHED[name], BY_NAME[name]
    assert (row["file"], int(row["px"])) == (f"`{weights.file_name}`", weights.image_size)
    spec = get_spec(weights.model)
    tokens = 1 + math.prod(grid_size(spec, (weights.image_size, weights.image_size)))
    arrays = google_layout(spec, tokens, weights.num_classes, weights.pre_logits)
    assert int(row["parameters"].replace(",", "")) == sum(math.prod(array.shape) for array in arrays)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_reference_is_one_of_the_code_s_table_with_its_source(name):
    weights, row = PUBLISHED[name], BY_NAME[name]
    if weights.collection != "imagenet21k":
        assert percents(row["ImageNet, reference"]) == ([weights.top1] if weights.top1 else [])
        assert bool(weights.source) == (weights.top1 is not None)
        if "source" in row:
            issue = re.search(r"issue (\d+)", weights.source)
            number = row["source"].strip("[]")
            assert bool(number) == bool(weights.source)
            assert not issue or re.search(rf"^{number}\. .*issues/{issue[1]}\)", PAGE, re.MULTILINE)
        return
    for title, published in zip(SETS, FINE_TUNED[weights.model], strict=True):
        assert percents(row[f"{title}, reference"]) == list(published)
    if weights.model in BEST_ON_IMAGENET:
        assert max(percents(row["ImageNet, reference"])) == BEST_ON_IMAGENET[weights.model]


def test_the_short_runs_are_the_published_ones():
    rows = next(table for table in tables() if "warmup" in table[0])
    found = [
        (SETS[row["data"]], int(row["steps"].replace(",", "")), int(row["warmup"]), row["reference"]) for row in rows
    ]
    assert found == [
        ("cifar10", 500, 50, "98.59"),
        ("cifar10", 1000, 100, "98.86"),
        ("cifar100", 500, 50, "89.17"),
        ("cifar100", 1000, 100, "91.15"),
    ]  # fmt: skip
    for row in rows:
        assert f"_{row['steps'].replace(',', '')}steps_" in row["recipe"]


def test_every_row_names_a_recipe_that_is_there():
    rows = [row for table in tables() for row in table if "recipe" in row or "fine-tuned here by" in row]
    assert len(rows) == len(PUBLISHED) + 5
    for row in rows:
        recipes = re.findall(r"\]\((ds_configs/\w+\.json)\)", row.get("recipe") or row["fine-tuned here by"])
        assert recipes and all((ROOT / recipe).is_file() for recipe in recipes)


def test_a_figure_of_ours_has_its_command_commit_seed_and_log():
    runs = next(table for table in tables() if "seed" in table[0])
    runs = [run for run in runs if run["checkpoint"] != "none yet"]
    for run in runs:
        assert all(run[part] for part in ("top-1", "command", "commit", "seed", "log")), run
    claimed = {cell for table in tables() for row in table if (cell := row.get("ours", NOT_RUN)) != NOT_RUN}
    assert claimed <= {run["top-1"] for run in runs}


def test_links_lead_to_what_is_there():
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGE):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists(), target
        assert not anchor or re.search(rf"^#+ {anchor.replace('-', ' ')}$", PAGE, re.MULTILINE | re.IGNORECASE), target
