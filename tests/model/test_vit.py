from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vitds.errors import ConfigError
from vitds.model.blocks import DropPath, add_branch
from vitds.model.registry import MODELS, get_spec, num_parameters
from vitds.model.resnet_stem import GroupNorm, StdConv, pad_same
from vitds.model.vit import VisionTransformer

TINY = "custom:width=32,depth=4,heads=4,mlp=64,patch=4"
EVERYTHING = (
    "custom:width=64,depth=2,heads=4,mlp=128,patch=4,pooling=map,registers=4,layer_scale=1e-05,qk_norm=true,channels=1"
)
HYBRID = "custom:width=32,depth=2,heads=2,mlp=64,patch=1,resnet=1x2x1,resnet_width=32"


def build(name, image_size=(16, 16), num_classes=10, seed=0, **options):
    """A model whose head, gains and tokens are not at their silent initial values."""
    torch.manual_seed(seed)
    model = VisionTransformer(get_spec(name), image_size, num_classes, **options)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images_for(model, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.spec.in_channels, *model.image_size, generator=generator)


# What a model consists of


@pytest.mark.parametrize("name", [*MODELS, EVERYTHING, HYBRID, TINY + ",pooling=gap", TINY + ",resnet=0,registers=1"])
def test_built_model_has_the_parameters_of_the_formula(name):
    spec = get_spec(name)
    size = (224, 448)
    with torch.device("meta"):
        model = VisionTransformer(spec, size, 1000, pre_logits=24)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(spec, size, 1000, pre_logits=24)


@pytest.mark.parametrize("name", ["ViT-B_16", "R50-ViT-B_16", EVERYTHING])
def test_parameter_names_and_shapes_are_frozen(name):
    with torch.device("meta"):
        model = VisionTransformer(get_spec(name), (224, 224), 1000, pre_logits=48)
    table = json.loads(Path(__file__).with_name("parameter_names.json").read_text())
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == table[name]


def test_initial_values():
    torch.manual_seed(0)
    model = VisionTransformer(
        get_spec("custom:width=256,depth=1,heads=4,mlp=512,patch=8"), (64, 64), 10, pre_logits=256
    )
    assert not model.head.weight.any() and not model.head.bias.any() and not model.cls_token.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    block = model.blocks[0]
    assert block.attn.qkv.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 512), rel=0.01)  # each of q, k, v
    assert block.mlp.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 768), rel=0.01)
    assert block.mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.2)
    assert not block.attn.proj.bias.any()
    assert model.patch_embed.weight.std().item() == pytest.approx((3 * 8 * 8) ** -0.5, rel=0.05)
    assert model.head.pre_logits.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_a_new_residual_unit_is_its_residual():
    model = VisionTransformer(get_spec(HYBRID), (32, 32), 10)
    gains = [value for name, value in model.named_parameters() if name.endswith("gn3.weight")]
    assert len(gains) == 4 and not any(gain.any() for gain in gains)


def test_initial_values_follow_the_seed():
    one, same, other = (VisionTransformer(get_spec(TINY), (16, 16), 10) for _ in map(torch.manual_seed, (7, 7, 8)))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.pos_embed, other.pos_embed)


# What it computes


def to_timm(state):
    return {name.replace("patch_embed.", "patch_embed.proj."): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("options", "timm_options"),
    [
        ("", {}),
        (",pooling=gap", dict(global_pool="avg", class_token=False, fc_norm=False)),
        (",pooling=map", dict(global_pool="map", class_token=False)),
        (",layer_scale=0.5,qk_norm=true", dict(init_values=0.5, qk_norm=True)),
        (",pooling=gap,registers=3", dict(global_pool="avg", class_token=False, fc_norm=False, reg_tokens=3)),
    ],
)
def test_equals_timm_on_the_same_weights(options, timm_options):
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours = build(TINY + options + ",gelu=erf", (16, 24)).eval()
    theirs = timm.VisionTransformer(
        img_size=(16, 24), patch_size=4, embed_dim=32, depth=4, num_heads=4, mlp_ratio=2, num_classes=10,
        no_embed_class="reg_tokens" in timm_options, **timm_options,
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_timm(ours.state_dict()))
    images = images_for(ours)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(build(TINY + options, (16, 24)).eval()(images), theirs(images), atol=1e-5)  # tanh


def test_forward_is_the_composition_of_its_parts():
    model = build(TINY + ",registers=2", pre_logits=8).eval()
    images = images_for(model)
    tokens = model.tokens(images)
    assert tokens.shape == (3, 1 + 2 + 16, 32)
    assert torch.equal(tokens[:, 1:3], model.reg_token.expand(3, -1, -1))  # registers stand bare after the class token
    encoded = model.encode(tokens)
    assert torch.equal(model.pool(encoded), encoded[:, 0])
    assert torch.equal(model.features(images), encoded[:, 0])
    hidden = torch.tanh(F.linear(encoded[:, 0], model.head.pre_logits.weight, model.head.pre_logits.bias))
    torch.testing.assert_close(model(images), F.linear(hidden, model.head.weight, model.head.bias))


def test_patches_are_numbered_row_by_row():
    model = build(TINY + ",pooling=gap", (8, 12)).eval()
    images = images_for(model, batch=1)
    changed = images.clone()
    changed[..., 4:8, 0:4] += 1  # second row, first column of a grid of 2 x 3
    moved = (model.tokens(images) != model.tokens(changed)).any(dim=-1)
    assert moved.tolist() == [[False, False, False, True, False, False]]


def test_gap_leaves_registers_out():
    model = build(TINY + ",pooling=gap,registers=2").eval()
    tokens = torch.randn(2, 2 + 16, 32)
    torch.testing.assert_close(model.pool(tokens), tokens[:, 2:].mean(dim=1))


def test_image_of_another_size_is_refused():
    model = build(TINY)
    with pytest.raises(ValueError, match="built for"):
        model(torch.zeros(1, 3, 16, 20))
    with pytest.raises(ConfigError, match="not divisible"):
        VisionTransformer(get_spec(TINY), (16, 18), 10)


@pytest.mark.parametrize("name", [TINY, EVERYTHING, HYBRID])
def test_sixteen_bits_stay_close(name):
    model = build(name, (32, 32)).eval()
    images = images_for(model)
    expected = model(images)
    logits = model.to(torch.bfloat16)(images.to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"), [(8, 7, 2, (2, 3)), (8, 3, 2, (0, 1)), (8, 3, 1, (1, 1))]
)
def test_pad_same_is_asymmetric_like_xla(size, kernel, stride, expected):
    padded = pad_same(torch.ones(1, 1, size, size), kernel, stride)[0, 0, size // 2]
    before = int((padded == 0).int().cumprod(0).sum())
    assert (before, len(padded) - size - before) == expected


def test_std_conv_uses_a_standardised_kernel():
    conv = StdConv(4, 6, 3)
    with torch.no_grad():
        conv.weight.normal_(2.0, 3.0)
    images = torch.randn(2, 4, 8, 8)
    before = conv(images)
    with torch.no_grad():
        conv.weight.mul_(5).add_(1)
    torch.testing.assert_close(conv(images), before, atol=1e-3, rtol=1e-3)
    assert GroupNorm(64).eps == 1e-6


# Regularisation and activation checkpointing


def through(drop_path, x, branch):
    return add_branch(x, branch, drop_path(x))


def test_drop_path_keeps_the_mean_in_16_bits_too():
    x = torch.zeros(4000, 1, 1, dtype=torch.bfloat16)
    assert through(DropPath(0.1), x, torch.ones_like).dtype == torch.bfloat16
    assert DropPath(0.1)(x).max().item() == pytest.approx(1 / 0.9, rel=1e-6)  # which bfloat16 would round to 1.109


def test_drop_path_keeps_the_mean_and_rises_with_depth():
    model = VisionTransformer(get_spec(TINY), (16, 16), 10, drop_path=0.3)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    torch.manual_seed(0)
    dropped = through(DropPath(0.25), torch.zeros(4000, 2, 3), torch.ones_like)
    per_sample = dropped.flatten(1)
    assert torch.equal(per_sample.amin(dim=1), per_sample.amax(dim=1))  # a branch is dropped whole
    torch.testing.assert_close(per_sample.unique(), torch.tensor([0, 4 / 3]))
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(through(DropPath(0.25).eval(), torch.zeros(2, 2, 3), torch.ones_like), torch.ones(2, 2, 3))


def test_drop_path_by_subset_computes_no_more_than_it_keeps_and_is_the_branch_in_the_mean():
    sizes = []

    def branch(x):
        sizes.append(len(x))
        return x.sin()

    x = torch.randn(6, 2, 3, dtype=torch.float64)
    drop_path, mean = DropPath(0.3, by_subset=True), torch.zeros_like(x)
    torch.manual_seed(0)
    for _ in range(400):
        out = through(drop_path, x, branch)
        is_kept = (out != x).any(dim=2).any(dim=1)
        assert is_kept.sum() == 4  # of 6, where 4.2 would be the mean without a subset
        torch.testing.assert_close(out[is_kept], x[is_kept] + 6 / 4 * branch(x[is_kept]))
        mean += out / 400
    assert set(sizes) == {4}
    torch.testing.assert_close(mean, x + branch(x), atol=0.18, rtol=0)  # 5 deviations of the mean of 400 draws
    assert torch.equal(through(drop_path.eval(), x, branch), x + branch(x))
    assert len(x[:1]) == (through(DropPath(0.9, by_subset=True), x[:1], branch) != x[:1]).any(dim=2).any(dim=1).sum()


def outputs_in_training(**options):
    model = build(TINY, **options).train()
    torch.manual_seed(7)
    return model(images_for(model)), torch.rand(1)  # what follows in the generator's stream too


def test_rates_at_which_nothing_is_left_out_change_no_bit_and_draw_nothing():
    expected = outputs_in_training(dropout=0.1)
    off = outputs_in_training(dropout=0.1, drop_path=0.0, drop_path_subset=True, token_drop=0.0)
    assert all(torch.equal(one, other) for one, other in zip(off, expected, strict=True))
    low = [outputs_in_training(drop_path=0.1, drop_path_subset=subset) for subset in (False, True)]
    assert all(torch.equal(one, other) for one, other in zip(*low, strict=True))  # up to 0.1 a mask is cheaper


@pytest.mark.parametrize("name", [TINY + ",registers=2", TINY + ",pooling=gap", EVERYTHING])
def test_token_drop_keeps_prefix_tokens_and_an_even_draw_of_each_image_s_patches(name):
    model = build(name, token_drop=0.3)
    num_first, images = model.num_prefix_tokens, images_for(model, batch=128)
    every = model.eval().tokens(images)
    assert every.shape[1] == num_first + 16
    counts = torch.zeros(16)
    torch.manual_seed(0)
    for _ in range(4):
        some = model.train().tokens(images)
        assert some.shape[1] == num_first + 11  # of 16
        assert torch.equal(some[:, :num_first], every[:, :num_first])
        is_patch = (some[:, num_first:, None] == every[:, None, num_first:]).all(dim=3)
        assert (is_patch.sum(dim=2) == 1).all() and (is_patch.sum(dim=1) <= 1).all()  # each is a patch, none is twice
        counts += is_patch.sum(dim=(0, 1))
    torch.testing.assert_close(counts / counts.mean(), torch.ones(16), atol=0.15, rtol=0)
    assert not torch.equal(is_patch[0].any(dim=0), is_patch[1].any(dim=0))  # each image has its own draw
    assert model(images).shape == (128, 10)


def test_dropout_acts_in_training_only_and_where_google_has_it():
    model = build(TINY, dropout=0.5)
    images = images_for(model)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert rates.pop("pos_dropout") == 0.5
    assert rates == {f"blocks.{i}.{where}.dropout": 0.5 for i in range(4) for where in ("attn", "mlp")}


def losses_and_gradients(mode, offload=False, name=TINY, frozen=(), **options):
    model = build(name, **{"dropout": 0.2, "drop_path": 0.2} | options).train()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(not parameter_name.startswith(frozen) if frozen else True)
    model.set_activation_checkpointing(mode, offload)
    torch.manual_seed(3)
    losses = []
    for step in range(2):
        loss = F.cross_entropy(model(images_for(model, seed=step)), torch.tensor([1, 2, 3]))
        loss.backward()
        losses.append(loss.detach())
    return losses, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("mode", ["full", "selective", 2, "3"])
@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        (TINY, ()),
        (EVERYTHING, ()),
        (TINY, ("patch_embed", "pos", "blocks.1")),
        (HYBRID, ()),
        (HYBRID, ("stem.conv_root", "stem.block1", "stem.block2.unit2.gn1")),
    ],
)
def test_activation_checkpointing_changes_nothing(mode, offload, name, frozen):
    expected_losses, expected = losses_and_gradients("none", name=name, frozen=frozen)
    losses, gradients = losses_and_gradients(mode, offload, name, frozen)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected_losses, strict=True))
    for parameter_name, gradient in gradients.items():
        if frozen and parameter_name.startswith(frozen):
            assert gradient is None
        else:
            assert torch.equal(gradient, expected[parameter_name]), parameter_name


@pytest.mark.parametrize("mode", ["full", "selective", 2])
def test_the_second_pass_keeps_the_same_samples_and_tokens(mode):
    left_out = {"drop_path": 0.6, "drop_path_subset": True, "token_drop": 0.5}
    expected_losses, expected = losses_and_gradients("none", **left_out)
    losses, gradients = losses_and_gradients(mode, **left_out)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected_losses, strict=True))
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("mode", ["full", "selective", 2])
def test_activation_checkpointing_changes_nothing_under_the_linear_of_zero_stage_3(mode, monkeypatch):
    zero = pytest.importorskip("deepspeed.runtime.zero.linear")
    expected_losses, expected = losses_and_gradients("none")
    monkeypatch.setattr(F, "linear", zero.zero3_linear_wrap)  # as DeepSpeed does for the whole process
    losses, gradients = losses_and_gradients(mode)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected_losses, strict=True))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


class CountOperators(TorchDispatchMode):
    """How often each aten operator really ran."""

    def __enter__(self):
        self.counts = Counter()
        super().__enter__()
        return self.counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "norms", "matmuls"),
    [("none", 9, 17), ("full", 17, 29), ("selective", 17, 17), (2, 13, 23)],  # one product is the patch embedding's
)
def test_activation_checkpointing_computes_again_what_it_says(mode, norms, matmuls):
    model = build(TINY).train()
    model.set_activation_checkpointing(mode)
    with CountOperators() as count:
        model.encode(model.tokens(images_for(model))).sum().backward()
    assert (count["native_layer_norm"], count["addmm"]) == (norms, matmuls)


@pytest.mark.parametrize("mode", ["some", 0, -1, "0", True, ""])
def test_unknown_activation_checkpointing_is_refused(mode):
    with pytest.raises(ConfigError, match="not a mode"):
        build(TINY).set_activation_checkpointing(mode)


def test_offload_needs_activation_checkpointing():
    with pytest.raises(ConfigError, match="offloaded"):
        build(TINY).set_activation_checkpointing("none", offload_to_cpu=True)
