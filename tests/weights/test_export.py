"""Weights out: each target's own library gives our logits, and what it cannot compute is refused."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.layers import StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer_hybrid import HybridEmbed
from weights.reference import gen_npz

import vitds
from vitds.checkpoint import save_weights
from vitds.data.crop import eval_crop
from vitds.data.decode import Decoded
from vitds.errors import UsageError, WeightError
from vitds.model.positions import sincos2d_positions
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer
from vitds.run_config import DataConfig
from vitds.weights.export.huggingface import preprocessor_config
from vitds.weights.export.onnx import OPSET, write_onnx
from vitds.weights.export.program import write_program
from vitds.weights.export.refusal import OBSTACLES
from vitds.weights.export.target import TARGETS, description, export_weights, resized
from vitds.weights.export.timm import timm_config
from vitds.weights.load import load_weights
from vitds.weights.open import OpenWeights, open_weights
from vitds.weights_header import WeightsHeader, read_header

TINY = "custom:width=32,depth=2,heads=2,mlp=64,patch=8"
HYBRID = "custom:width=32,depth=2,heads=2,mlp=64,patch=1,resnet=1x2x1,resnet_width=32"
SMALL_HYBRID = "custom:width=32,depth=1,heads=2,mlp=64,patch=1,resnet=1x1,resnet_width=32"
CLASSES = ["cat", "dog", "crane", "crane", "тигр"]  # ImageNet, too, has two cranes
DATA = {"eval_crop": "center", "crop_fraction": 0.9, "interpolation": "bicubic", "mean": 0.4, "std": [0.2, 0.3, 0.25]}

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def weights_of(name, image_size=(32, 32), num_classes=5, pre_logits=None, data=None):
    """A model of which every parameter matters, and its weights as they come out of a run."""
    torch.manual_seed(0)
    spec = get_spec(name)
    model = VisionTransformer(spec, image_size, num_classes, pre_logits).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_gain = parameter_name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma"))
            parameter.normal_(1.0 if is_gain else 0.0, 0.2)
    classes = CLASSES if num_classes == len(CLASSES) else None
    header = WeightsHeader(spec, image_size, num_classes, pre_logits, "checkpoint", classes, data)
    return model, OpenWeights({key: tensor.numpy() for key, tensor in model.state_dict().items()}, header)


def images_for(model, batch=2):
    return torch.randn(batch, model.spec.in_channels, *model.image_size, generator=torch.Generator().manual_seed(1))


def difference(model, other, batch=2):
    """Largest difference of a logit."""
    images = images_for(model, batch)
    with torch.no_grad():
        theirs = other(images)
        return (getattr(theirs, "logits", theirs) - model(images)).abs().max()


@pytest.mark.parametrize(
    ("name", "image_size", "num_classes"),
    [
        (TINY, (32, 32), 5),
        (TINY + ",gelu=erf,resize=bicubic", (32, 32), 5),
        ("custom:width=48,depth=1,heads=3,mlp=101,patch=4", (16, 24), 5),
        (TINY + ",registers=4", (32, 32), 5),
        (TINY + ",pooling=gap,registers=2", (32, 32), 5),
        (TINY + ",pooling=gap,layer_scale=1e-05,qk_norm=true", (32, 32), 5),
        (TINY + ",pooling=map", (32, 32), 5),
        (TINY + ",pooling=map,registers=2", (32, 32), 5),
        (TINY + ",channels=1", (32, 32), 5),
        (TINY, (32, 32), 0),
    ],
)
def test_timm_gives_our_logits_by_directory_and_by_file(name, image_size, num_classes, tmp_path):
    model, weights = weights_of(name, image_size, num_classes)
    export_weights(weights, tmp_path / "out", "timm")
    assert difference(model, timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()) < 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())
    file = str(tmp_path / "out/model.safetensors")
    by_file = timm.create_model(
        config["architecture"], checkpoint_path=file, num_classes=num_classes, **config["model_args"]
    )
    assert difference(model, by_file.eval()) < 1e-5
    if num_classes:
        wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
        assert difference(model, wrapped) < 1e-5


@pytest.mark.parametrize("name", ["ViT-Ti_16", "ViT-g_14"])
def test_a_named_model_is_timms_of_that_name(name):
    header = WeightsHeader(get_spec(name), (224, 224), 1000, None, "checkpoint")
    config = timm_config(header, DataConfig())
    with torch.device("meta"):
        theirs = timm.create_model(config["architecture"], **config["model_args"])
        ours = VisionTransformer(header.spec, header.image_size, 1000)
    assert config["architecture"].split("_")[1] in ("tiny", "giant")
    assert [tuple(p.shape) for p in theirs.parameters()] == [tuple(p.shape) for p in ours.parameters()]


def test_timm_traps(tmp_path):
    model, weights = weights_of(TINY, data=DATA)
    out = tmp_path / "out"
    export_weights(weights, out, "timm")
    config = json.loads((out / "config.json").read_text())
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 5
    assert "num_classes" not in config["model_args"], "transformers passes it on, and timm would get it twice"
    assert config["label_names"] == CLASSES

    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert torch.equal(loaded.head.weight, model.head.weight), "the head is there"
    assert loaded.pretrained_cfg["label_names"] == CLASSES
    # The road that drops a head in silence, and the card that shows the other two.
    overlay = {"file": str(out / "model.safetensors"), "num_classes": 1000}
    arguments = config["model_args"] | {"num_classes": 5}
    headless = timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, **arguments
    ).eval()
    assert difference(model, headless) > 0.1
    card = (out / "README.md").read_text()
    for said in ("local-dir:", "checkpoint_path=", "act_layer='gelu_tanh'", "--format hf", "pretrained_cfg_overlay"):
        assert said in card
    # The class that takes this directory for its own and finds nothing in it.
    _, found = transformers.ViTForImageClassification.from_pretrained(out, output_loading_info=True)
    assert found["missing_keys"]


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        (TINY, (32, 32)),
        (TINY + ",gelu=erf,norm_eps=0.01", (32, 32)),
        ("custom:width=48,depth=1,heads=3,mlp=101,patch=4,channels=1", (16, 24)),
    ],
)
def test_transformers_gives_our_logits_and_nothing_is_random(name, image_size, tmp_path):
    model, weights = weights_of(name, image_size)
    export_weights(weights, tmp_path / "out", "hf")
    loaded, found = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(loaded.classifier.weight, model.head.weight)
    assert difference(model, loaded.eval()) < 1e-5
    assert read_header(tmp_path / "out").spec == get_spec(name + ",resize=bicubic")  # as it will be resized there


def test_the_pipeline_of_transformers_predicts_as_we_do(tmp_path):
    model, weights = weights_of(TINY, data={"mean": [0.4, 0.5, 0.6], "std": 0.3})
    export_weights(weights, tmp_path / "out", "hf")
    photo = load_sample_image("china.jpg").copy()
    found = transformers.pipeline("image-classification", model=str(tmp_path / "out"), top_k=5)(Image.fromarray(photo))
    pixels = eval_crop(Decoded(photo.transpose(2, 0, 1)), DataConfig(), (32, 32)) / 255
    with torch.no_grad():
        expected = model(((pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.3)[None]).softmax(-1)[0]
    order = expected.argsort(descending=True).tolist()
    assert [entry["label"] for entry in found] == [CLASSES[label] for label in order]
    assert torch.tensor([entry["score"] for entry in found]).sub(expected[order]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("data", "image_size", "timms_mean", "theirs_max"),
    [
        # Grey levels of 255. timm resizes with PIL, which now and then rounds otherwise; transformers as we do.
        (DataConfig(), (48, 64), 0.01, 1e-3),
        (DataConfig(eval_crop="center", interpolation="bicubic", mean=(0.4, 0.5, 0.6)), (48, 48), 0.01, 1e-3),
        (DataConfig(eval_crop="center", crop_fraction=1.0), (48, 48), 0.01, None),  # one pixel aside on this photo
    ],
)
def test_preprocessing_travels_along(data, image_size, timms_mean, theirs_max, tmp_path):
    header = WeightsHeader(get_spec(TINY), image_size, 5, None, "checkpoint")
    photo = load_sample_image("china.jpg").copy()
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
    ours = (eval_crop(Decoded(photo.transpose(2, 0, 1)), data, image_size) / 255 - mean) / std

    config = timm.data.resolve_data_config({}, pretrained_cfg=timm_config(header, data)["pretrained_cfg"])
    deviation = 255 * (timm.data.create_transform(**config)(Image.fromarray(photo)) - ours).abs() * std
    assert deviation.max() < 3
    assert deviation.mean() < timms_mean

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(header, data)))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(Image.fromarray(photo), return_tensors="pt")["pixel_values"][0]
    assert theirs.shape == ours.shape
    if theirs_max:
        assert (255 * (theirs - ours).abs() * std).max() < theirs_max


def test_safetensors_keep_every_bit_and_say_what_they_are(tmp_path):
    model, weights = weights_of(HYBRID + ",gelu=erf", (64, 96), pre_logits=16, data=DATA)
    out = tmp_path / "deep" / "out.safetensors"
    export_weights(weights, out, "safetensors")
    found = safetensors.torch.load_file(out)
    state = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    header = read_header(out)
    assert (header.spec.name, header.image_size, header.pre_logits) == (HYBRID + ",gelu=erf", (64, 96), 16)
    assert header.classes == CLASSES
    assert header.data == DATA
    loaded = vitds.create_model("auto", weights=out)
    assert all(torch.equal(loaded.state_dict()[key], state[key]) for key in state)


@pytest.mark.parametrize("variant", ["imagenet21k", "imagenet21k+imagenet2012", "augreg-21k"])
@pytest.mark.parametrize("model", ["tiny", "tiny-hybrid"])
def test_npz_to_checkpoint_to_npz_keeps_every_array(model, variant, tmp_path):
    arrays = gen_npz.weights(model, variant)
    np.savez(tmp_path / "in.npz", **arrays)
    weights = load_weights(tmp_path / "in.npz")  # as tools/npz_to_ds.py
    info = {"model": weights.header.spec.name, "image_size": weights.header.image_size, "classes": None}
    info |= {"num_classes": weights.header.num_classes, "pre_logits": weights.header.pre_logits}
    save_weights(tmp_path / "ds", weights.state_dict, info)
    export_weights(open_weights(tmp_path / "ds"), tmp_path / "out.npz", "npz")
    with np.load(tmp_path / "out.npz") as found:
        assert set(found.files) == set(arrays)
        for key, array in arrays.items():
            assert (found[key].shape, found[key].dtype) == (array.shape, array.dtype), key
            assert found[key].tobytes() == array.tobytes(), key
    assert read_header(tmp_path / "out.npz").classes is None


@pytest.mark.parametrize(
    ("changes", "num_classes", "pre_logits"),
    [
        (",pooling=gap", 5, None),
        (",pooling=map", 5, 16),
        (",pooling=map", 0, None),
        (",positions=sincos2d", 5, None),
        (",pooling=gap,positions=sincos2d", 5, None),
        ("", 0, None),
    ],
)
def test_npz_holds_big_visions_models_too(changes, num_classes, pre_logits, tmp_path):
    model, weights = weights_of(TINY + changes, num_classes=num_classes, pre_logits=pre_logits)
    if "sincos2d" in changes:
        table = sincos2d_positions((4, 4), 32, has_class_token="gap" not in changes)
        model.pos_embed.copy_(torch.from_numpy(table))
    export_weights(weights, tmp_path / "out.npz", "npz")
    with np.load(tmp_path / "out.npz") as found:
        assert ("Transformer/posembed_input/pos_embedding" in found) == (changes == "")
    loaded = vitds.create_model(TINY + changes, weights=tmp_path / "out.npz")
    assert loaded.image_size == (32, 32)
    assert difference(model, loaded.eval()) == 0


def test_class_names_and_preprocessing_stand_beside_an_npz(tmp_path):
    _, weights = weights_of(TINY, data=DATA)
    export_weights(weights, tmp_path / "out.npz", "npz")
    assert json.loads((tmp_path / "out.json").read_text()) == description(weights.header)
    header = read_header(tmp_path / "out.npz")
    assert (header.classes, header.data) == (CLASSES, DATA)


def test_round_all_formats_every_bit_and_name_survives(tmp_path):
    _, weights = weights_of(TINY, (32, 48), data=DATA | {"eval_crop": "squash", "crop_fraction": 1.0})
    opened = weights
    for target, name in (("timm", "a"), ("hf", "b"), ("safetensors", "c.safetensors"), ("npz", "d.npz"), ("timm", "e")):
        export_weights(opened, tmp_path / name, target)
        opened = open_weights(tmp_path / name)
        assert (opened.header.classes, opened.header.image_size) == (CLASSES, (32, 48)), target
        kept = DataConfig(**opened.header.data)
        assert (kept.eval_crop, kept.interpolation, kept.mean) == ("squash", "bicubic", 0.4), target
        assert tuple(kept.std) == (0.2, 0.3, 0.25), target
        assert opened.arrays.keys() == weights.arrays.keys(), target
        assert all(np.array_equal(opened.arrays[key], weights.arrays[key]) for key in weights.arrays), target


def test_positions_are_resized_when_asked_for(tmp_path):
    model, weights = weights_of(TINY, (32, 32))
    export_weights(resized(weights, (48, 64)), tmp_path / "out.safetensors", "safetensors")
    other = vitds.create_model("auto", weights=tmp_path / "out.safetensors")
    assert other.image_size == (48, 64)
    export_weights(weights, tmp_path / "native.safetensors", "safetensors")
    expected = vitds.create_model("auto", (48, 64), weights=tmp_path / "native.safetensors")
    assert torch.equal(other.pos_embed, expected.pos_embed)
    assert torch.equal(other.head.weight, model.head.weight)


@pytest.mark.parametrize(
    ("name", "pre_logits", "largest"),
    [(SMALL_HYBRID, 16, 2**31), ("custom:width=32,depth=1,heads=2,mlp=64,patch=8", None, 0)],
)
def test_onnx_gives_our_logits_at_any_batch(name, pre_logits, largest, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx

    model, weights = weights_of(name, pre_logits=pre_logits, data=DATA)
    path = tmp_path / "out.onnx"
    write_onnx(path, weights, description(weights.header), DataConfig(**DATA), lambda _: None, largest)
    assert (tmp_path / "out.onnx.data").exists() == (largest == 0)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 7):
        images = images_for(model, batch)
        with torch.no_grad():
            expected = model(images).numpy()
        assert np.abs(session.run(["logits"], {"images": images.numpy()})[0] - expected).max() < 1e-4
    properties = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert properties["classes"] == CLASSES
    assert properties["preprocessing"] == DATA | {"image_size": [32, 32]}
    assert properties["vitds"]["model"] == name
    assert onnx.load(path, load_external_data=False).opset_import[0].version == OPSET
    assert f"opset {OPSET}" in TARGETS["onnx"].loading[0]
    with pytest.raises(WeightError, match=r"out\.onnx  an ONNX graph, for other .*\n  give the weights that it was"):
        read_header(path)


def test_onnx_without_its_packages_is_refused(monkeypatch, tmp_path):
    _, weights = weights_of(TINY)
    monkeypatch.setattr("vitds.weights.export.onnx.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UsageError, match=r"ONNX needs onnxscript\n  pip install -e '\.\[onnx\]'"):
        export_weights(weights, tmp_path / "out.onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_torch_export_gives_our_logits_without_vitds(tmp_path):
    model, weights = weights_of(SMALL_HYBRID, pre_logits=16, data=DATA)
    export_weights(weights, tmp_path / "out.pt2", "torch-export")
    images = [images_for(model, batch) for batch in (1, 7)]
    with torch.no_grad():
        torch.save((images, [model(batch) for batch in images]), tmp_path / "expected.pt")
    code = """
import json, sys, torch
extra = {"classes.json": "", "preprocessing.json": ""}
program = torch.export.load("out.pt2", extra_files=extra).module()
images, logits = torch.load("expected.pt")
assert "vitds" not in sys.modules
difference = max((program(batch) - expected).abs().max().item() for batch, expected in zip(images, logits))
print(json.dumps([difference, *(json.loads(extra[name]) for name in ("classes.json", "preprocessing.json"))]))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    difference, classes, preprocessing = json.loads(done.stdout)
    assert difference < 1e-5
    assert classes == CLASSES
    assert preprocessing == DATA | {"image_size": [32, 32]}
    with pytest.raises(
        WeightError, match=r"out\.pt2  a program of torch\.export, for other .*\n  give the weights that"
    ):
        read_header(tmp_path / "out.pt2")


def test_programs_are_read_back(tmp_path):
    """An array of another size than was announced, as a fault of ours might have it."""
    _, weights = weights_of("custom:width=32,depth=1,heads=2,mlp=64,patch=8")
    wrong = replace(weights, arrays={**weights.arrays, "head.weight": np.zeros((4, 32), np.float32)})
    about = description(weights.header), DataConfig(), lambda _: None
    told = r"differs from what was written\n  head.weight: \d+ bytes"
    with pytest.raises(WeightError, match=told):
        write_program(tmp_path / "out.pt2", wrong, *about)
    pytest.importorskip("onnxscript")
    for largest in (2**31, 0):
        with pytest.raises(WeightError, match=told):
            write_onnx(tmp_path / "out.onnx", wrong, *about, largest)


def reference_model(name, variant, directory):
    """Google's reference weights, and the images that belong to them."""
    np.savez(directory / "w.npz", **gen_npz.weights(name, variant))
    model = vitds.create_model("auto", weights=directory / "w.npz").eval()
    return model, torch.from_numpy(gen_npz.normalise(gen_npz.images(model.image_size[0]))).permute(0, 3, 1, 2)


def without(part, model):
    """Two models on the same weights: one with `part`, and one with the target's habit in its place."""
    spec, state = model.spec, model.state_dict()
    plain = VisionTransformer(replace(spec, **PLAIN.get(part, {})), model.image_size, model.num_classes).eval()
    if part in ("pre_logits", "norm_eps", "gelu erf"):
        plain.load_state_dict({key: tensor for key, tensor in state.items() if "pre_logits" not in key})
        return model, plain
    whole = VisionTransformer(replace(spec, **WITH[part]), model.image_size, model.num_classes).eval()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name in state:
                parameter.copy_(state[name][:, -parameter.shape[1] :] if name == "pos_embed" else state[name])
            else:
                kind = "scale" if parameter.ndim == 1 and not name.endswith("bias") else "normal"
                parameter.copy_(torch.from_numpy(gen_npz.tensor("tiny", part, name, parameter.shape, kind, 0.2)))
        if "pooling" in part:
            state["cls_token"].zero_()
            state["pos_embed"][:, 0].zero_()
    plain.load_state_dict(state)
    return whole, plain


PLAIN = {"norm_eps": {"norm_eps": 1e-5}, "gelu erf": {"gelu": "erf"}}
WITH = {
    "registers": {"registers": 4},
    "layer_scale": {"layer_scale": 1.0},
    "qk_norm": {"qk_norm": True},
    "pooling gap": {"pooling": "gap"},
    "pooling map": {"pooling": "map"},
}


def timms_hybrid(directory):
    """timm's hybrid with Google's arrays, as close as its arguments bring it."""
    stem = ResNetV2(
        (1, 2, 1), (128, 256, 512), 0, global_pool="", preact=False, stem_type="same", stem_chs=32,
        conv_layer=StdConv2dSame,
    )  # fmt: skip
    sizes = {"patch_size": 1, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 10}
    embed = partial(HybridEmbed, backbone=stem)
    model = timm.models.VisionTransformer(img_size=96, embed_layer=embed, act_layer="gelu_tanh", **sizes)
    model.load_pretrained(directory / "w.npz")
    return model.eval()


TOLD = [(part, one.deviation) for parts in OBSTACLES.values() for part, one in parts.items()]
MEASURED = sorted({(part, deviation) for part, deviation in TOLD if deviation})


@pytest.mark.parametrize(("part", "deviation"), MEASURED)
def test_the_deviations_that_are_told_are_the_measured_ones(part, deviation, tmp_path):
    variant = "imagenet21k" if part == "pre_logits" else "augreg-1k"
    model, images = reference_model("tiny-hybrid" if part == "hybrid" else "tiny", variant, tmp_path)
    whole, other = (model, timms_hybrid(tmp_path)) if part == "hybrid" else without(part, model)
    with torch.no_grad():
        measured = (whole(images) - other(images)).abs().max().item()
    assert deviation / 1.5 < measured < deviation * 1.5


REFUSED = [
    ("timm", HYBRID, {}, "hybrid"),
    ("timm", TINY, {"pre_logits": 32}, "pre_logits"),
    ("timm", TINY + ",norm_eps=1e-5", {}, "norm_eps"),
    ("hf", HYBRID, {}, "hybrid"),
    ("hf", TINY, {"num_classes": 0}, "no head"),
    ("hf", TINY, {"pre_logits": 32}, "pre_logits"),
    ("hf", TINY + ",registers=1", {}, "registers"),
    ("hf", TINY + ",layer_scale=1e-05", {}, "layer_scale"),
    ("hf", TINY + ",qk_norm=true", {}, "qk_norm"),
    ("hf", TINY + ",pooling=gap", {}, "pooling gap"),
    ("hf", TINY + ",pooling=map", {}, "pooling map"),
    ("hf", TINY, {"image_size": (32, 64), "data": DATA}, "centre crop"),
    ("npz", TINY + ",gelu=erf", {}, "gelu erf"),
    ("npz", TINY + ",norm_eps=1e-5", {}, "norm_eps"),
    ("npz", TINY + ",registers=1", {}, "registers"),
    ("npz", TINY + ",layer_scale=1e-05", {}, "layer_scale"),
    ("npz", TINY + ",qk_norm=true", {}, "qk_norm"),
]


@pytest.mark.parametrize(("target", "name", "arguments", "part"), REFUSED)
def test_what_a_target_cannot_compute_is_refused_by_name(target, name, arguments, part, tmp_path):
    _, weights = weights_of(name, **arguments)
    with pytest.raises(UsageError) as caught:
        export_weights(weights, tmp_path / ("out" + ".npz" * (target == "npz")), target)
    told = str(caught.value)
    assert f"cannot be exported to {target}" in told
    assert f"\n  {part}: " in told
    deviation = OBSTACLES[target][part].deviation
    assert deviation is None or f"off by {deviation:g}" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "name", "pre_logits", "others"),
    [
        ("timm", HYBRID, 16, "safetensors, npz, onnx, torch-export"),
        ("npz", TINY + ",registers=1", None, "safetensors, timm, onnx, torch-export"),
        ("npz", TINY + ",gelu=erf", None, "safetensors, timm, hf, onnx, torch-export"),
    ],
)
def test_a_refusal_names_the_formats_that_hold_the_model(target, name, pre_logits, others, tmp_path):
    _, weights = weights_of(name, pre_logits=pre_logits)
    with pytest.raises(UsageError, match=f"formats that hold it: {others}$"):
        export_weights(weights, tmp_path / ("out" + ".npz" * (target == "npz")), target)


def test_every_refusal_is_tested():
    assert OBSTACLES.keys() == TARGETS.keys()
    assert {(target, part) for target, parts in OBSTACLES.items() for part in parts} == {
        (target, part) for target, _, _, part in REFUSED
    }


@pytest.mark.parametrize("target", ["safetensors", "timm", "hf", "npz"])
def test_a_missing_or_an_extra_parameter_is_named_and_nothing_stays(target, tmp_path):
    _, weights = weights_of(TINY)
    out = tmp_path / ("out" + {"safetensors": ".safetensors", "npz": ".npz"}.get(target, ""))
    arrays = dict(weights.arrays)
    arrays["head.wait"] = arrays.pop("head.weight")
    with pytest.raises(WeightError, match=r"extra head.wait\n  missing head.weight"):
        export_weights(replace(weights, arrays=arrays), out, target)
    wrong = dict(weights.arrays) | {"norm.bias": np.zeros(7, np.float32)}
    with pytest.raises(WeightError, match=r"norm.bias has shape \(7,\), expected \(32,\)"):
        export_weights(replace(weights, arrays=wrong), out, target)
    diverged = dict(weights.arrays) | {"norm.bias": np.full(32, np.inf, np.float32)}
    with pytest.raises(WeightError, match=r"norm.bias holds a NaN or an infinity"):
        export_weights(replace(weights, arrays=diverged), out, target)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path):
    _, weights = weights_of(TINY)

    def interrupt(_):
        raise KeyboardInterrupt

    for target, name in (("timm", "out"), ("safetensors", "out.safetensors"), ("npz", "out.npz")):
        with pytest.raises(KeyboardInterrupt):
            export_weights(weights, tmp_path / name, target, interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, r"No space left on device\n  [\d.]+ GiB are free there; nothing was left behind"),
        (errno.EACCES, r"Permission denied\n  nothing was left behind"),  # room is not what it lacks
    ],
)
def test_a_place_that_cannot_be_written_is_said_with_its_room_where_that_is_the_matter(tmp_path, code, fix):
    _, weights = weights_of(TINY)

    def fail(_):
        raise OSError(code, os.strerror(code))

    with pytest.raises(WeightError, match=rf"cannot be written: {fix}$"):
        export_weights(weights, tmp_path / "out", "timm", fail)
    assert not list(tmp_path.iterdir())


def test_other_peoples_files_stay(tmp_path):
    _, weights = weights_of(TINY)
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(UsageError, match=r"out.json  exists"):
        export_weights(weights, tmp_path / "out.npz", "npz")
    with pytest.raises(UsageError, match=r"name it out\.onnx"):
        export_weights(weights, tmp_path / "out", "onnx")
    Path(tmp_path / "dir").mkdir()
    with pytest.raises(UsageError, match="exists"):
        export_weights(weights, tmp_path / "dir", "hf")
    assert (tmp_path / "out.json").read_text() == "mine"


@pytest.mark.parametrize(("target", "name"), [("hf", "out"), ("npz", "out.npz"), ("npz", "out.json")])
def test_what_appears_meanwhile_stays(target, name, tmp_path, monkeypatch):
    _, weights = weights_of(TINY)
    monkeypatch.setattr("vitds.weights.export.target._check_written", lambda *_: (tmp_path / name).write_text("mine"))
    monkeypatch.setattr("vitds.weights.export.target.check_place", lambda *_: None)  # it looks too early
    with pytest.raises(WeightError, match="cannot be written: File exists"):
        export_weights(weights, tmp_path / ("out" if target == "hf" else "out.npz"), target)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]
