"""data.recipe: its numbers are the papers', it fills only what is not given, and a run keeps the values alone."""

import json

import pytest
from tiny_dataset import write_config, write_dataset

from vitds.errors import ConfigError
from vitds.preflight import plan_run
from vitds.recipes import RECIPES
from vitds.run_config import DataConfig, RunConfig, entries


@pytest.fixture
def planned(tmp_path):
    data = write_dataset(tmp_path / "data")

    def plan(*flags, **vitds):
        section = {"model": "ViT-Ti_16", "num_steps": 10} | vitds
        config = write_config(tmp_path / "run.json", train_batch_size=24, vitds=section)
        arguments = ["--deepspeed_config", config, "--data", data, "--output-dir", tmp_path, *flags]
        return plan_run([*map(str, arguments)], {"WORLD_SIZE": "1", "RANK": "0"})

    return plan


def with_recipe(name):
    return ("--set", f"data.recipe={name}")


# Steiner et al., section 3.3: RandAugment's layers and magnitude, and mixup's alpha; big_vision configs/vit_i21k.py,
# RANDAUG_DEF and MIXUP_DEF. The crop and flip are its decode_jpeg_and_inception_crop(224)|flip_lr, the evaluation its
# resize_small(256)|central_crop(224).
AUGREG = {
    "none": (0, 0, 0.0),
    "light1": (2, 0, 0.0),
    "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5),
    "strong2": (2, 20, 0.8),
}


@pytest.mark.parametrize("name", AUGREG)
def test_augreg_is_the_paper_s(planned, name):
    data = planned(*with_recipe(f"augreg-{name}")).run.data
    assert (data.randaugment_layers, data.randaugment_magnitude, data.mixup_alpha) == AUGREG[name]
    assert (data.train_crop, data.crop_scale, data.flip, data.mean, data.std) == ("random", (0.05, 1), 0.5, 0.5, 0.5)
    assert (data.eval_crop, int(224 / data.crop_fraction)) == ("center", 256)
    assert (data.cutmix_alpha, data.erase, data.color_jitter, data.three_augment, data.repeats) == (0, 0, 0, False, 1)


def test_vit_fine_tuning_is_the_paper_s_and_our_default(planned):
    data = planned(*with_recipe("vit-finetune")).run.data
    default = DataConfig(path=data.path)
    assert {key: getattr(data, key) for key in vars(default) if key != "shuffle_window"} == {
        key: value for key, value in vars(default).items() if key != "shuffle_window"
    }


def test_deit_iii_is_the_paper_s(planned):
    """Touvron et al., hyperparameters of ImageNet-1k and -21k; facebookresearch/deit README_revenge.md, augment.py."""
    run = planned(*with_recipe("deit3")).run
    data = run.data
    assert (data.train_crop, data.crop_scale, data.crop_ratio) == ("random", (0.08, 1.0), (0.75, 4 / 3))
    assert (data.interpolation, data.flip, data.repeats) == ("bicubic", 0.5, 3)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (data.three_augment, data.color_jitter, data.erase, data.randaugment_layers) == (True, 0.3, 0, 0)
    assert (data.mixup_alpha, data.cutmix_alpha, data.cutmix_share) == (0.8, 1.0, 0.5)
    assert (run.loss, run.label_smoothing, data.mixed_targets) == ("bce", 0.0, "ones")
    assert (data.eval_crop, data.crop_fraction) == ("center", 1.0)

    run = planned(*with_recipe("deit3-21k")).run
    data = run.data
    assert (data.train_crop, data.repeats, data.three_augment, data.color_jitter) == ("simple", 1, True, 0.3)
    assert (data.mixup_alpha, data.cutmix_alpha, data.mixed_targets) == (0, 1.0, "shares")
    assert (run.loss, run.label_smoothing) == ("softmax", 0.1)


def test_file_and_flags_win_over_a_recipe_and_the_sources_say_who_gave_what(planned):
    flags = ("--loss", "softmax", "--set", "data.mixed_targets=shares", "--set", "data.color_jitter=0.4")
    plan = planned(*flags, data={"recipe": "deit3", "repeats": 2})
    assert (plan.run.loss, plan.run.data.color_jitter, plan.run.data.repeats) == ("softmax", 0.4, 2)
    assert plan.run.data.cutmix_alpha == 1.0
    sources = {key.removeprefix("vitds."): value for key, value in plan.sources.items()}
    assert sources["loss"] == "flag --loss" and sources["data.color_jitter"] == "flag --set data.color_jitter"
    assert sources["data.repeats"].endswith("run.json:8")
    assert sources["data.cutmix_alpha"] == sources["label_smoothing"] == "recipe deit3"
    assert sources["data.randaugment_magnitude"] == "default"


def test_the_resolved_run_holds_values_and_needs_no_recipe(planned, tmp_path):
    plan = planned(*with_recipe("deit3"))
    resolved = json.loads(json.dumps(plan.resolved()))
    assert resolved["vitds"]["data"]["recipe"] is None and resolved["vitds"]["data"]["color_jitter"] == 0.3
    (tmp_path / "resolved.json").write_text(json.dumps(resolved))
    again = plan_run(["--deepspeed_config", str(tmp_path / "resolved.json")], {"WORLD_SIZE": "1", "RANK": "0"})
    assert again.run == plan.run


@pytest.mark.parametrize(
    "name, fix", [("deitt3", '"deit3"'), ("augreg_medium", '"augreg-medium'), ("x", "vit-finetune")]
)
def test_an_unknown_recipe_is_named_with_the_nearest(planned, name, fix):
    with pytest.raises(ConfigError, match=f'no recipe "{name}"') as error:
        planned(*with_recipe(name))
    assert error.value.where == "--set data.recipe" and fix in error.value.fix
    with pytest.raises(ConfigError) as error:
        planned(data={"recipe": name})
    assert error.value.where.endswith("run.json:7")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_entries_of_the_configuration_and_does_not_differ_in_kind(planned, name):
    assert RECIPES[name].keys() <= entries().keys()
    run = planned(*with_recipe(name)).run
    for key, value in RECIPES[name].items():
        held = getattr(run.data if key.startswith("data.") else run, key.removeprefix("data."))
        assert held == (tuple(value) if isinstance(value, list) else value)
    assert isinstance(run, RunConfig)


def test_what_the_file_keeps_for_itself_is_said(planned):
    kept = [line for line in planned(*with_recipe("deit3"), data={"train_crop": "none"}).warnings if "recipe" in line]
    assert len(kept) == 1 and kept[0].endswith("run.json gives its own data.train_crop")
    by_flag = planned(*with_recipe("deit3"), "--set", "data.train_crop=none").warnings
    assert not [line for line in by_flag if "recipe" in line]
