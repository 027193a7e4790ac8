"""Synthetic checkpoints in Google's npz layout, small and full-size, and the images of the expected outputs.

Every weight comes from integer arithmetic (a 64-bit counter hash), one float32 multiplication and at most one addition,
so the same bytes come out on every platform. `expected/*.npz` holds what Google's own Flax code (google-research/
vision_transformer, float32, CPU) gave on these bytes: logits, the class token after the last norm (`feature`), and in
`meta` a tolerance; and parts of what flows between, to locate the first layer that deviates: `embedding`, `posembed`
(first and last tokens), `block_cls` (the class token after every block), `gn_root`, `resnet_out` and `pre_logits`.
"""

import hashlib
import json
import math
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SALT = "vit-npz-fidelity-1"

_FULL = dict(resnet=None, rwidth=1.0, size21=224, size1=384, n21=21843, n1=1000)
_TINY = dict(width=32, depth=2, mlp=64, heads=2, patch=8, resnet=None, rwidth=1.0, size21=32, size1=48, n21=61, n1=10)
MODELS = {
    "ViT-B_16": dict(_FULL, width=768, depth=12, mlp=3072, heads=12, patch=16),
    "ViT-B_32": dict(_FULL, width=768, depth=12, mlp=3072, heads=12, patch=32),
    "ViT-L_16": dict(_FULL, width=1024, depth=24, mlp=4096, heads=16, patch=16),
    "ViT-L_32": dict(_FULL, width=1024, depth=24, mlp=4096, heads=16, patch=32),
    "ViT-H_14": dict(_FULL, width=1280, depth=32, mlp=5120, heads=16, patch=14, size1=224),
    "R50+ViT-B_16": dict(_FULL, width=768, depth=12, mlp=3072, heads=12, patch=1, resnet=(3, 4, 9)),
    "ViT-Ti_16": dict(_FULL, width=192, depth=12, mlp=768, heads=3, patch=16),
    "ViT-S_16": dict(_FULL, width=384, depth=12, mlp=1536, heads=6, patch=16),
    "ViT-S_32": dict(_FULL, width=384, depth=12, mlp=1536, heads=6, patch=32),
    "ViT-B_8": dict(_FULL, width=768, depth=12, mlp=3072, heads=12, patch=8, size1=224),
    "R+ViT-Ti_16": dict(_FULL, width=192, depth=12, mlp=768, heads=3, patch=8, resnet=()),
    "R26+ViT-S_32": dict(_FULL, width=384, depth=12, mlp=1536, heads=6, patch=1, resnet=(2, 2, 2, 2)),
    "R50+ViT-L_32": dict(_FULL, width=1024, depth=24, mlp=4096, heads=16, patch=1, resnet=(3, 4, 6, 3)),
    "tiny": _TINY,
    "tiny-eps": dict(_TINY, token_scale=1e-3),  # such small tokens that the epsilon of the first LayerNorm decides
    "tiny-hybrid": dict(_TINY, patch=1, resnet=(1, 2, 1), rwidth=0.5, size21=64, size1=96),
}
VARIANTS = ("imagenet21k", "imagenet21k+imagenet2012", "augreg-21k", "augreg-1k")


def spec(model):
    """A name may end in the native size, as ViT-B_16-224 does."""
    if model in MODELS:
        return MODELS[model]
    base, _, size = model.rpartition("-")
    return dict(MODELS[base], size21=int(size), size1=int(size))


def stride(s):
    """Pixels per token side."""
    if s["resnet"] is None:
        return s["patch"]
    n = len(s["resnet"])
    return s["patch"] * 4 * 2 ** max(n - 1, 0)


def native_size(model, variant):
    s = spec(model)
    return s["size1"] if variant.endswith("2012") or variant == "augreg-1k" else s["size21"]


def layout(model, variant):
    """Ordered list of (key, shape, kind, std) of one checkpoint file."""
    if variant not in VARIANTS:
        raise ValueError(variant)
    s = spec(model)
    one_k = variant in ("imagenet21k+imagenet2012", "augreg-1k")
    w, h, d = s["width"], s["heads"], s["width"] // s["heads"]
    classes = s["n1"] if one_k else s["n21"]
    out = []

    def add(key, shape, kind, std=0.0):
        out.append((key, tuple(int(v) for v in shape), kind, float(std)))

    c = 3
    if s["resnet"] is not None:
        root = int(64 * s["rwidth"])
        add("conv_root/kernel", (7, 7, 3, root), "stdconv", 0.02)
        # GroupNorm parameters have three leading singleton axes in the released files
        add("gn_root/scale", (1, 1, 1, root), "scale", 0.2)
        add("gn_root/bias", (1, 1, 1, root), "normal", 0.2)
        c = root
        for b, units in enumerate(s["resnet"], 1):
            mid = root * 2 ** (b - 1)
            for u in range(1, units + 1):
                p = f"block{b}/unit{u}/"
                if u == 1:  # channel count (and, from block2 on, resolution) changes here
                    add(p + "conv_proj/kernel", (1, 1, c, 4 * mid), "stdconv", 0.02)
                    add(p + "gn_proj/scale", (1, 1, 1, 4 * mid), "scale", 0.2)
                    add(p + "gn_proj/bias", (1, 1, 1, 4 * mid), "normal", 0.2)
                for i, (k, ci, co) in enumerate(((1, c, mid), (3, mid, mid), (1, mid, 4 * mid)), 1):
                    add(p + f"conv{i}/kernel", (k, k, ci, co), "stdconv", 0.02)
                    add(p + f"gn{i}/scale", (1, 1, 1, co), "scale", 0.2)
                    add(p + f"gn{i}/bias", (1, 1, 1, co), "normal", 0.2)
                c = 4 * mid
    pt, ts = s["patch"], s.get("token_scale", 1.0)
    add("embedding/kernel", (pt, pt, c, w), "normal", ts * 1.5 / math.sqrt(pt * pt * c))
    add("embedding/bias", (w,), "normal", ts * 0.1)
    add("cls", (1, 1, w), "normal", ts * 0.3)
    grid = native_size(model, variant) // stride(s)
    add("Transformer/posembed_input/pos_embedding", (1, grid * grid + 1, w), "normal", ts * 0.2)
    for n in range(s["depth"]):
        p = f"Transformer/encoderblock_{n}/"
        add(p + "LayerNorm_0/scale", (w,), "scale", 0.2)
        add(p + "LayerNorm_0/bias", (w,), "normal", 0.2)
        for q in ("query", "key", "value"):
            gain = 1.0 if q == "value" else 1.25
            add(p + f"MultiHeadDotProductAttention_1/{q}/kernel", (w, h, d), "normal", gain / math.sqrt(w))
            add(p + f"MultiHeadDotProductAttention_1/{q}/bias", (h, d), "normal", 0.1)
        add(p + "MultiHeadDotProductAttention_1/out/kernel", (h, d, w), "normal", 1.0 / math.sqrt(w))
        add(p + "MultiHeadDotProductAttention_1/out/bias", (w,), "normal", 0.1)
        add(p + "LayerNorm_2/scale", (w,), "scale", 0.2)
        add(p + "LayerNorm_2/bias", (w,), "normal", 0.2)
        add(p + "MlpBlock_3/Dense_0/kernel", (w, s["mlp"]), "normal", 1.0 / math.sqrt(w))
        add(p + "MlpBlock_3/Dense_0/bias", (s["mlp"],), "normal", 0.1)
        add(p + "MlpBlock_3/Dense_1/kernel", (s["mlp"], w), "normal", 1.0 / math.sqrt(s["mlp"]))
        add(p + "MlpBlock_3/Dense_1/bias", (w,), "normal", 0.1)
    add("Transformer/encoder_norm/scale", (w,), "scale", 0.2)
    add("Transformer/encoder_norm/bias", (w,), "normal", 0.2)
    if variant == "imagenet21k":
        add("pre_logits/kernel", (w, w), "normal", 1.0 / math.sqrt(w))
        add("pre_logits/bias", (w,), "normal", 0.1)
    add("head/kernel", (w, classes), "normal", 1.0 / math.sqrt(w))
    add("head/bias", (classes,), "normal", 0.1)
    return out


_CHUNK = 1 << 16
_UNIT = math.sqrt((65536.0**2 - 1.0) / 3.0)  # std of a sum of four uniform uint16


def _seed(*parts):
    text = "|".join((SALT, *parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def _bits(seed, start, n):
    """n pseudo-random uint64 of the counter stream 'seed', from position start."""
    base = (seed + (start + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = np.arange(n, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(base)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _normal(seed, shape, std):
    """Near-normal float32 (sum of four 16-bit uniforms, exact integers) times std."""
    n = math.prod(shape)
    out = np.empty(n, np.float32)
    factor = np.float32(std / _UNIT)
    low = np.uint64(0x0000FFFF0000FFFF)
    for i in range(0, n, _CHUNK):
        m = min(_CHUNK, n - i)
        z = _bits(seed, i, m)
        a = (z & low) + ((z >> np.uint64(16)) & low)
        a = (a & np.uint64(0xFFFFFFFF)) + (a >> np.uint64(32))
        out[i : i + m] = a.astype(np.int64) - 131070
    out *= factor
    return out.reshape(shape)


def tensor(model, variant, key, shape, kind, std):
    seed = _seed(model, variant, key)
    x = _normal(seed, shape, std)
    if kind == "scale":  # normalisation gain around one
        x += np.float32(1.0)
    elif kind == "stdconv":
        # unequal spread and non-zero mean per output channel, so that the mean removal,
        # the division and the epsilon of weight standardisation all leave a trace
        co = shape[-1]
        e = (_bits(_seed(model, variant, key, "spread"), 0, co) % np.uint64(5)).astype(np.int32) - 2
        mean = _normal(_seed(model, variant, key, "mean"), (co,), 0.5 * std)
        x += mean
        x *= np.ldexp(np.float32(1.0), e).astype(np.float32)
    elif kind != "normal":
        raise ValueError(kind)
    return x


def weights(model, variant):
    """dict key -> float32 array."""
    return {k: tensor(model, variant, k, s, kind, std) for k, s, kind, std in layout(model, variant)}


def write(model, variant, path):
    """Write a checkpoint; no more than one array is in memory."""
    with zipfile.ZipFile(path, "w") as archive:
        for k, s, kind, std in layout(model, variant):
            with archive.open(f"{k}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, tensor(model, variant, k, s, kind, std))


def images(size):
    """uint8 [2, size, size, 3], NHWC: coarse 7-pixel cells plus pixel noise.

    A size written as e.g. "96flat" gives nearly constant images (two adjacent grey levels):
    convolution outputs become tiny and the epsilon of GroupNorm decides.
    """
    if str(size).endswith("flat"):
        size = int(str(size)[:-4])
        bit = _bits(_seed("images", str(size), "flat"), 0, 2 * size * size * 3) & np.uint64(1)
        out = bit.astype(np.uint8).reshape(2, size, size, 3)
        out[0] += np.uint8(128)
        out[1] += np.uint8(127)
        return out
    size = int(size)
    cells = -(-size // 7)
    coarse = _bits(_seed("images", str(size), "coarse"), 0, 2 * cells * cells * 3) % np.uint64(192)
    coarse = coarse.astype(np.uint8).reshape(2, cells, cells, 3)
    coarse = coarse.repeat(7, axis=1).repeat(7, axis=2)[:, :size, :size]
    fine = _bits(_seed("images", str(size), "fine"), 0, 2 * size * size * 3) % np.uint64(64)
    out = coarse + fine.astype(np.uint8).reshape(2, size, size, 3)
    out[1] >>= np.uint8(1)  # the second image is dark and low in contrast
    return out


def normalise(u8):
    """uint8 -> float32 in [-1, 1], as in the published pipelines."""
    return (u8.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)


def signs(n):
    """(8, n) of +-1: the sums of so many signed logits cover those that are not stored."""
    bits = _bits(_seed("signs", str(n)), 0, 8 * n) >> np.uint64(63)
    return (1 - 2 * bits.astype(np.int64)).reshape(8, n).astype(np.float64)


def expected(case):
    """What Google's code gave for `variant__model__image-size`."""
    with np.load(HERE / "expected" / f"{case}.npz") as archive:
        found = {key: archive[key] for key in archive.files}
    return found | {"meta": json.loads(str(found["meta"]))}
