from __future__ import annotations

import subprocess
import sys

import pytest

from vitds.errors import ConfigError
from vitds.model.registry import (
    MODELS,
    ModelSpec,
    get_spec,
    grid_size,
    named,
    num_parameters,
    pixels_per_token,
    split_name,
)

CUSTOM = "custom:width=64,depth=4,heads=4,mlp=128,patch=4"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ViT-B_16", 86_567_656),
        ("ViT-B_32", 88_224_232),
        ("ViT-L_16", 304_326_632),
        ("ViT-L_32", 306_535_400),
        ("ViT-H_14", 632_045_800),
        ("R50-ViT-B_16", 98_659_112),
        ("ViT-Ti_16", 5_717_416),
        ("ViT-S_16", 22_050_664),
        ("ViT-S_32", 22_878_952),
        # timm 1.0.31's counts of the same architectures
        ("ViT-B_8", 86_576_872),
        ("ViT-g_14", 1_012_611_432),
        ("ViT-G_14", 1_844_440_680),
        ("R-ViT-Ti_16", 6_337_704),
        ("R26-ViT-S_32", 36_431_912),
        ("R50-ViT-L_32", 328_994_856),
    ],
)
def test_num_parameters_of_published_models(name, count):
    assert num_parameters(get_spec(name), 224, 1000) == count


def test_num_parameters_at_other_sizes_and_heads():
    assert num_parameters(get_spec("ViT-B_16"), 384, 1000) == 86_859_496
    assert num_parameters(get_spec("ViT-L_16"), (224, 224), 100) == 303_404_132
    assert num_parameters(get_spec("ViT-H_14"), 224, 21843, pre_logits=1280) == 660_385_363
    assert num_parameters(get_spec("R50-ViT-B_16"), 224, 21843, pre_logits=768) == 115_277_971


def test_every_name_of_the_table_finds_itself():
    assert len(MODELS) == 16
    for name, spec in MODELS.items():
        assert get_spec(name) == spec == named(spec)
        assert spec.width % spec.heads == 0
    assert get_spec("R50+ViT-B_16") is MODELS["R50-ViT-B_16"]


@pytest.mark.parametrize(
    "name",
    [
        CUSTOM,
        CUSTOM + ",pooling=map,registers=4,layer_scale=1e-05,qk_norm=true,channels=1,gelu=erf",
        "custom:width=32,depth=2,heads=2,mlp=64,patch=1,resnet=1x2x1,resnet_width=32",
        "custom:width=32,depth=2,heads=2,mlp=64,patch=8,resnet=0",
    ],
)
def test_custom_names_round_trip(name):
    spec = get_spec(name)
    assert spec.name == name
    assert get_spec(spec.name) == spec == named(spec)


@pytest.mark.parametrize(
    ("name", "canonical", "fields"),
    [
        ("ViT-B_16:timm", "ViT-B_16:gelu=erf,resize=bicubic", {"gelu": "erf", "resize": "bicubic"}),
        ("ViT-B_16:resize=bicubic, gelu=erf", "ViT-B_16:gelu=erf,resize=bicubic", {"gelu": "erf", "resize": "bicubic"}),
        ("R50+ViT-B_16:norm_eps=1e-12", "R50-ViT-B_16:norm_eps=1e-12", {"norm_eps": 1e-12}),
        ("ViT-B_16:gelu=tanh,registers=0", "ViT-B_16", {}),
        (CUSTOM + ",norm_eps=1e-06,resize=bicubic", CUSTOM + ",resize=bicubic", {"resize": "bicubic"}),
    ],
)
def test_modifiers_are_part_of_the_name(name, canonical, fields):
    spec = get_spec(name)
    assert spec.name == canonical
    assert get_spec(canonical) == spec == named(spec)
    base = get_spec(split_name(canonical)[0]) if not name.startswith("custom") else get_spec(CUSTOM)
    assert {key: getattr(spec, key) for key in vars(spec) if getattr(spec, key) != getattr(base, key)} == (
        fields | ({"name": canonical} if fields else {})
    )


def test_custom_name_is_canonical_and_means_what_it_says():
    spec = get_spec("custom: patch=4, mlp=128, registers=0, heads=4, depth=4, width=64")
    assert spec.name == CUSTOM
    assert spec == ModelSpec(CUSTOM, width=64, depth=4, heads=4, mlp=128, patch_size=4)
    assert get_spec(CUSTOM + ",resnet=0").resnet == ()
    assert get_spec(CUSTOM + ",resnet=3x4x9").resnet == (3, 4, 9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-16", 'unknown model "ViT-B-16"\n  did you mean "ViT-B_16"?'),
        ("vit_b16", 'did you mean "ViT-B_16"?'),
        ("ResNet", "valid names: ViT-Ti_16, "),
        (CUSTOM.replace("depth", "dept"), 'unknown key "dept"'),
        (CUSTOM.replace("width=64", "width=65"), "width 65 is not divisible by 4 heads"),
        (CUSTOM.replace("mlp=128", "mlp=lots"), 'mlp="lots"'),
        (CUSTOM.replace("patch=4", "patch=0"), "patch is a positive integer"),
        (CUSTOM + ",pooling=max", "token, gap or map"),
        (CUSTOM + ",layer_scale=nan", "layer_scale is a number"),
        (CUSTOM + ",width=32", '"width" appears twice'),
        (CUSTOM + ",resnet=3x4x9,resnet_width=48", "divisible by 32"),
        (CUSTOM + ",resnet=3xx9", "units per stage"),
        ("custom:width=64,heads=4,patch=4", "lacks depth, mlp"),
        ("custom:", 'unknown key ""'),
        ("vit_base_patch16_224", 'did you mean "ViT-B_16"?'),
        ("google/vit-large-patch32-384", 'did you mean "ViT-L_32"?'),
        ("vit_h_14", 'did you mean "ViT-H_14"?'),
        ("vit_giant_patch14_dinov2", 'did you mean "ViT-g_14"?'),
        ("vit_gigantic_patch14_clip_224", 'did you mean "ViT-G_14"?'),
        ("ViT-B16:gelu=erf", 'unknown model "ViT-B16"\n  did you mean "ViT-B_16"?'),
        ("ViT-B_16:gleu=erf", 'unknown key "gleu" in model "ViT-B_16:gleu=erf"\n  did you mean "gelu"?'),
        ("ViT-B_16:width=64", '"width" of ViT-B_16 is fixed'),
        ("ViT-B_16:timm,registers=4", 'unknown key "timm"'),
        ("ViT-B_16:norm_eps=0", "norm_eps is a positive number"),
        ("ViT-B_16:resize=nearest", "resize is bilinear or bicubic"),
    ],
)
def test_bad_names_are_explained(name, message):
    with pytest.raises(ConfigError) as error:
        get_spec(name)
    assert message in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "pixels"),
    [("ViT-B_16", 16), ("ViT-H_14", 14), ("R50-ViT-B_16", 16), ("R26-ViT-S_32", 32), ("R-ViT-Ti_16", 32)],
)
def test_pixels_per_token(name, pixels):
    assert pixels_per_token(get_spec(name)) == pixels


def test_grid_size():
    assert grid_size(get_spec("ViT-B_16"), (224, 384)) == (14, 24)
    with pytest.raises(ConfigError, match="225 is not divisible by its 16 pixels per token") as error:
        grid_size(get_spec("ViT-B_16"), (224, 225))
    assert "224 or 240 instead of 225" in str(error.value)
    with pytest.raises(ConfigError, match="nearest valid: 32 instead of 8"):
        grid_size(get_spec("ViT-B_32"), (8, 8))


def test_registry_imports_no_torch():
    code = "import sys, vitds.model.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
