from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vitds.attention_map import _INFERNO, attention_rollout, draw_attention, last_layer_attention, stack_panels
from vitds.layouts.google import google_layout
from vitds.model.registry import get_spec
from vitds.model.vit import VisionTransformer

ROOT = Path(__file__).resolve().parents[1]
TINY = "custom:width=32,depth=3,heads=4,mlp=64,patch=4"
HYBRID = "custom:width=32,depth=2,heads=2,mlp=64,patch=1,resnet=1x1,resnet_width=32"


def build(name, image_size):
    torch.manual_seed(0)
    model = VisionTransformer(get_spec(name), image_size, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model, torch.randn(2, model.spec.in_channels, *image_size)


def attentions_by_hand(model, images):
    """(B, N, T, T) of every block, from the weights and the textbook."""
    x, found = model.tokens(images), []
    for block in model.blocks:
        q, k, _ = F.linear(block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=-1)
        q, k = (part.reshape(*part.shape[:2], model.spec.heads, -1) for part in (q, k))
        if model.spec.qk_norm:
            q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        found.append((torch.einsum("bqnk,btnk->bnqt", q, k) * q.shape[-1] ** -0.5).softmax(-1))
        x = block(x)
    return found


@pytest.mark.parametrize(
    ("name", "image_size", "grid", "prefix"),
    [
        (TINY, (16, 16), (4, 4), 1),
        (TINY + ",registers=2,qk_norm=true", (8, 24), (2, 6), 3),
        (TINY + ",pooling=gap,registers=1", (16, 12), (4, 3), 1),
        (TINY + ",pooling=map,channels=1", (12, 8), (3, 2), 0),
        (HYBRID, (32, 64), (4, 8), 1),
    ],
)
def test_maps_equal_the_formula(name, image_size, grid, prefix):
    model, images = build(name, image_size)
    model.eval()
    with torch.no_grad():
        attentions = attentions_by_hand(model, images)
    rollout = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        mixing = 0.5 * attention.mean(dim=1) + 0.5 * torch.eye(attention.shape[-1])
        rollout = mixing @ rollout
    rows = slice(0, 1) if model.spec.pooling == "token" else slice(prefix, None)
    expected = rollout[:, rows].mean(dim=1)[:, prefix:].reshape(2, *grid)
    torch.testing.assert_close(attention_rollout(model, images), expected, atol=1e-6, rtol=1e-5)
    expected = attentions[-1][:, :, rows].mean(dim=2)[..., prefix:].reshape(2, -1, *grid)
    torch.testing.assert_close(last_layer_attention(model, images), expected, atol=1e-6, rtol=1e-5)


def test_the_model_is_left_as_it_was():
    model, images = build(TINY, (16, 16))
    model.train()
    attention_rollout(model, images)
    assert model.training and model.blocks[0].attn.training
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)
    with pytest.raises(ValueError):
        last_layer_attention(model, images[..., :8])
    assert model.training and not any(block.attn._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (480, 320, 3), (100, 700, 3), (1, 1, 3)])
@pytest.mark.parametrize("num_heads", [1, 3, 16])
def test_a_panel_of_any_image(shape, num_heads):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, shape, dtype=np.uint8)
    rollout, heads = generator.random((4, 6), dtype=np.float32), generator.random((num_heads, 4, 6), dtype=np.float32)
    names = [("great white shark, man-eater, Carcharodon carcharias " * 3, 0.9), ("b", 0.1), ("", 0.0)]
    panel = draw_attention(image, rollout, heads, names, title="a photo " * 40, subtitle="ViT")
    assert panel.width == 1600
    assert np.asarray(panel)[:, :40].min() == 255 and np.asarray(panel)[:, -40:].min() == 255  # nothing in the margins
    assert stack_panels([panel, panel]).size == (1600, 2 * panel.height)


def test_tiny_images_keep_their_pixels_as_squares():
    digit = np.array([[0, 255], [200, 60]], dtype=np.uint8)
    panel = np.asarray(draw_attention(digit, np.ones((2, 2)), np.ones((1, 2, 2)), [("3", 1.0)]))
    square = panel[124 : 124 + 460, 48 : 48 + 460, 0]
    assert np.array_equal(square, np.kron(digit, np.ones((230, 230), dtype=np.uint8)))


def test_colours_grow_lighter_evenly():
    lightness = _INFERNO @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > 8).all()


def test_tool_draws_images_and_reports_mistakes(tmp_path):
    spec = get_spec("custom:width=32,depth=2,heads=2,mlp=64,patch=8")
    generator = np.random.default_rng(0)
    arrays = google_layout(spec, 17, 10, None)
    np.savez(tmp_path / "w.npz", **{a.key: generator.normal(0, 0.2, a.shape).astype(np.float32) for a in arrays})
    Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "photo.png")

    def tool(*arguments):
        command = [sys.executable, ROOT / "tools/visualize_attention.py", "--output", tmp_path / "out" / "a.png"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)

    done = tool(tmp_path / "photo.png", "--weights", tmp_path / "w.npz", "--image-size", "64")
    assert done.returncode == 0, done.stderr
    assert "photo.png: class " in done.stdout
    assert Image.open(tmp_path / "out" / "a.png").width == 1600
    (tmp_path / "text.png").write_text("no image")
    for arguments, code, message in [
        ((tmp_path / "text.png", "--weights", tmp_path / "w.npz"), 3, "text.png"),
        ((tmp_path / "photo.png", "--weights", tmp_path / "none.npz"), 4, "none.npz"),
        ((tmp_path / "photo.png", "--weights", tmp_path / "w.npz", "--image-size", "30"), 2, "not divisible"),
        (("--weights", tmp_path / "w.npz"), 2, "name an IMAGE"),
        (("--data", tmp_path / "nowhere", "--weights", tmp_path / "w.npz"), 3, "nowhere"),
    ]:
        failed = tool(*arguments)
        assert failed.returncode == code, failed.stderr
        assert message in failed.stderr and "Traceback" not in failed.stderr
