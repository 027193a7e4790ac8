"""Small synthetic checkpoints as big_vision has written them over the years, in every layout that its own loader knows.

Every weight is drawn as in gen_npz, so the same bytes come out everywhere. `big_vision.npz` holds what big_vision's own
code (google-research/big_vision, models/vit.py: its `load`, then its model, float32, CPU) gave on these bytes for the
images of each of `SIZES`: `CASE/logits` is the model's output, `CASE/feature` what its head reads, `CASE/tokens` the
patches with their positions (first, second and last one, 8 channels).

big_vision resamples learned positions on square grids only, and not in bfloat16 (scipy refuses the type). For images
that are no squares the reference used the same call per axis (scipy.ndimage.zoom, order=1), for bfloat16 the same call
on the widened values.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import gen_npz

WIDTH, DEPTH, MLP, HEADS, PATCH, CLASSES = 32, 2, 64, 2, 8, 10
NATIVE = 32  # pixels; a grid of 4 x 4 patches
SIZES = ((32, 32), (48, 48), (24, 24), (32, 48))  # height, width: native, up, down, no square
EXPECTED = Path(__file__).parent / "big_vision.npz"


@dataclass(frozen=True)
class Case:
    """One file: the model that it is of, and how its arrays are named and stored."""

    pool: str  # tok | gap | map
    num_classes: int = CLASSES
    sincos: bool = False
    rep_size: int = 0
    prefix: str = ""
    scan: bool = False
    bfloat16: bool = False
    positions: str = "pos_embedding"
    class_slot: bool = False  # the positions have a row for the class token
    pre_linen: bool = False
    inlined_map: bool = False
    beside: tuple[str, ...] = ()  # arrays of something else in the same file


CASES = {
    "tok": Case("tok", prefix="params/", beside=("opt/0/mu/cls", "opt/0/count", "chrono/accum_train_time")),
    "tok-released": Case("tok"),
    "tok-optimizer": Case("tok", rep_size=WIDTH, prefix="opt/target/", beside=("opt/state/step", "extra/accum_time")),
    "tok-headless": Case("tok", num_classes=0, prefix="params/"),
    "gap": Case("gap", prefix="params/", bfloat16=True),
    "gap-sincos": Case("gap", sincos=True),
    "tok-sincos": Case("tok", sincos=True, prefix="params/", scan=True),
    "gap-rep": Case("gap", rep_size=24, prefix="params/"),
    "map": Case("map", rep_size=WIDTH, prefix="params/"),
    "map-two-towers": Case(
        "map",
        num_classes=0,
        prefix="params/img/",
        beside=("params/txt/Embed_0/embedding", "params/txt/head/kernel", "params/t", "params/b"),
    ),
    "map-scan": Case("map", prefix="params/", scan=True, bfloat16=True),
    "map-inlined": Case("map", prefix="opt/target/", inlined_map=True, beside=("opt/state/step",)),
    "old-positions": Case("gap", positions="Transformer/pos_embedding"),
    "old-class-slot": Case("tok", positions="Transformer/pos_embedding", class_slot=True),
    "very-old": Case("tok", positions="Transformer/posembed_input/pos_embedding", class_slot=True, pre_linen=True),
    "very-old-gap": Case("gap", positions="Transformer/posembed_input/pos_embedding", pre_linen=True),
}


def arrays(name: str) -> dict[str, np.ndarray]:
    """Every array of the case's file, by key; bfloat16 leaves as numpy stores them, void of two bytes."""
    case = CASES[name]
    found: dict[str, np.ndarray] = {}

    def draw(key: str, shape: tuple[int, ...], std: float) -> None:
        kind = "scale" if key.endswith("scale") else "normal"
        found[key] = gen_npz.tensor("big_vision", name, key, shape, kind, std)

    def dense(key: str, num_in: int, num_out: int) -> None:
        draw(f"{key}/kernel", (num_in, num_out), num_in**-0.5)
        draw(f"{key}/bias", (num_out,), 0.1)

    def norm(key: str) -> None:
        draw(f"{key}/scale", (WIDTH,), 0.2)
        draw(f"{key}/bias", (WIDTH,), 0.2)

    def attention(key: str) -> None:
        for projection in ("query", "key", "value"):
            draw(f"{key}/{projection}/kernel", (WIDTH, HEADS, WIDTH // HEADS), 1.25 * WIDTH**-0.5)
            draw(f"{key}/{projection}/bias", (HEADS, WIDTH // HEADS), 0.1)
        draw(f"{key}/out/kernel", (HEADS, WIDTH // HEADS, WIDTH), WIDTH**-0.5)
        draw(f"{key}/out/bias", (WIDTH,), 0.1)

    def mlp(key: str) -> None:
        dense(f"{key}/Dense_0", WIDTH, MLP)
        dense(f"{key}/Dense_1", MLP, WIDTH)

    draw("embedding/kernel", (PATCH, PATCH, 3, WIDTH), 1.5 / (PATCH * 3**0.5))
    draw("embedding/bias", (WIDTH,), 0.1)
    if case.pool == "tok":
        draw("cls", (1, 1, WIDTH), 0.3)
    if not case.sincos:
        draw(case.positions, (1, (NATIVE // PATCH) ** 2 + case.class_slot, WIDTH), 0.2)
    # Before Linen, flax counted all modules of a parent together, after it every kind on its own.
    second_norm, attends, mixes = (2, 1, 3) if case.pre_linen else (1, 0, 0)
    for block in (f"Transformer/encoderblock_{i}" for i in range(DEPTH)):
        norm(f"{block}/LayerNorm_0")
        attention(f"{block}/MultiHeadDotProductAttention_{attends}")
        norm(f"{block}/LayerNorm_{second_norm}")
        mlp(f"{block}/MlpBlock_{mixes}")
    norm("Transformer/encoder_norm")
    if case.pool == "map":
        head = "" if case.inlined_map else "MAPHead_0/"
        draw(f"{head}probe", (1, 1, WIDTH), 1.0)
        attention(f"{head}MultiHeadDotProductAttention_0")
        norm(f"{head}LayerNorm_0")
        mlp(f"{head}MlpBlock_0")
    if case.rep_size:
        dense("pre_logits", WIDTH, case.rep_size)
    if case.num_classes:
        dense("head", case.rep_size or WIDTH, case.num_classes)

    if case.scan:
        first = [key for key in found if key.startswith("Transformer/encoderblock_0/")]
        stacks = {key: [found.pop(key.replace("_0/", f"_{i}/", 1)) for i in range(DEPTH)] for key in first}
        found |= {key.replace("_0/", "/", 1): np.stack(layers) for key, layers in stacks.items()}
    if case.bfloat16:  # every other array: mixed files exist
        found |= {key: _to_bfloat16(found[key]) for key in list(found)[::2]}
    found = {case.prefix + key: array for key, array in found.items()}
    return found | {key: gen_npz.tensor("big_vision", name, key, (3, 4), "normal", 1.0) for key in case.beside}


def write(name: str, path: Path) -> None:
    """Write the case's file."""
    np.savez(path, **arrays(name))


def images(height: int, width: int) -> np.ndarray:
    """float32 (2, height, width, 3) in [-1, 1]."""
    return gen_npz.normalise(gen_npz.images(max(height, width)))[:, :height, :width]


def expected(name: str, height: int, width: int) -> dict[str, np.ndarray]:
    """What big_vision's code gave: logits, feature, tokens."""
    with np.load(EXPECTED) as archive:
        return {
            part: archive[f"{name}/{part}"][SIZES.index((height, width))] for part in ("logits", "feature", "tokens")
        }


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Cut to the upper 16 bits, in the type that numpy reads a stored bfloat16 as."""
    return (array.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.dtype("V2"))
