"""Google's .npz layouts: which array is which parameter, and what model the shapes tell. No torch.

    classic      gs://vit_models/{imagenet21k,imagenet21k+imagenet2012,augreg}/*.npz
    big_vision   gs://big_vision/**.npz and what its training writes, back to the layouts that only its own
                 `fix_old_checkpoints` still knows
    W width, F mlp width, N heads, K head width, P patch size, C classes or channels, T tokens

Both hold the same arrays. `Dialect` is what differs: what stands before the names, how modules are numbered, where the
positions are and whether the class token has one. `google_layout` is the one table: the conversion to our parameter
names, and back, is read off it.

Source: google-research/vision_transformer, vit_jax/checkpoint.py; google-research/big_vision, models/vit.py, utils.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vitds.errors import WeightError
from vitds.layouts.array import ForeignArray, Shapes, vote
from vitds.layouts.found import Found
from vitds.model.registry import ModelSpec, grid_size, pixels_per_token

_USUAL_SIZE = 224  # pixels, for a file that does not tell its image size
_NUM_SHOWN = 3
# big_vision's loader takes `params` or `opt/target` when a file has them, and the image tower as `img` of that.
_PREFIX = re.compile(r"((?:params/|opt/target/)?(?:img/)?)(?:Transformer/|embedding/|conv_root/)")
_BLOCK = r"Transformer/encoderblock(?:_\d+)?"


@dataclass(frozen=True)
class Dialect:
    """How one generation of Google's code names and stores the same arrays.

    `prefix` stands before every key. `linen` counts the modules of each kind on their own, the code before it counted
    all of a parent together. `positions` is the key of the position embeddings, None when they are computed (sincos2d);
    `class_row` says that their first row is the class token's. `stacked` has all blocks in one array, along a new first
    axis. `map_head` stands before the arrays of the pooling head.
    """

    prefix: str = ""
    linen: bool = False
    positions: str | None = "Transformer/posembed_input/pos_embedding"
    class_row: bool = True
    stacked: bool = False
    map_head: str = "MAPHead_0/"


CLASSIC = Dialect()


def recognises(shapes: Shapes) -> bool:
    """True for a file that names arrays as Google does, with slashes."""
    return any("/" in key for key in shapes)


def read_layout(shapes: Shapes) -> Found:
    """The model that the shapes tell, and the arrays that such a file holds."""
    prefixes = Counter(match[1] for key in shapes if (match := _PREFIX.match(key)))
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    outside = [key for key in shapes if not key.startswith(prefix)]
    notes = []
    if outside:
        shown = ", ".join(outside[:_NUM_SHOWN]) + ", ..." * (len(outside) > _NUM_SHOWN)
        notes.append(f'{len(outside)} arrays outside of "{prefix}" are left out: {shown}')

    dialect = replace(_dialect(inside), prefix=prefix)
    spec, unknown = _infer(inside, dialect)
    num_classes = vote(inside, r"head/(kernel|bias)", -1) or 0
    pre_logits = vote(inside, r"pre_logits/(kernel|bias)", -1)
    if pre_logits is not None and not num_classes:
        left_out = [prefix + key for key in inside if key.startswith("pre_logits/")]
        outside, pre_logits = outside + left_out, None
        notes.append("pre_logits without a head are left out: the model gives the features before them")

    pixels = pixels_per_token(spec)
    if dialect.positions is None and spec.width % 4:  # the formula gives fours of channels
        dialect = replace(dialect, positions="pos_embedding")
    if dialect.positions is None:
        grid = max(_USUAL_SIZE // pixels, 1)
        notes.append(f"no positions: sincos2d, computed; no image size: {grid * pixels} px assumed, any other is exact")
    else:
        num_rows = vote(inside, re.escape(dialect.positions), -2) or 1
        grid = max(math.isqrt(max(num_rows - dialect.class_row, 1)), 1)
    num_positions = grid * grid + (spec.pooling == "token")
    arrays = tuple(google_layout(spec, num_positions, num_classes, pre_logits, dialect))
    size = (grid * pixels, grid * pixels)
    return Found(spec, size, num_classes, pre_logits, arrays, unknown, frozenset(outside), tuple(notes))


def _dialect(shapes: Shapes) -> Dialect:
    """Which dialect keys without their prefix are in; the classic one, when nothing tells."""
    kinds = Counter(match[1] for key in shapes if (match := re.match(rf"{_BLOCK}/\w+Attention_([01])/", key)))
    linen = kinds["0"] > kinds["1"]
    places = ("pos_embedding", "Transformer/pos_embedding", CLASSIC.positions)
    positions = next((key for key in places if key in shapes), None if linen else CLASSIC.positions)
    num_rows = vote(shapes, re.escape(positions), -2) if positions else None
    if num_rows is None or math.isqrt(num_rows) ** 2 == num_rows:
        class_row = num_rows is None and positions is not None
    else:  # the class token's row, or a mistake
        class_row = math.isqrt(num_rows - 1) ** 2 == num_rows - 1 or "cls" in shapes
    return Dialect(
        linen=linen,
        positions=positions,
        class_row=class_row,
        stacked=any(key.startswith("Transformer/encoderblock/") for key in shapes),
        map_head="" if "probe" in shapes else CLASSIC.map_head,
    )


def google_layout(
    spec: ModelSpec, num_positions: int, num_classes: int, pre_logits: int | None, dialect: Dialect = CLASSIC
) -> Iterator[ForeignArray]:
    """Every array of Google's file for this model; GroupNorm vectors in their published shape (1, 1, 1, C).

    `num_positions` counts our own: patches, and the class token.

    Raises: WeightError for a model with parts that the layout has no place for.
    """
    if spec.registers or spec.layer_scale is not None or spec.qk_norm:
        raise WeightError(
            f"Google's layout has no place for all of {spec.name}",
            fix="it has no register tokens, no LayerScale, and no norm of queries and keys",
        )
    for array in _layout(spec, num_positions, num_classes, pre_logits, dialect):
        yield replace(array, key=dialect.prefix + array.key) if array.key else array


def written_layout(
    spec: ModelSpec, image_size: tuple[int, int], num_classes: int, pre_logits: int | None
) -> tuple[ForeignArray, ...]:
    """What vitds writes: the published files' layout, and big_vision's for the models that only its code knows.

    Raises: WeightError as `google_layout`, ConfigError when the image size does not fit the patches.
    """
    is_learned, has_class_token = spec.positions == "learned", spec.pooling == "token"
    dialect = CLASSIC
    if not (is_learned and has_class_token):
        dialect = Dialect(linen=True, positions="pos_embedding" if is_learned else None, class_row=False)
    grid_h, grid_w = grid_size(spec, image_size)
    num_positions = grid_h * grid_w + has_class_token
    return tuple(google_layout(spec, num_positions, num_classes, pre_logits, dialect))


def _layout(
    spec: ModelSpec, num_positions: int, num_classes: int, pre_logits: int | None, dialect: Dialect
) -> Iterator[ForeignArray]:
    width, channels = spec.width, spec.in_channels
    if spec.resnet is not None:
        yield from _stem(spec)
        channels = spec.resnet_width * (4 * 2 ** (len(spec.resnet) - 1) if spec.resnet else 1)

    patch = spec.patch_size
    yield ForeignArray("embedding/kernel", (patch, patch, channels, width), "patch_embed.weight", move="conv")
    yield ForeignArray("embedding/bias", (width,), "patch_embed.bias")
    has_class_token = spec.pooling == "token"
    if has_class_token:
        yield ForeignArray("cls", (1, 1, width), "cls_token")
    if dialect.positions is None:
        yield ForeignArray("", (1, num_positions, width), "pos_embed", move="sincos2d")
    elif dialect.class_row or not has_class_token:
        yield ForeignArray(dialect.positions, (1, num_positions, width), "pos_embed")
    else:
        yield ForeignArray(dialect.positions, (1, num_positions - 1, width), "pos_embed", move="patches")
    for i in range(spec.depth):
        for array in _block(spec, f"blocks.{i}", dialect.linen):
            if dialect.stacked:
                key, shape = f"Transformer/encoderblock/{array.key}", (spec.depth, *array.shape)
                yield replace(array, key=key, shape=shape, layer=i)
            else:
                yield replace(array, key=f"Transformer/encoderblock_{i}/{array.key}")
    yield from _norm("Transformer/encoder_norm", "norm", (width,))
    if spec.pooling == "map":
        yield from _map_head(spec, dialect.map_head)
    if pre_logits is not None:
        yield from _dense("pre_logits", "head.pre_logits", width, pre_logits)
    if num_classes:
        yield from _dense("head", "head", pre_logits or width, num_classes)


def _block(spec: ModelSpec, ours: str, linen: bool) -> Iterator[ForeignArray]:
    attention, second_norm, mlp = (0, 1, 0) if linen else (1, 2, 3)
    yield from _norm("LayerNorm_0", f"{ours}.norm1", (spec.width,))
    theirs = f"MultiHeadDotProductAttention_{attention}"
    for part, projection in enumerate(("query", "key", "value")):
        yield from _projection(f"{theirs}/{projection}", f"{ours}.attn.qkv", spec, part)
    yield from _out(f"{theirs}/out", f"{ours}.attn.proj", spec)
    yield from _norm(f"LayerNorm_{second_norm}", f"{ours}.norm2", (spec.width,))
    yield from _mlp(f"MlpBlock_{mlp}", f"{ours}.mlp", spec)


def _map_head(spec: ModelSpec, theirs: str) -> Iterator[ForeignArray]:
    attention = f"{theirs}MultiHeadDotProductAttention_0"
    yield ForeignArray(f"{theirs}probe", (1, 1, spec.width), "attn_pool.latent")
    yield from _projection(f"{attention}/query", "attn_pool.q", spec)
    yield from _projection(f"{attention}/key", "attn_pool.kv", spec, 0)
    yield from _projection(f"{attention}/value", "attn_pool.kv", spec, 1)
    yield from _out(f"{attention}/out", "attn_pool.proj", spec)
    yield from _norm(f"{theirs}LayerNorm_0", "attn_pool.norm", (spec.width,))
    yield from _mlp(f"{theirs}MlpBlock_0", "attn_pool.mlp", spec)


def _stem(spec: ModelSpec) -> Iterator[ForeignArray]:
    root = spec.resnet_width
    yield ForeignArray("conv_root/kernel", (7, 7, spec.in_channels, root), "stem.conv_root.weight", move="conv")
    yield from _norm("gn_root", "stem.gn_root", (1, 1, 1, root))
    channels = root
    for block, units in enumerate(spec.resnet or (), start=1):
        inner = root * 2 ** (block - 1)
        for unit in range(1, units + 1):
            convolutions = [("1", 1, channels, inner), ("2", 3, inner, inner), ("3", 1, inner, 4 * inner)]
            if unit == 1:
                convolutions.append(("_proj", 1, channels, 4 * inner))
            theirs, ours = f"block{block}/unit{unit}", f"stem.block{block}.unit{unit}"
            for suffix, size, fan_in, fan_out in convolutions:
                shape = (size, size, fan_in, fan_out)
                yield ForeignArray(f"{theirs}/conv{suffix}/kernel", shape, f"{ours}.conv{suffix}.weight", move="conv")
                yield from _norm(f"{theirs}/gn{suffix}", f"{ours}.gn{suffix}", (1, 1, 1, fan_out))
            channels = 4 * inner


def _norm(theirs: str, ours: str, shape: tuple[int, ...]) -> Iterator[ForeignArray]:
    yield ForeignArray(f"{theirs}/scale", shape, f"{ours}.weight", move="flat")
    yield ForeignArray(f"{theirs}/bias", shape, f"{ours}.bias", move="flat")


def _dense(theirs: str, ours: str, num_in: int, num_out: int) -> Iterator[ForeignArray]:
    yield ForeignArray(f"{theirs}/kernel", (num_in, num_out), f"{ours}.weight", move="dense")
    yield ForeignArray(f"{theirs}/bias", (num_out,), f"{ours}.bias")


def _projection(theirs: str, ours: str, spec: ModelSpec, part: int | None = None) -> Iterator[ForeignArray]:
    heads, head_width = spec.heads, spec.width // spec.heads
    yield ForeignArray(f"{theirs}/kernel", (spec.width, heads, head_width), f"{ours}.weight", part, "query")
    yield ForeignArray(f"{theirs}/bias", (heads, head_width), f"{ours}.bias", part, "flat")


def _out(theirs: str, ours: str, spec: ModelSpec) -> Iterator[ForeignArray]:
    shape = (spec.heads, spec.width // spec.heads, spec.width)
    yield ForeignArray(f"{theirs}/kernel", shape, f"{ours}.weight", move="out")
    yield ForeignArray(f"{theirs}/bias", (spec.width,), f"{ours}.bias")


def _mlp(theirs: str, ours: str, spec: ModelSpec) -> Iterator[ForeignArray]:
    yield from _dense(f"{theirs}/Dense_0", f"{ours}.fc1", spec.width, spec.mlp)
    yield from _dense(f"{theirs}/Dense_1", f"{ours}.fc2", spec.mlp, spec.width)


def _infer(shapes: Shapes, dialect: Dialect) -> tuple[ModelSpec, list[str]]:
    """Read the architecture off the shapes, and list what they do not tell.

    Where arrays disagree the majority decides, so that a single wrong one is found by comparing with the result.
    """
    blocks = {int(m[1]) for key in shapes if (m := re.match(r"Transformer/encoderblock_(\d{1,3})/", key))}
    depth = vote(shapes, r"Transformer/encoderblock/.*", 0) if dialect.stacked else max(blocks, default=-1) + 1
    units: Counter[int] = Counter()
    for key in shapes:
        if m := re.match(r"block(\d)/unit(\d{1,2})/", key):
            units[int(m[1])] = max(units[int(m[1])], int(m[2]))
    is_hybrid = bool(units) or "conv_root/kernel" in shapes
    votes = {
        "width": vote(shapes, rf"{_BLOCK}/LayerNorm_[012]/(scale|bias)", -1),
        "heads": vote(shapes, rf"{_BLOCK}/MultiHeadDotProductAttention_[01]/(query|key|value)/(kernel|bias)", -2),
        "mlp": vote(shapes, rf"{_BLOCK}/MlpBlock_[03]/Dense_0/(kernel|bias)", -1),
        "patch_size": vote(shapes, "embedding/kernel", -4),
        "in_channels": vote(shapes, "conv_root/kernel" if is_hybrid else "embedding/kernel", -2),
    }
    if is_hybrid:
        votes["resnet_width"] = vote(shapes, r"conv_root/kernel|gn_root/(scale|bias)", -1)
    sizes: dict[str, Any] = {quantity: size or 1 for quantity, size in votes.items()}
    if is_hybrid:
        sizes["resnet"] = tuple(units[stage] for stage in range(1, max(units, default=0) + 1))
    if "cls" in shapes or dialect.class_row:
        sizes["pooling"] = "token"
    else:
        sizes["pooling"] = "map" if any(re.match("probe|MAPHead_0/", key) for key in shapes) else "gap"
    if dialect.positions is None:
        sizes["positions"] = "sincos2d"
    unknown = [quantity for quantity, size in votes.items() if not size]
    return ModelSpec(name="", depth=depth or 0, **sizes), unknown
