"""Weights that others wrote compute here what they compute there: timm and transformers are the oracles."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from vitds import create_model
from vitds.checkpoint import save_weights
from vitds.errors import WeightError
from vitds.layouts.files import ArrayFile
from vitds.layouts.google import google_layout
from vitds.layouts.own import parameters
from vitds.layouts.recognise import recognise
from vitds.model.registry import get_spec
from vitds.weights.load import load_weights
from vitds.weights_header import read_header

BOUND = 1e-5
SMALL = {"depth": 2, "embed_dim": 128, "num_heads": 2, "patch_size": 16, "img_size": 64}
DINOV2 = SMALL | {"num_classes": 0, "num_heads": 4}


def randomised(model):
    """Every parameter of its own size, so that none can be left out or taken for another without being seen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = (
                0.3 if parameter.ndim < 2 or "token" in name or "pos" in name else 0.6 * parameter.shape[-1] ** -0.5
            )
            is_norm_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator) + is_norm_scale)
    return model.eval()


def images(height_width, num=2):
    return torch.randn(num, 3, *height_width, generator=torch.Generator().manual_seed(1))


def features(model, height_width):
    """timm's features, before the head."""
    with torch.no_grad():
        return model.forward_head(model.forward_features(images(height_width)), pre_logits=True)


def ours(path, height_width, name="auto"):
    model = create_model(name, image_size=height_width, weights=path).eval()
    with torch.no_grad():
        return model.features(images(height_width))


def farthest(a, b):
    assert b.std() > 0.1, "the oracle says nothing"
    return (a - b).abs().max().item()


CASES = {
    "ViT": ("vit_base_patch16_224", {}, "auto"),
    "DeiT III": ("deit3_base_patch16_224", {}, "auto"),
    "DINOv2": ("vit_base_patch14_dinov2", {"num_classes": 0}, "auto"),
    "DINOv2 with registers": ("vit_base_patch14_reg4_dinov2", {"num_classes": 0}, "auto"),
    "SigLIP": ("vit_base_patch16_siglip_224", {"num_classes": 0}, "auto"),
    "SigLIP 2": ("vit_base_patch32_siglip_256", {"num_classes": 0}, "auto:gelu=tanh"),
    "SigLIP gap": ("vit_base_patch16_siglip_gap_224", {}, "auto"),
    "registers with positions": ("vit_base_patch16_224", {"reg_tokens": 4}, "auto"),
    "registers, averaged": (
        "vit_base_patch16_224",
        {"reg_tokens": 3, "class_token": False, "global_pool": "avg", "fc_norm": False},
        "auto",
    ),
    "normed q and k, no bias": ("vit_base_patch16_224", {"qk_norm": True, "qkv_bias": False}, "auto"),
}


@pytest.mark.parametrize("case", CASES)
def test_features_equal_timms_at_every_size_from_every_file(case, tmp_path):
    architecture, arguments, name = CASES[case]
    model = randomised(timm.create_model(architecture, **SMALL | {"num_classes": 5} | arguments))
    save_for_hf(model, tmp_path / "directory", safe_serialization=True)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    save_file(model.state_dict(), tmp_path / "w.safetensors")

    assert farthest(ours(tmp_path / "w.pth", (64, 64), name), features(model, (64, 64))) < BOUND
    for size in ((96, 96), (32, 80)):
        resized = timm.create_model(f"local-dir:{tmp_path / 'directory'}", pretrained=True, img_size=size).eval()
        assert farthest(ours(tmp_path / "w.pth", size, name), features(resized, size)) < BOUND
    if model.num_classes:
        logits = create_model("auto", weights=tmp_path / "directory").eval()(images((64, 64)))
        assert farthest(logits, model(images((64, 64)))) < BOUND

    from_file = load_weights(tmp_path / "w.pth", name)
    for path in (tmp_path / "w.safetensors", tmp_path / "directory", tmp_path / "directory" / "model.safetensors"):
        loaded = load_weights(path, name if path.name == "w.safetensors" else None)
        assert loaded.header.spec.gelu == from_file.header.spec.gelu  # a directory says it by its architecture
        assert all(torch.equal(loaded.state_dict[key], value) for key, value in from_file.state_dict.items())


def test_the_names_of_deit_iii_mae_dinov2_and_open_clip(tmp_path):
    """What the authors' own files add to timm's names, or call otherwise."""
    path = tmp_path / "w.pth"

    deit = randomised(timm.create_model("deit3_base_patch16_224", **SMALL, num_classes=5))
    state = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in deit.state_dict().items()
    }
    torch.save({"model": state}, path)
    assert farthest(ours(path, (64, 64)), features(deit, (64, 64))) < BOUND

    mae = randomised(timm.create_model("vit_base_patch16_224", **SMALL, num_classes=0))
    decoder = {"decoder_embed.weight": torch.ones(8, 128), "decoder_pos_embed": torch.ones(1, 17, 8)}
    torch.save({"model": mae.state_dict() | decoder | {"mask_token": torch.ones(1, 1, 8)}}, path)
    assert farthest(ours(path, (64, 64)), features(mae, (64, 64))) < BOUND
    assert create_model("auto", weights=path, num_classes=3).head.weight.shape == (3, 128)

    siglip = randomised(timm.create_model("vit_base_patch16_siglip_224", **SMALL, num_classes=0))
    towers = {f"visual.trunk.{key}": value for key, value in siglip.state_dict().items()}
    torch.save(towers | {"text.positional_embedding": torch.ones(3, 4), "logit_scale": torch.ones(())}, path)
    assert farthest(ours(path, (96, 32)), features(_resized(siglip, "vit_base_patch16_siglip_224"), (96, 32))) < BOUND
    notes = " ".join(read_header(path).notes)
    assert 'outside of "visual.trunk." are left out: text.positional_embedding, logit_scale' in notes


def _resized(model, architecture, size=(96, 32)):
    arguments = SMALL | {"num_classes": 0, "img_size": size}
    overlay = {"state_dict": model.state_dict(), "num_classes": 0}
    return timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2s_own_files_whole_and_in_chunks(registers, tmp_path):
    architecture = "vit_base_patch14_reg4_dinov2" if registers else "vit_base_patch14_dinov2"
    state = randomised(timm.create_model(architecture, **DINOV2)).state_dict() | {"mask_token": torch.ones(1, 128)}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 128), state["pos_embed"]], dim=1)
    torch.save(state, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 0}
    for size in ((64, 64), (48, 96)):
        arguments = DINOV2 | {"img_size": size}
        oracle = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
        name = f"custom:width=128,depth=2,heads=4,mlp=512,patch=16,layer_scale=1,registers={registers}"
        assert farthest(ours(tmp_path / "w.pth", size, name), features(oracle, size)) < BOUND

    chunked = {
        key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v for key, v in state.items()
    }
    torch.save({"teacher": {f"backbone.{key}": value for key, value in chunked.items()}}, tmp_path / "chunks.pth")
    whole, chunks = (load_weights(tmp_path / name).state_dict for name in ("w.pth", "chunks.pth"))
    assert whole.keys() == chunks.keys()
    assert all(torch.equal(whole[key], chunks[key]) for key in whole)


def test_a_timm_directory_tells_more_than_arrays(tmp_path):
    arguments = SMALL | {"num_heads": 4, "img_size": (48, 80), "act_layer": "gelu_tanh", "num_classes": 3}
    model = randomised(timm.create_model("vit_base_patch16_224", **arguments))
    save_for_hf(model, tmp_path, safe_serialization=True, model_config={"label_names": ["a", "b", "c"]})
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.2, 0.2],
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    header = read_header(tmp_path)
    assert (header.image_size, header.classes, header.spec.heads) == ((48, 80), ["a", "b", "c"], 4)
    assert header.spec.gelu == "tanh" and header.spec.resize == "bicubic"
    expected = {"mean": (0.4, 0.5, 0.6), "std": 0.2, "interpolation": "bicubic", "crop_fraction": 0.9}
    assert header.data == expected | {"eval_crop": "center"}
    assert farthest(ours(tmp_path, (48, 80)), features(model, (48, 80))) < BOUND

    for change, message in [
        ({"act_layer": "quick_gelu"}, 'act_layer "quick_gelu"'),
        ({"pre_norm": True}, "pre_norm=True"),
        ({"global_pool": "avg"}, 'global_pool "avg"'),
        ({"norm_layer": "rmsnorm"}, "norm_layer='rmsnorm'"),
        ({"a_new_argument": 1}, "a_new_argument=1"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": config["model_args"] | change}))
        with pytest.raises(WeightError, match="not supported") as caught:
            read_header(tmp_path)
        assert message in caught.value.what and caught.value.where == str(tmp_path)
    for text, message in [("[1]", "no JSON object"), ("{", "as JSON"), ("{}", 'no "architecture"')]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightError, match=message):
            read_header(tmp_path)


def test_every_architecture_of_timm_is_read_as_it_is_or_refused():
    """By shapes alone: one architecture of each family at its full width."""
    families = (
        "vit_tiny_patch16_224 vit_huge_patch14_224 vit_giant_patch14_224 vit_gigantic_patch14_224 "
        "vit_medium_patch16_gap_240 vit_base_patch16_gap_224 vit_so400m_patch14_siglip_224 "
        "vit_so400m_patch14_siglip_gap_224 vit_giantopt_patch16_siglip_256 vit_large_patch16_siglip_512 "
        "vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 vit_so400m_patch14_reg1_tipsv2 deit_tiny_patch16_224 "
        "deit3_small_patch16_384 flexivit_small vit_so400m_patch16_siglip_256"
    )
    for architecture in families.split():
        with torch.device("meta"):
            model = timm.create_model(architecture, depth=1)
        config = {"architecture": architecture, "pretrained_cfg": {"input_size": (3, *model.patch_embed.img_size)}}
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        found = recognise(ArrayFile("torch", shapes, {}, [], {}), config)
        block = model.blocks[0]
        activation = (
            "erf" if isinstance(block.mlp.act, torch.nn.GELU) and block.mlp.act.approximate == "none" else "tanh"
        )
        assert (found.spec.heads, found.spec.gelu) == (block.attn.num_heads, activation), architecture
        assert found.spec.norm_eps == block.norm1.eps
        grid = tuple(side // found.spec.patch_size for side in found.image_size)
        assert grid == tuple(model.patch_embed.grid_size)
        assert {array.key for array in found.arrays} - {""} == shapes.keys()  # without a bias there is no key


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("vit_small_patch16_dinov3", "DINOv3"),
        ("eva02_base_patch14_224", "EVA-02"),
        ("eva02_tiny_patch14_224", "EVA-02: biases"),
        ("beit_base_patch16_224", "BEiT"),
        ("swin_tiny_patch4_window7_224", "Swin"),
        ("convnext_tiny", "ConvNeXt"),
        ("resnet18", "ResNet"),
        ("vit_base_patch16_clip_224", "CLIP"),
        ("vit_pe_core_base_patch16_224", "PE"),
        ("vit_base_patch16_xp_224", "parallel blocks"),
        ("deit_tiny_distilled_patch16_224", "distilled DeiT"),
        ("vit_giant_patch14_dinov2", "SwiGLU"),
        ("vit_base_r50_s16_224", "timm's hybrid"),
        ("eva_large_patch14_196", "fc_norm"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(architecture, told):
    with torch.device("meta"):
        model = timm.create_model(architecture, **{"depth": 1} if "patch1" in architecture else {})
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    with pytest.raises(WeightError, match="not supported") as caught:
        recognise(ArrayFile("torch", shapes, {}, [], {}))
    assert told in caught.value.what
    assert caught.value.exit_code == 4


HF = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 48,
    "patch_size": 16,
    "id2label": {0: "cat", 1: "dog", 2: "owl"},
}


@pytest.mark.parametrize(
    ("activation", "ours_called", "epsilon", "bias"),
    [("gelu", "erf", 1e-12, True), ("gelu_pytorch_tanh", "tanh", 1e-6, False), ("gelu_new", "tanh", 1e-6, True)],
)
def test_logits_equal_hugging_faces(activation, ours_called, epsilon, bias, tmp_path):
    config = ViTConfig(**HF, hidden_act=activation, layer_norm_eps=epsilon, qkv_bias=bias)
    model = randomised(ViTForImageClassification(config))
    with torch.no_grad():
        for parameter in model.vit.embeddings.parameters():
            parameter.mul_(1e-3)  # so that the first norm's variance is about the epsilon of 1e-6
    model.save_pretrained(tmp_path)
    preprocessor = {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.5, 0.5], "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    header = read_header(tmp_path)
    assert (header.spec.gelu, header.spec.norm_eps, header.classes) == (ours_called, epsilon, ["cat", "dog", "owl"])
    assert header.data == {"mean": (0.4, 0.5, 0.6), "std": 0.5, "interpolation": "bicubic", "eval_crop": "squash"}
    with torch.no_grad():
        logits = create_model("auto", weights=tmp_path).eval()(images((48, 48)))
        assert farthest(logits, model(images((48, 48))).logits) < BOUND


def test_hugging_face_directories_in_all_their_shapes(tmp_path):
    config = ViTConfig(**HF)
    model = randomised(ViTForImageClassification(config))
    model.save_pretrained(tmp_path / "whole")
    expected = load_weights(tmp_path / "whole").state_dict

    model.save_pretrained(tmp_path / "pieces", max_shard_size="50KB")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 1
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")  # names as in memory
    (tmp_path / "pickled" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    for name in ("pieces", "pickled", "whole/model.safetensors", "pickled/pytorch_model.bin"):
        found = load_weights(tmp_path / name).state_dict
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name

    bare = randomised(ViTModel(config))
    bare.save_pretrained(tmp_path / "bare")
    header = read_header(tmp_path / "bare")
    assert header.num_classes == 0 and "a pooler is left out" in header.notes[0]
    with torch.no_grad():
        oracle = bare(images((48, 48))).last_hidden_state[:, 0]
    assert farthest(ours(tmp_path / "bare", (48, 48)), oracle) < BOUND

    shard = next((tmp_path / "pieces").glob("*00002*"))
    shard.unlink()
    with pytest.raises(WeightError, match="cannot be read") as caught:
        read_header(tmp_path / "pieces")
    assert str(shard) == caught.value.where
    for change, message in [({"hidden_act": "relu"}, 'hidden_act "relu"'), ({"model_type": "dinov2"}, "dinov2")]:
        described = json.loads((tmp_path / "whole" / "config.json").read_text()) | change
        (tmp_path / "whole" / "config.json").write_text(json.dumps(described))
        with pytest.raises(WeightError, match="not supported") as caught:
            read_header(tmp_path / "whole")
        assert message in caught.value.what


def test_what_a_config_of_hugging_face_leaves_out_is_transformers_default(tmp_path):
    model = ViTModel(ViTConfig(**HF | {"hidden_size": 96}))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_header(tmp_path).spec.heads == ViTConfig().num_attention_heads == 12

    ViTForImageClassification(ViTConfig(**HF)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for names, classes in [(["a", "b", "c"], ["a", "b", "c"]), (["a", None, "c"], None)]:
        (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": dict(enumerate(names))}))
        assert read_header(tmp_path).classes == classes
    for labels in ({"0": "a", "1": "b", "3": "c"}, {"0": "a"}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": labels}))
        assert read_header(tmp_path).classes is None


def vit_pytorch_state(width=64, mlp=96, depth=2, classes=3, grid=3, patch=8):
    """A state dict with the names of jeonsworld/ViT-pytorch, and random values."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "transformer.embeddings.position_embeddings": (1, 1 + grid * grid, width),
        "transformer.embeddings.cls_token": (1, 1, width),
        "transformer.embeddings.patch_embeddings.weight": (width, 3, patch, patch),
        "transformer.embeddings.patch_embeddings.bias": (width,),
        "transformer.encoder.encoder_norm.weight": (width,),
        "transformer.encoder.encoder_norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    for i in range(depth):
        block = f"transformer.encoder.layer.{i}"
        for norm in ("attention_norm", "ffn_norm"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for part in ("query", "key", "value", "out"):
            shapes |= {f"{block}.attn.{part}.weight": (width, width), f"{block}.attn.{part}.bias": (width,)}
        shapes |= {f"{block}.ffn.fc1.weight": (mlp, width), f"{block}.ffn.fc1.bias": (mlp,)}
        shapes |= {f"{block}.ffn.fc2.weight": (width, mlp), f"{block}.ffn.fc2.bias": (width,)}
    return {
        key: (0.6 * shape[-1] ** -0.5 if len(shape) > 1 else 0.3) * torch.randn(shape, generator=generator)
        for key, shape in shapes.items()
    }


def vit_pytorch_logits(state, x, heads, depth=2):
    """What its modeling.py computes, from the paper's formulas: erf GELU, LayerNorm with epsilon 1e-6."""

    def dense(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    patches = "transformer.embeddings.patch_embeddings"
    kernel = state[f"{patches}.weight"]
    x = F.conv2d(x, kernel, state[f"{patches}.bias"], stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state["transformer.embeddings.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + state["transformer.embeddings.position_embeddings"]
    for i in range(depth):
        block = f"transformer.encoder.layer.{i}"
        y = norm(x, f"{block}.attention_norm")
        q, k, v = (dense(y, f"{block}.attn.{part}").unflatten(-1, (heads, -1)) for part in ("query", "key", "value"))
        attention = (torch.einsum("bqnk,btnk->bnqt", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + dense(torch.einsum("bnqt,btnk->bqnk", attention, v).flatten(2), f"{block}.attn.out")
        y = dense(norm(x, f"{block}.ffn_norm"), f"{block}.ffn.fc1")
        x = x + dense(y * 0.5 * (1 + torch.erf(y / 2**0.5)), f"{block}.ffn.fc2")
    return dense(norm(x, "transformer.encoder.encoder_norm")[:, 0], "head")


def test_logits_equal_vit_pytorchs(tmp_path):
    state = vit_pytorch_state()
    torch.save(state, tmp_path / "run_checkpoint.bin")
    name = "custom:width=64,depth=2,heads=4,mlp=96,patch=8"
    header = read_header(tmp_path / "run_checkpoint.bin", name)
    assert (header.spec.gelu, header.spec.resize, header.image_size) == ("erf", "bilinear", (24, 24))
    assert header.data["mean"] == 0.5 and header.notes == ()
    model = create_model(name, weights=tmp_path / "run_checkpoint.bin").eval()
    with torch.no_grad():
        logits = model(images((24, 24)))
    assert farthest(logits, vit_pytorch_logits(state, images((24, 24)), heads=4)) < BOUND


def test_a_hybrid_of_vit_pytorch_is_read_as_googles(tmp_path):
    state = vit_pytorch_state(grid=2, patch=1)
    stem = "transformer.embeddings.hybrid_model"
    state["transformer.embeddings.patch_embeddings.weight"] = torch.randn(64, 512, 1, 1)
    state |= {f"{stem}.root.conv.weight": torch.randn(32, 3, 7, 7)}
    state |= {f"{stem}.root.gn.weight": torch.randn(32), f"{stem}.root.gn.bias": torch.randn(32)}
    channels = 32
    for stage, units in enumerate((1, 2, 1)):
        inner = 32 * 2**stage
        for unit in range(units):
            name = f"{stem}.body.block{stage + 1}.unit{unit + 1}"
            convolutions = [("conv1", "gn1", inner, channels, 1), ("conv2", "gn2", inner, inner, 3)]
            convolutions += [("conv3", "gn3", 4 * inner, inner, 1)]
            convolutions += [("downsample", "gn_proj", 4 * inner, channels, 1)] * (unit == 0)
            for conv, norm, num_out, num_in, size in convolutions:
                state[f"{name}.{conv}.weight"] = torch.randn(num_out, num_in, size, size)
                state |= {f"{name}.{norm}.weight": torch.randn(num_out), f"{name}.{norm}.bias": torch.randn(num_out)}
            channels = 4 * inner
    torch.save(state, tmp_path / "w.bin")
    loaded = load_weights(tmp_path / "w.bin")
    assert loaded.header.spec.resnet == (1, 2, 1) and loaded.header.image_size == (32, 32)
    assert "gn_proj" in loaded.header.notes[0]
    projection = loaded.state_dict["stem.block2.unit1.conv_proj.weight"]
    assert torch.equal(projection, state[f"{stem}.body.block2.unit1.downsample.weight"])
    with torch.no_grad():
        model = create_model("auto", image_size=(64, 32), weights=tmp_path / "w.bin").eval()
        assert model(images((64, 32))).isfinite().all()


def test_the_table_of_our_parameters_is_the_models_own():
    for name, num_classes, pre_logits in [
        ("ViT-Ti_16:registers=2,qk_norm=true,layer_scale=0.1", 5, 48),
        ("custom:width=64,depth=1,heads=2,mlp=96,patch=16,pooling=map", 0, None),
        ("custom:width=64,depth=1,heads=2,mlp=96,patch=1,resnet=1x2x1,resnet_width=32,pooling=gap", 3, None),
    ]:
        model = create_model(name, image_size=64, num_classes=num_classes, pre_logits=pre_logits)
        table = parameters(get_spec(name), model.pos_embed.shape[1], num_classes, pre_logits)
        assert table == {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_weights_without_a_head_give_features_or_start_a_head(tmp_path):
    model = randomised(timm.create_model("vit_base_patch16_224", **SMALL, num_classes=0))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    bare = create_model("auto", weights=tmp_path / "w.pth").eval()
    assert farthest(bare(images((64, 64))), features(model, (64, 64))) < BOUND
    assert not create_model("auto", weights=tmp_path / "w.pth", num_classes=7).head.weight.any()


def test_our_own_state_dicts_and_pointers_to_checkpoints(tmp_path):
    name = "custom:width=64,depth=1,heads=1,mlp=96,patch=8"
    model = create_model(name, image_size=32, num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "w.pt")
    info = {"model": name, "image_size": [32, 32], "num_classes": 3, "pre_logits": None}
    save_weights(tmp_path / "run", model.state_dict(), info)
    (tmp_path / "run" / "best").write_text("global_step0\n")
    described = json.dumps(info | {"model": name + ",gelu=erf", "classes": ["a", "b", "c"], "data": {"mean": 0.5}})
    arrays = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(arrays, tmp_path / "w.safetensors", metadata={"vitds": described})
    for path in ("w.pt", "run/best", "run/latest", "run", "w.safetensors"):
        loaded = load_weights(tmp_path / path, name if path == "w.pt" else None)
        gelu = "erf" if path == "w.safetensors" else "tanh"
        assert (loaded.header.spec.gelu, loaded.header.num_classes) == (gelu, 3)
        assert all(torch.equal(loaded.state_dict[key], value) for key, value in arrays.items())
    assert read_header(tmp_path / "w.safetensors").notes == ()
    assert read_header(tmp_path / "run").notes == ("no preprocessing is recorded with these weights",)
    header = read_header(tmp_path / "w.safetensors")
    assert (header.classes, header.data) == (["a", "b", "c"], {"mean": 0.5})
    for wrong in ({}, info | {"classes": ["a", "b"]}, info | {"classes": ["a", "b", 3]}):
        save_file(arrays, tmp_path / "w.safetensors", metadata={"vitds": json.dumps(wrong)})
        with pytest.raises(WeightError, match="does not describe a model"):
            read_header(tmp_path / "w.safetensors")
    (tmp_path / "run" / "best").write_text("global_step9")
    with pytest.raises(WeightError, match="global_step9"):
        read_header(tmp_path / "run" / "best")


def test_our_own_names_alone_are_read_as_the_model_that_is_named_and_as_no_other(tmp_path):
    name = "custom:width=64,depth=1,heads=4,mlp=96,patch=8"
    torch.save(create_model(name, image_size=32, num_classes=3).state_dict(), tmp_path / "w.pt")
    for model in (None, "auto", "auto:gelu=erf"):  # 1, 2, 4, ... heads: any number fits
        with pytest.raises(WeightError, match="none of them tells the number of heads") as caught:
            read_header(tmp_path / "w.pt", model)
        assert "--model" in caught.value.fix and "tools/export_weights.py" in caught.value.fix
    header = read_header(tmp_path / "w.pt", f"{name},gelu=tanh")
    assert header.spec == get_spec(name)
    assert "assumed: resize=bilinear, norm_eps=1e-06, positions=learned; --model auto:resize=..." in header.notes[0]


def test_what_no_array_tells_is_guessed_aloud(tmp_path):
    arguments = SMALL | {"embed_dim": 192, "num_heads": 6, "num_classes": 2}  # of 192 they are 3
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    torch.save(vit_pytorch_state(width=192), tmp_path / "vit_pytorch.bin")
    torch.save(ViTModel(ViTConfig(**HF)).state_dict(), tmp_path / "hugging_face.bin")
    save_for_hf(model, tmp_path / "directory")

    def guess(name, model=None):
        notes = [note for note in read_header(tmp_path / name, model).notes if "assumed" in note]
        return notes and notes[0].removeprefix("no array tells, assumed: ")

    assert guess("timm.pth") == (
        "heads=3, gelu=erf, resize=bicubic; --model auto:gelu=... or custom:... states another"
    )
    custom = "custom:width=192,depth=2,heads=6,mlp=768,patch=16"
    assert guess("timm.pth", custom) == "gelu=erf, resize=bicubic; --model auto:gelu=... states another"
    assert guess("timm.pth", f"{custom},gelu=erf,resize=bicubic") == guess("directory") == []
    assert guess("vit_pytorch.bin") == "heads=3; --model custom:... states another"
    assert "heads=1, gelu=erf, norm_eps=1e-12;" in guess("hugging_face.bin")


def test_16_bits_become_float32_exactly(tmp_path):
    model = randomised(timm.create_model("vit_base_patch16_224", **SMALL, num_classes=5))
    for dtype in (torch.float16, torch.bfloat16):
        state = {key: value.to(dtype) for key, value in model.state_dict().items()}
        torch.save(state, tmp_path / "w.pth")
        save_file(state, tmp_path / "w.safetensors")
        for path in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
            norm = load_weights(path).state_dict["blocks.1.norm2.weight"]
            assert norm.dtype == torch.float32
            assert np.array_equal(norm.numpy(), state["blocks.1.norm2.weight"].float().numpy())


def test_a_model_that_is_stated_confirms_and_a_file_keeps_its_conventions(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=32).state_dict(), tmp_path / "w.pth")
    assert read_header(tmp_path / "w.pth", "ViT-Ti_16").spec.name == "ViT-Ti_16:gelu=erf,resize=bicubic"
    assert read_header(tmp_path / "w.pth", "ViT-Ti_16:gelu=tanh").spec.name == "ViT-Ti_16:resize=bicubic"
    with pytest.raises(WeightError, match="not ViT-S_16"):
        read_header(Path(tmp_path / "w.pth"), "ViT-S_16")


def test_what_vitds_wrote_beside_an_npz_is_read(tmp_path):
    spec = get_spec("custom:width=64,depth=1,heads=2,mlp=96,patch=8")
    arrays = {array.key: np.ones(array.shape, np.float32) for array in google_layout(spec, 7, 3, None)}
    np.savez(tmp_path / "w.npz", **arrays)
    info = {"model": f"{spec.name},gelu=erf", "image_size": [16, 24], "num_classes": 3, "pre_logits": None}
    (tmp_path / "w.json").write_text(json.dumps(info | {"classes": ["a", "b", "c"], "data": {"mean": 0.4}}))
    header = read_header(tmp_path / "w.npz")
    assert (header.spec.name, header.image_size, header.classes) == (info["model"], (16, 24), ["a", "b", "c"])
    assert header.data == {"mean": 0.4}
    (tmp_path / "w.json").write_text(json.dumps(info | {"num_classes": 4}))
    with pytest.raises(WeightError, match=r"w\.json says that it is of custom"):
        read_header(tmp_path / "w.npz")
    (tmp_path / "w.json").write_text('{"something": "else"}')
    with pytest.raises(WeightError, match=r"wrong shape .*pos_embedding"):  # nothing tells the grid any more
        read_header(tmp_path / "w.npz")
