"""Every file of ds_configs/: it resolves on any usual number of GPUs, and two steps of it train a small model."""

import copy
import json
import math
import re

import pytest
from rank_processes import ROOT, run_ranks
from run_directory import metrics
from tiny_dataset import write_dataset

from vitds.preflight import plan_run

RECIPES = sorted((ROOT / "ds_configs").glob("*.json"))
NAMES = [recipe.stem for recipe in RECIPES]
CONTENT = {recipe.stem: json.loads(recipe.read_text()) for recipe in RECIPES}  # strict JSON: comments would fail here


@pytest.mark.parametrize(
    "recipe, world_size",
    [(recipe, size) for recipe in RECIPES for size in (1, 2, 4, 8) if size <= CONTENT[recipe.stem]["train_batch_size"]],
    ids=lambda value: getattr(value, "stem", None),
)
def test_a_recipe_resolves(tmp_path, recipe, world_size):
    per_class = 128_117 if recipe.stem.startswith("imagenet") else 5000  # as many images as ImageNet or CIFAR-10 has
    data = write_dataset(tmp_path / "data", tuple("0123456789"), (per_class,) * 10, (1000,) * 10)
    arguments = ["--deepspeed_config", str(recipe), "--data", str(data), "--output-dir", str(tmp_path)]
    plan = plan_run(arguments, {"WORLD_SIZE": str(world_size), "RANK": "0"})
    content, vitds = CONTENT[recipe.stem], CONTENT[recipe.stem]["vitds"]
    assert plan.warnings == [], "a shipped file has a key without effect"
    assert plan.batch.global_batch == content["train_batch_size"]
    assert plan.batch.micro_batch <= content.get("train_micro_batch_size_per_gpu", math.inf)
    # A file without a model takes that of the weights that it is given, or ViT-B_16.
    assert plan.spec.name == vitds.get("model", "ViT-B_16")
    assert plan.num_steps == vitds.get("num_steps", plan.num_steps)
    assert plan.zero_stage == content["zero_optimization"]["stage"]
    assert not plan.optimizer.params["weight_decay"] or plan.run.weight_decay_on == "matrices"


def test_names_say_what_the_files_hold():
    for name, content in CONTENT.items():
        model, image_size = content["vitds"].get("model", ""), content["vitds"]["image_size"]
        if model.startswith("custom:"):
            continue
        assert model.partition(":")[0].lower().replace("-", "_").replace("_", "") in name.replace("_", "")
        assert model or "_vit_" not in name
        if named := re.search(r"_(\d+)(steps|epochs)", name):
            assert content["vitds"]["num_steps" if named[2] == "steps" else "epochs"] == int(named[1])
        assert not re.search(r"_(\d{3})_", name) or abs(int(re.search(r"_(\d{3})_", name)[1]) - image_size) < 14
        for precision in ("fp16", "bf16"):
            assert precision not in name or content[precision]["enabled"]
        assert "zero" not in name or name.endswith(f"zero{content['zero_optimization']['stage']}")


def test_the_readme_introduces_every_file_and_no_other():
    named = re.findall(r"(\w+)\.json", (ROOT / "ds_configs/README.md").read_text())
    assert set(named) == set(NAMES)


def shrunk(name):
    """A recipe without what the worker replaces by something small: two of the same are one run there."""
    content = copy.deepcopy(CONTENT[name])
    content["scheduler"]["params"].pop("warmup_num_steps")
    replaced = ("model", "image_size", "num_steps", "epochs", "eval_every", "save_every", "log_every", "workers")
    content["vitds"] = {key: value for key, value in content["vitds"].items() if key not in replaced}
    return content


TRAINED_AS = {name: next(first for first in NAMES if shrunk(first) == shrunk(name)) for name in NAMES}


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Two steps of every recipe on two ranks; stage 3 in processes of its own, since it changes torch's linear."""
    output = tmp_path_factory.mktemp("recipes")
    names = sorted(set(TRAINED_AS.values()))
    stage_3 = [name for name in names if CONTENT[name]["zero_optimization"]["stage"] == 3]
    for group in (stage_3, [name for name in names if name not in stage_3]):
        files = [f"ds_configs/{name}.json" for name in group]
        run_ranks(["tests/workers/recipes.py", str(digits), str(output), *files], 2)
    return {name: output / first for name, first in TRAINED_AS.items()}


@pytest.mark.ranks
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(trained, name):
    content, lines = CONTENT[name], metrics(trained[name])
    steps = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    resolved = json.loads((trained[name] / "config.resolved.json").read_text())["vitds"]
    num_outcomes = {"softmax": 10, "bce": 2}[resolved["loss"]]
    assert steps[0]["loss"] == pytest.approx(math.log(num_outcomes), abs=1e-3)  # the head starts at zero
    assert [line["skipped_steps"] for line in steps] == [0, 0]
    assert steps[1]["grad_norm"] > 0 and math.isfinite(steps[1]["loss"])
    # The first step of a warmup of one is at 0; the second is at the peak.
    assert (steps[0]["lr"], steps[1]["lr"]) == (0, content["optimizer"]["params"]["lr"])
    assert steps[0]["loss_scale"] == (2 ** content["fp16"]["initial_scale_power"] if "fp16" in content else 1)
    assert lines[-1]["split"] == "val" and 0 <= lines[-1]["top1"] <= 1
    assert (trained[name] / "checkpoints/latest").read_text().strip() == "global_step2"


@pytest.mark.ranks
@pytest.mark.parametrize("name", NAMES)
def test_what_was_trained_is_what_the_recipe_says(trained, name):
    content, resolved = CONTENT[name], json.loads((trained[name] / "config.resolved.json").read_text())
    assert resolved["train_batch_size"] == content["train_batch_size"]
    assert resolved["optimizer"] == content["optimizer"]
    for precision in ("fp16", "bf16"):
        assert resolved.get(precision, {}).get("enabled", False) == (precision in content)
    expected = {key: value for key, value in content["vitds"].items() if key in ("dropout", "activation_checkpointing")}
    assert {key: resolved["vitds"][key] for key in expected} == expected
