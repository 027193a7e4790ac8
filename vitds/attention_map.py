"""Where a ViT looks: attention rollout, the heads of one layer, and a picture of both with the predictions.

Works on any `VisionTransformer`. The attention matrices are computed beside the forward pass, one head of one block at
a time, and none is kept: what is in memory is a few (T, T), whatever the depth and the number of heads.

Shapes: B images, N heads, T tokens, gh gw rows and columns of the patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """What one forward pass showed: the model's output, and how its feature depends on each patch.

    Shapes: output (B, L), or (B, D) without a head; rollout (B, gh, gw); heads (B, N, gh, gw); float32, on the CPU.
    """

    output: Tensor
    rollout: Tensor
    heads: Tensor


@torch.no_grad()
def attention_maps(model: Any, images: Tensor, layer: int | None = None) -> AttentionMaps:
    """Run the model and follow its attention.

    Rollout, per block: the mean over heads, plus the identity for the residual, each row scaled to sum 1; the product
    of these over the blocks. It is read at what the head sees: the class token's row, the mean over the patches' rows,
    or the rows that the attention pool takes, in its proportions.

    The heads are those of block `layer`, from 1 or, backwards, from -1, read at the same rows (all patches' for an
    attention pool). None is where attention is last paid: the attention pool's own query, else the last block.

    Source: "Quantifying Attention Flow in Transformers" (Abnar and Zuidema, 2020).
    """
    depth, num_prefix = len(model.blocks), model.num_prefix_tokens
    if layer is not None and not 1 <= abs(layer) <= depth:
        raise ValueError(f"layer {layer} of {depth}")
    chosen = depth - 1 if layer is None else layer - 1 if layer > 0 else depth + layer
    rollout_BTT: Tensor | None = None
    heads: list[Tensor] = []
    pool_BNT: Tensor | None = None

    def read(rows: Tensor) -> Tensor:
        """What the output takes from each patch. Shapes: (B, T, T) -> (B, gh, gw)."""
        # A copy: a view would keep the matrix, and see what becomes of it.
        row = rows[:, 0].clone() if model.spec.pooling == "token" else rows[:, num_prefix:].mean(dim=1)
        return row[:, num_prefix:].unflatten(1, model.grid_hw)

    def follow(index: int, attention: Any, tokens: Tensor) -> None:
        nonlocal rollout_BTT
        mixing_BTT: Tensor | None = None
        for head_BTT in attention.probabilities(tokens):
            head_BTT = head_BTT.float()
            if index == chosen:
                heads.append(read(head_BTT))
            mixing_BTT = head_BTT if mixing_BTT is None else mixing_BTT.add_(head_BTT)
        assert mixing_BTT is not None
        mixing_BTT.div_(attention.heads).diagonal(dim1=1, dim2=2).add_(1)
        mixing_BTT.div_(mixing_BTT.sum(dim=2, keepdim=True))
        rollout_BTT = mixing_BTT if rollout_BTT is None else mixing_BTT @ rollout_BTT

    def follow_pool(pool: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal pool_BNT
        pool_BNT = pool.probabilities(inputs[0]).float()

    hooks = [
        block.attn.register_forward_pre_hook(lambda attention, inputs, i=index: follow(i, attention, inputs[0]))
        for index, block in enumerate(model.blocks)
    ]
    if model.attn_pool is not None:
        hooks.append(model.attn_pool.register_forward_pre_hook(follow_pool))
    was_training = model.training
    model.eval()
    try:
        output = model(images).float().cpu()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    assert rollout_BTT is not None
    if pool_BNT is None:
        return AttentionMaps(output, read(rollout_BTT).cpu(), torch.stack(heads, dim=1).cpu())
    reached_BT = (pool_BNT.mean(dim=1, keepdim=True) @ rollout_BTT)[:, 0]
    rollout = reached_BT[:, num_prefix:].unflatten(1, model.grid_hw)
    own = pool_BNT[..., num_prefix:].unflatten(2, model.grid_hw)
    return AttentionMaps(output, rollout.cpu(), (own if layer is None else torch.stack(heads, dim=1)).cpu())


# The picture. All lengths are in pixels; the drawing is laid out for a page 1600 wide.
_PAGE, _MARGIN, _GAP, _TILE_GAP = 1600, 48, 32, 16
_PICTURE, _LARGEST_TILE, _TALLEST_TILE, _MAX_COLUMNS, _BAR_STEP = 460, 364, 1.3, 8, 84
_NARROWEST = 250  # room for the colour bar below a picture
_INK, _FAINT, _PAPER, _TRACK, _BAR = "#1b1b1f", "#74747c", "#ffffff", "#eeeef1", "#bc3754"
# matplotlib's "inferno" at 0, 0.1, ... 1: lightness rises evenly, so it also reads in grey and to the colour-blind.
_INFERNO = np.array(
    [
        [0, 0, 4], [22, 11, 57], [66, 10, 104], [106, 23, 110], [147, 38, 103], [188, 55, 84],
        [221, 81, 58], [243, 120, 25], [252, 165, 10], [246, 215, 70], [252, 255, 164],
    ],
    dtype=np.float32,
)  # fmt: skip


def draw_attention(
    image: np.ndarray,
    rollout: np.ndarray,
    heads: np.ndarray,
    predictions: Sequence[tuple[str, float]],
    title: str = "",
    subtitle: str = "",
    heads_title: str = "",
) -> Image.Image:
    """One page: the image, the rollout over it, the most likely classes as bars, the heads of one layer as tiles.

    Shapes: image uint8 (H, W) or (H, W, 1 or 3); rollout (gh, gw); heads (N, gh, gw); predictions (name, probability),
        most likely first.
    """
    picture = _fit(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB"), _PICTURE)
    width, height = picture.size
    rows = -(-len(heads) // _MAX_COLUMNS)
    columns = -(-len(heads) // rows)
    column_width = min((_PAGE - 2 * _MARGIN - (columns - 1) * _TILE_GAP) // columns, _LARGEST_TILE)
    # A portrait may be taller than its column is wide, within reason.
    tile = _fit(picture, min(column_width * max(height / width, 1), column_width * _TALLEST_TILE))
    tile_step = tile.height + 46

    top = _MARGIN + 96
    heads_top = top + max(height + 106, 5 * _BAR_STEP)
    page = Image.new("RGB", (_PAGE, heads_top + 46 + rows * tile_step + 16), _PAPER)
    draw = ImageDraw.Draw(page)
    room = _PAGE - 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN - 8), _shorten(title, room, _font(34)), _INK, _font(34))
    draw.text((_MARGIN, _MARGIN + 40), _shorten(subtitle, room, _font(22)), _FAINT, _font(22))

    page.paste(picture, (_MARGIN, top))
    draw.text((_MARGIN, top + height + 12), "input", _FAINT, _font(22))
    left = _MARGIN + width + _GAP
    page.paste(_overlay(picture, rollout, smooth=True), (left, top))
    column = left + max(width, _NARROWEST)
    draw.text((left, top + height + 12), "attention rollout", _FAINT, _font(22))
    _draw_colour_bar(page, draw, _relative(rollout), left, top + height + 46)
    _draw_predictions(draw, predictions, column + _GAP + 16, top)

    draw.text((_MARGIN, heads_top), _shorten(heads_title, room, _font(24)), _INK, _font(24))
    for index, head in enumerate(heads):
        x = _MARGIN + index % columns * (tile.width + _TILE_GAP)
        y = heads_top + 46 + index // columns * tile_step
        page.paste(_overlay(tile, head, smooth=False), (x, y))
        draw.text((x, y + tile.height + 6), str(index + 1), _FAINT, _font(18))
        multiple = f"{_multiple(_relative(head).max())} x"
        for most in (f"up to {multiple} mean", multiple):
            if tile.width >= draw.textlength(most, _font(18)) + 36:
                draw.text((x + tile.width, y + tile.height + 6), most, _FAINT, _font(18), anchor="ra")
                break
    return page


def _relative(values: np.ndarray) -> np.ndarray:
    """Attention as a multiple of its mean over the patches."""
    return values / max(float(values.mean()), 1e-12)


def _multiple(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:.0f}"


def _draw_colour_bar(page: Image.Image, draw: ImageDraw.ImageDraw, relative: np.ndarray, left: int, y: int) -> None:
    """The colours with what they stand for."""
    least, most = _multiple(relative.min()), f"{_multiple(relative.max())} x mean"
    draw.text((left, y), least, _FAINT, _font(18))
    left += round(draw.textlength(least, _font(18))) + 10
    bar = _heat_map(np.linspace(0, 1, 128)[None], (96, 12), smooth=True)
    page.paste(bar, (left, y + 5))
    draw.text((left + bar.width + 10, y), most, _FAINT, _font(18))


def _draw_predictions(draw: ImageDraw.ImageDraw, predictions: Sequence[tuple[str, float]], left: int, top: int) -> None:
    right = _PAGE - _MARGIN
    for index, (name, probability) in enumerate(predictions):
        y = top + index * _BAR_STEP
        colour, font = _INK if index == 0 else _FAINT, _font(24)
        number = f"{100 * probability:.1f} %" if probability >= 0.0005 else "< 0.1 %"
        draw.text((right, y), number, colour, font, anchor="ra")
        draw.text((left, y), _shorten(name, right - left - draw.textlength(number, font) - 16, font), colour, font)
        draw.rectangle((left, y + 38, right, y + 47), _TRACK)
        draw.rectangle((left, y + 38, left + max(round(probability * (right - left)), 2), y + 47), _BAR)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(text: str, room: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A text in one line, cut until it fits into `room` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip(" ,") + "…"


def _fit(image: Image.Image, longest: float) -> Image.Image:
    """Scale the longer side to `longest`; pixels of a tiny image stay visible as squares."""
    scale = longest / max(image.size)
    method = Image.Resampling.NEAREST if max(image.size) <= 64 < longest else Image.Resampling.LANCZOS
    return image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), method)


def _overlay(image: Image.Image, values: np.ndarray, smooth: bool) -> Image.Image:
    """Values as colours over the image in grey."""
    return Image.blend(image.convert("L").convert("RGB"), _heat_map(values, image.size, smooth), 0.7)


def _heat_map(values: np.ndarray, size_wh: tuple[int, int], smooth: bool) -> Image.Image:
    """Values from their least to their greatest as colours, scaled to `size_wh`."""
    values = values.astype(np.float32)
    values = (values - values.min()) / max(float(values.max() - values.min()), 1e-12)
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    scaled = np.clip(np.asarray(Image.fromarray(values).resize(size_wh, method)), 0, 1) * (len(_INFERNO) - 1)
    below = np.minimum(scaled.astype(int), len(_INFERNO) - 2)
    fraction = (scaled - below)[..., None]
    return Image.fromarray((_INFERNO[below] * (1 - fraction) + _INFERNO[below + 1] * fraction).round().astype(np.uint8))
