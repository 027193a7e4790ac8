"""The recipes are the published ones: every number of the files of ds_configs/ against the table of its source."""

import json
import math
import re

import numpy as np
import pytest
import torch
from rank_processes import ROOT
from tiny_dataset import write_dataset
from weights.reference import gen_npz

from vitds.errors import WeightError
from vitds.loss import cross_entropy
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.optim import build_optimizer, parameter_groups
from vitds.preflight import plan_run
from vitds.recipes import RECIPES
from vitds.schedule import lr_factor

README = (ROOT / "ds_configs/README.md").read_text()
IMAGENET_COUNT = 1_281_167

# google-research/vision_transformer: vit_jax/configs/common.py (batch, clipping, momentum, learning rate, crop, steps a
# data set), augreg.py (500 steps, warmup 100, resize 448), README.md (the short runs, total_steps / warmup_steps);
# dropout 0 is configs/models.py of ViT-B_16, B_32 and L_32, and augreg.py of every model.
FINE_TUNING = {
    # file                          steps  warmup  px   eval resize
    "cifar10_384_bf16":            (10_000, 500, 384, None),
    "cifar100_384_bf16":           (10_000, 500, 384, None),
    "imagenet_384_bf16":           (20_000, 500, 384, None),
    "cifar_384_500steps_bf16":     (500,     50, 384, None),
    "cifar_384_1000steps_bf16":    (1_000,  100, 384, None),
    "augreg_384_bf16":             (500,    100, 384, 448),
    "cifar10_vit_b16_bf16":        (10_000, 500, 224, None),  # ViT-pytorch's size
    "cifar10_vit_b16_fp16":        (10_000, 500, 224, None),
    "cifar10_vit_b16_fp32":        (10_000, 500, 224, None),
    "imagenet_vit_l16_384_bf16":   (20_000, 500, 384, None),
    "imagenet_vit_h14_378_zero2":  (20_000, 500, 378, None),  # 384 cut to whole patches
    "imagenet_vit_h14_378_zero3":  (20_000, 500, 378, None),
}  # fmt: skip
DROPOUT = {"ViT-L_16": 0.1, "ViT-H_14": 0.1, "R50-ViT-B_16": 0.1}  # configs/models.py; 0 for the others
# The paper's grids of fine-tuning (Dosovitskiy et al., table 4).
GRIDS = {"CIFAR": "0.001, 0.003, 0.01 and 0.03", "ImageNet": "0.003, 0.01, 0.03 and 0.06"}
PRE_TRAINING = "imagenet_vit_s16_90epochs_bf16"
DEIT_III = "imagenet_vit_s16_deit3_bf16"


@pytest.fixture
def planned(tmp_path):
    def plan(name, *flags, classes=10, num_train=50_000):
        counts = tuple(num_train // classes + (label < num_train % classes) for label in range(classes))
        labels = tuple(map(str, range(classes)))
        data = write_dataset(tmp_path / "data", labels, counts, (10,) * classes)
        config = ROOT / f"ds_configs/{name}.json"
        arguments = ["--deepspeed_config", config, "--data", data, "--output-dir", tmp_path, *flags]
        return plan_run([*map(str, arguments)], {"WORLD_SIZE": "1", "RANK": "0"})

    return plan


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_is_google_s(planned, name):
    plan, (num_steps, warmup_steps, image_size, eval_resize) = planned(name), FINE_TUNING[name]
    assert (plan.optimizer.type, plan.optimizer.params) == ("SGD", {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.0})
    assert (plan.batch.global_batch, plan.ds["gradient_clipping"]) == (512, 1.0)
    assert (plan.num_steps, plan.schedule.warmup_steps, plan.image_size[0]) == (num_steps, warmup_steps, image_size)
    assert (plan.schedule.type, plan.run.label_smoothing, plan.run.drop_path) == ("cosine", 0.0, 0.0)
    assert plan.run.dropout == (DROPOUT.get(plan.spec.name, 0.0) if "_vit_" in name else 0.0)
    data = plan.run.data
    assert (data.train_crop, data.crop_scale, data.flip) == ("random", (0.05, 1.0), 0.5)
    assert (data.crop_ratio, data.mean, data.std) == ((0.75, 4 / 3), 0.5, 0.5)  # [-1, 1]; the ratio is TensorFlow's
    assert (data.interpolation, data.mixup_alpha, data.randaugment_layers) == ("bilinear", 0.0, 0)
    assert data.eval_crop == ("center" if eval_resize else "squash")
    if eval_resize:
        assert int(image_size / data.crop_fraction) == eval_resize  # as eval_crop computes it


def test_fine_tuning_files_leave_the_model_to_the_weights_and_agree_but_for_their_length():
    common = None
    for name in FINE_TUNING:
        if "_vit_" in name:
            continue
        content = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        ours = content.pop("vitds")
        assert "model" not in ours
        content["scheduler"]["params"].pop("warmup_num_steps")
        assert common in (None, content)
        common = content


def test_the_weights_say_which_model_a_fine_tuning_file_trains(planned, tmp_path):
    file = tmp_path / "R50+ViT-B_16.npz"
    with pytest.raises(WeightError) as missing:
        planned("cifar10_384_bf16", "--pretrained", file)
    assert "python tools/fetch_weights.py imagenet21k/R50-ViT-B_16" in missing.value.fix
    np.savez(file, **gen_npz.weights("tiny-hybrid", "imagenet21k"))
    plan = planned("cifar10_384_bf16", "--pretrained", file)
    assert (plan.spec.resnet, plan.spec.width, plan.image_size, plan.num_classes) == ((1, 2, 1), 32, (384, 384), 10)


def google_factor(step, warmup_steps, total_steps):
    """The factor on the learning rate as both repositories define it: a ramp multiplied onto a cosine."""
    progress = min(max((step - warmup_steps) / (total_steps - warmup_steps), 0), 1)
    return 0.5 * (1 + math.cos(math.pi * progress)) * min(1, step / warmup_steps)


@pytest.mark.parametrize("warmup_steps, total_steps", {(row[1], row[0]) for row in FINE_TUNING.values()})
def test_the_learning_rate_goes_google_s_way(warmup_steps, total_steps):
    ours = lr_factor("cosine", warmup_steps, total_steps)
    for step in range(0, total_steps + 1, 25):
        assert ours(step) == pytest.approx(google_factor(step, warmup_steps, total_steps), abs=1e-12)


def test_the_readme_gives_the_paper_s_grids_and_each_value_can_be_set(planned):
    for data, grid in GRIDS.items():
        assert re.search(rf"{data}[^|]*{re.escape(grid)}", " ".join(README.split())), (data, grid)
        for value in re.findall(r"0\.\d+", grid):
            plan = planned("imagenet_384_bf16", "--set", f"optimizer.params.lr={value}")
            assert plan.optimizer.params["lr"] == float(value)
    for model, dropout in DROPOUT.items():
        plan = planned("imagenet_384_bf16", "--model", model, "--image-size", 336, "--set", f"dropout={dropout}")
        assert plan.run.dropout == dropout
        assert re.search(rf"dropout.{{0,80}}{re.escape(model)}", README, re.DOTALL), model


def test_pre_training_is_big_vision_s(planned):
    """big_vision/configs/vit_s16_i1k.py; what differs is said in the README."""
    plan = planned(PRE_TRAINING, classes=1000, num_train=IMAGENET_COUNT)
    assert plan.spec == get_spec("ViT-S_16:pooling=gap,positions=sincos2d")
    assert (plan.image_size, plan.run.pre_logits) == ((224, 224), 384)
    assert plan.batch.global_batch == 1024
    assert plan.num_steps == math.ceil(90 * IMAGENET_COUNT / 1024) == 112_603
    assert (plan.schedule.type, plan.schedule.warmup_steps) == ("cosine", 10_000)
    assert plan.ds["gradient_clipping"] == 1.0
    # wd 1e-4 is not multiplied by the learning rate there, and is by torch; it is for kernels, which are our matrices.
    expected = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4 / 0.001}
    assert (plan.optimizer.type, plan.optimizer.params) == ("AdamW", expected)
    assert plan.run.weight_decay_on == "matrices"
    assert (plan.run.dropout, plan.run.drop_path, plan.run.label_smoothing) == (0, 0, 0)
    data = plan.run.data
    assert (data.train_crop, data.crop_scale, data.flip, data.mixup_alpha) == ("random", (0.05, 1.0), 0.5, 0.2)
    assert (data.randaugment_layers, data.randaugment_magnitude) == (2, 10)
    assert (data.eval_crop, int(224 / data.crop_fraction)) == ("center", 256)


def test_deit_iii_is_its_authors(planned):
    """facebookresearch/deit README_revenge.md, deit_small_patch16_LS on ImageNet-1k; what differs is in the README."""
    plan = planned(DEIT_III, classes=1000, num_train=IMAGENET_COUNT)
    assert (plan.spec, plan.image_size) == (get_spec("ViT-S_16"), (224, 224))
    assert plan.num_steps == math.ceil(800 * IMAGENET_COUNT / plan.batch.global_batch)
    assert plan.schedule.warmup_steps == math.floor(5 * IMAGENET_COUNT / plan.batch.global_batch)
    assert (plan.optimizer.params["weight_decay"], plan.run.weight_decay_on) == (0.05, "matrices")
    assert (plan.schedule.type, plan.run.drop_path, plan.run.dropout) == ("cosine", 0.05, 0)
    assert (plan.run.loss, plan.run.label_smoothing) == ("bce", 0)
    # Its batch of 2,048 does not hold whole thirds, which repeated augmentation of three needs.
    assert plan.batch.global_batch % 3 == 0 and abs(plan.batch.global_batch / 2048 - 1) < 0.07
    assert {key for key, source in plan.sources.items() if source == "recipe deit3"} == {
        f"vitds.{key}" for key in RECIPES["deit3"]
    }


def test_our_adamw_is_big_vision_s_adam_with_its_decay(planned):
    """p - schedule * (lr * adam(gradient) + wd * p) for kernels, without the last term for the rest."""
    plan = planned(PRE_TRAINING, num_train=IMAGENET_COUNT)
    torch.manual_seed(0)
    model = VisionTransformer(get_spec("custom:width=8,depth=1,heads=2,mlp=8,patch=4,pooling=gap"), (8, 8), 3).double()
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    params = dict(plan.optimizer.params)
    groups = parameter_groups(model, params.pop("weight_decay"), plan.run.weight_decay_on)
    optimizer = build_optimizer("AdamW", params, groups)
    factor = lr_factor("cosine", 2, 10)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.001 * factor(step)
        optimizer.zero_grad()
        cross_entropy(model(torch.randn(4, 3, 8, 8).double()), torch.tensor([0, 1, 2, 1])).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            first[name].lerp_(parameter.grad, 0.1)
            second[name].lerp_(parameter.grad**2, 0.001)
            adam = first[name] / (1 - 0.9 ** (step + 1)) / ((second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            is_kernel = name.endswith("weight") and parameter.ndim >= 2
            expected[name] -= factor(step) * (0.001 * adam + 1e-4 * is_kernel * expected[name])
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12)
