from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_sets import write_pixels
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from weights.reference import gen_npz

from vitds.attention_map import _INFERNO, attention_maps, draw_attention
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
        tokens = model.tokens(images)
        pool = model.attn_pool.probabilities(model.encode(tokens)) if model.attn_pool is not None else None
        logits = model(images)
    identity = torch.eye(attentions[0].shape[-1])
    rollout = identity
    for attention in attentions:
        mixing = attention.mean(dim=1) + identity
        rollout = mixing / mixing.sum(dim=-1, keepdim=True) @ rollout
    rows = slice(0, 1) if model.spec.pooling == "token" else slice(prefix, None)
    expected = (
        rollout[:, rows].mean(dim=1) if pool is None else torch.einsum("bnt,btp->bp", pool, rollout) / pool.shape[1]
    )
    for layer in (None, 1, 2, -1, -len(attentions)):
        maps = attention_maps(model, images, layer)
        torch.testing.assert_close(maps.rollout, expected[:, prefix:].reshape(2, *grid), atol=1e-6, rtol=0)
        if layer is None and pool is not None:
            heads = pool
        else:
            number = {None: -1, 1: 0, 2: 1}.get(layer, layer)
            heads = attentions[number][:, :, rows].mean(dim=2)
        torch.testing.assert_close(maps.heads, heads[..., prefix:].reshape(2, -1, *grid), atol=1e-6, rtol=0)
        assert torch.equal(maps.output, logits)


def test_the_pool_s_attention_is_that_of_its_forward():
    """By hand, from its weights: the pooled vector is what the values become under these probabilities."""
    model, images = build(TINY + ",pooling=map", (16, 16))
    pool, spec = model.attn_pool, model.spec
    with torch.no_grad():
        tokens = model.encode(model.tokens(images))
        _, values = F.linear(tokens, pool.kv.weight, pool.kv.bias).chunk(2, dim=-1)
        values = values.unflatten(-1, (spec.heads, -1))
        mixed = torch.einsum("bnt,btnk->bnk", pool.probabilities(tokens), values).flatten(1)
        pooled = F.linear(mixed, pool.proj.weight, pool.proj.bias)
        torch.testing.assert_close(pool(tokens), pooled + pool.mlp(pool.norm(pooled)), atol=1e-5, rtol=1e-5)


def test_a_model_without_a_head_has_maps_too():
    model = VisionTransformer(get_spec(TINY), (16, 16), 0)
    maps = attention_maps(model, torch.randn(1, 3, 16, 16))
    assert maps.output.shape == (1, 32) and maps.rollout.shape == (1, 4, 4)


class _LiveMatrices(TorchDispatchMode):
    """Counts the numbers in live tensors of (..., T, T): `most` at any one time."""

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens, self.live, self.most, self.num_seen = num_tokens, WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-2:] == (self.num_tokens, self.num_tokens):
                self.live[tensor] = True
                self.num_seen += 1
                storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in self.live}
                self.most = max(self.most, sum(storages.values()) // 4)
        return made


def test_no_more_than_a_few_matrices_are_alive_however_deep_and_many_headed():
    model, images = build("custom:width=32,depth=9,heads=8,mlp=32,patch=4", (24, 24))
    num_tokens = 37
    with _LiveMatrices(num_tokens) as matrices:
        attention_maps(model, images)
    assert matrices.num_seen >= 9 * 8, "the count must see them"
    assert matrices.most <= 6 * len(images) * num_tokens**2, "all heads of one layer alone would be 8"


def test_the_model_is_left_as_it_was():
    model, images = build(TINY, (16, 16))
    model.train()
    attention_maps(model, images)
    assert model.training
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)
    with pytest.raises(RuntimeError):
        attention_maps(model, images[:, :2])
    assert model.training and not any(block.attn._forward_pre_hooks for block in model.blocks)
    for layer in (0, 4, -4):
        with pytest.raises(ValueError, match="of 3"):
            attention_maps(model, images, layer)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (480, 320, 3), (100, 700, 3), (700, 50, 3), (1, 1, 3)])
@pytest.mark.parametrize("num_heads", [1, 3, 16])
def test_a_page_of_any_image(shape, num_heads):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, shape, dtype=np.uint8)
    rollout, heads = generator.random((4, 6), dtype=np.float32), generator.random((num_heads, 4, 6), dtype=np.float32)
    names = [("great white shark, man-eater\nCarcharodon carcharias " * 3, 0.9), ("b", 0.1), ("", 0.0)]
    long = "a photo\n" * 40
    page = draw_attention(image, rollout, heads, names, title=long, subtitle=long, heads_title=long)
    assert page.width == 1600
    assert np.asarray(page)[:, :40].min() == 255 and np.asarray(page)[:, -40:].min() == 255  # nothing in the margins


def test_tiny_images_keep_their_pixels_as_squares():
    digit = np.array([[0, 255], [200, 60]], dtype=np.uint8)
    page = np.asarray(draw_attention(digit, np.ones((2, 2)), np.ones((1, 2, 2)), [("3", 1.0)]))
    square = page[144 : 144 + 460, 48 : 48 + 460, 0]
    assert np.array_equal(square, np.kron(digit, np.ones((230, 230), dtype=np.uint8)))


def test_colours_grow_lighter_evenly():
    lightness = _INFERNO @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > 8).all()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("attention")
    arrays = gen_npz.weights("tiny", "imagenet21k+imagenet2012")
    np.savez(directory / "w.npz", **arrays)
    generator = np.random.default_rng(0)
    (directory / "more").mkdir()
    for name in ("photo.png", "more/photo.jpg"):
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(directory / name)
    (directory / "text.png").write_text("no image")
    return directory


def tool(*arguments, prelude=""):
    command = ["-c", f"{prelude}import runpy; runpy.run_path('tools/visualize_attention.py', run_name='__main__')"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_picture_for_each_image_and_none_overwritten(work, tmp_path):
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    others = [".photo.png.writing", "photo-2.png"]
    for name in others:
        (out / name).write_text("mine")
    write_pixels(tmp_path / "data", num_train=5, num_val=9)
    images = ["--image", work / "photo.png", work / "more/photo.jpg"]
    data = ["--data", tmp_path / "data", "--index", 8]
    flags = ["--image-size", "32x64", "--layer", "-2", "--out", out]
    done = tool("--weights", work / "w.npz", *images, *data, *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == [*others, "photo-3.png", "photo.png", "val-8.png"]
    assert all((out / name).read_text() == "mine" for name in others)
    written = [line.removeprefix("written: ") for line in done.stdout.splitlines() if line.startswith("written: ")]
    assert written == [f"{out}/{name}.png" for name in ("photo", "photo-3", "val-8")]
    assert all(Image.open(path).width == 1600 for path in written)
    assert "photo.png: class-" in done.stdout, "names are those of the data, as the weights know none"
    assert "val 8 · label class-3: class" in done.stdout


def test_a_name_of_any_bytes_is_shown_in_words(work, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    image.write_bytes((work / "photo.png").read_bytes())
    done = tool("--weights", work / "w.npz", "--image", image, "--out", tmp_path / "out")
    assert done.returncode == 0 and done.stdout.startswith(r"caf\xe9.png: class"), done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [r"caf\xe9.png"]


def test_mistakes_are_named_before_anything_is_drawn(work, tmp_path):
    weights, image, out = ["--weights", work / "w.npz"], ["--image", work / "photo.png"], ["--out", tmp_path / "out"]
    write_pixels(tmp_path / "data", num_train=5, num_val=9)
    data = ["--data", tmp_path / "data"]
    for arguments, code, message in [
        ([*weights, *image, work / "text.png", *out], 3, "text.png  no image"),
        ([*weights, *image, work / "gone.png", *out], 3, "gone.png  cannot be read: No such file"),
        (["--weights", work / "none.npz", *image, *out], 4, "none.npz"),
        (["--weights", work / "text.png", *image, *out], 4, "text.png"),
        ([*weights, *image, *out, "--model", "ViT-B_16"], 4, "not ViT-B_16"),
        ([*weights, *image, *out, "--image-size", "30"], 2, "not divisible"),
        ([*weights, *image, *out, "--layer", "3"], 2, "--layer 3: the model has 2 layers"),
        ([*weights, *image, *out, "--layer", "0"], 2, "1 ... 2 from the first, or -1 ... -2 from the last"),
        ([*weights, *image, "--out", work / "w.npz"], 2, "is no directory"),
        ([*weights, *out], 2, "name images: --image FILE, or --data DIR"),
        ([*weights, *image, *out, "--index", "3"], 2, "--index needs --data"),
        ([*weights, *out, *data, "--index", "9"], 2, "--index 9 is not in 0 ... 8"),
        ([*weights, *out, "--data", tmp_path / "nowhere"], 3, "nowhere"),
        ([*weights, *image], 2, "required: --out"),
        (["--weigths", *weights[1:], *image, *out], 2, 'did you mean "--weights"?'),
    ]:
        failed = tool(*arguments, prelude="import sys; sys.modules['torch'] = None; ")
        assert failed.returncode == code and message in failed.stderr, (message, failed.stderr)
        assert "Traceback" not in failed.stderr and not failed.stdout
    assert not (tmp_path / "out").exists()
