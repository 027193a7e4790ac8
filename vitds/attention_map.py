"""Where a ViT looks: attention rollout, the heads of the last block, and a picture of both with the predictions.

Works on any model with `blocks[i].attn.probabilities(x)`, `spec.pooling`, `grid_hw` and `num_prefix_tokens`. The
attention matrices are computed beside the forward pass, one block at a time, and never kept for all blocks at once.

Shapes: B images, N heads, T tokens, gh gw rows and columns of the patch grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def attention_rollout(model: Any, images: Tensor) -> Tensor:
    """How much of each patch reaches the output when attention is followed through all blocks.

    Per block: the mean over heads, plus the identity for the residual, each row scaled to sum 1; the product of these
    over the blocks is read at the class token, or without one as the mean over the patches' rows.

    Shapes: (B, C, H, W) -> (B, gh, gw), float32.
    Source: "Quantifying Attention Flow in Transformers" (Abnar and Zuidema, 2020).
    """
    identity_TT = torch.eye(model.num_prefix_tokens + math.prod(model.grid_hw), device=images.device)
    rollout = identity_TT

    def follow(attention_BNTT: Tensor) -> None:
        nonlocal rollout
        mixing_BTT = attention_BNTT.mean(dim=1) + identity_TT
        rollout = mixing_BTT / mixing_BTT.sum(dim=-1, keepdim=True) @ rollout

    _watch(model, images, model.blocks, follow)
    return _on_grid(model, rollout)


def last_layer_attention(model: Any, images: Tensor) -> Tensor:
    """The last block's attention from the class token (or the mean over patches) to each patch, head by head.

    Shapes: (B, C, H, W) -> (B, N, gh, gw), float32.
    """
    seen: list[Tensor] = []
    _watch(model, images, model.blocks[-1:], seen.append)
    return _on_grid(model, seen[0])


def _watch(model: Any, images: Tensor, blocks: Iterable[Any], look: Callable[[Tensor], None]) -> None:
    """Run the model in evaluation mode and show `look` the attention (B, N, T, T) of each of `blocks`, in order."""
    hooks = [
        block.attn.register_forward_pre_hook(lambda attn, inputs: look(attn.probabilities(inputs[0]).float()))
        for block in blocks
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model.features(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _on_grid(model: Any, attention: Tensor) -> Tensor:
    """What the model's output takes from each patch. Shapes: (..., T, T) -> (..., gh, gw)."""
    num_prefix = model.num_prefix_tokens
    row = attention[..., 0, :] if model.spec.pooling == "token" else attention[..., num_prefix:, :].mean(dim=-2)
    return row[..., num_prefix:].unflatten(-1, model.grid_hw)


# The picture. All lengths are in pixels; the drawing is laid out for a page 1600 wide.
_PAGE, _MARGIN, _GAP, _TILE_GAP = 1600, 48, 32, 16
_PICTURE, _LARGEST_TILE, _MAX_COLUMNS, _BAR_STEP = 460, 237, 8, 78
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
) -> Image.Image:
    """One panel: the image, the rollout over it, the most likely classes as bars, the last block's heads as tiles.

    Shapes: image uint8 (H, W) or (H, W, 1 or 3); rollout (gh, gw); heads (N, gh, gw); predictions (name, probability),
        most likely first.
    """
    picture = _fit(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB"), _PICTURE)
    width, height = picture.size
    rows = -(-len(heads) // _MAX_COLUMNS)
    columns = -(-len(heads) // rows)
    longest = min((_PAGE - 2 * _MARGIN - (columns - 1) * _TILE_GAP) // columns, _LARGEST_TILE)
    tile = _fit(picture, longest)
    tile_step = tile.height + 46

    top = _MARGIN + 76
    heads_top = top + max(height + 84, 5 * _BAR_STEP)
    page = Image.new("RGB", (_PAGE, heads_top + 46 + rows * tile_step + 16), _PAPER)
    draw = ImageDraw.Draw(page)
    room = _PAGE - 2 * _MARGIN - draw.textlength(subtitle, _font(22)) - _GAP
    draw.text((_MARGIN, _MARGIN - 8), _shorten(title, room, _font(34)), _INK, _font(34))
    draw.text((_PAGE - _MARGIN, _MARGIN + 4), subtitle, _FAINT, _font(22), anchor="ra")

    page.paste(picture, (_MARGIN, top))
    draw.text((_MARGIN, top + height + 12), "input", _FAINT, _font(22))
    left = _MARGIN + width + _GAP
    page.paste(_overlay(picture, rollout, smooth=True), (left, top))
    draw.text((left, top + height + 12), "attention rollout", _FAINT, _font(22))
    if width >= 400:
        _draw_colour_bar(page, draw, rollout / rollout.mean(), left + width, top + height + 14)
    _draw_predictions(draw, predictions, left + width + _GAP + 16, top)

    draw.text((_MARGIN, heads_top), "last block, head by head", _INK, _font(24))
    for index, head in enumerate(heads):
        x = _MARGIN + index % columns * (tile.width + _TILE_GAP)
        y = heads_top + 46 + index // columns * tile_step
        page.paste(_overlay(tile, head, smooth=False), (x, y))
        draw.text((x, y + tile.height + 6), str(index + 1), _FAINT, _font(18))
    return page


def stack_panels(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels of `draw_attention` below one another."""
    page = Image.new("RGB", (_PAGE, sum(panel.height for panel in panels)), _PAPER)
    top = 0
    for panel in panels:
        page.paste(panel, (0, top))
        top += panel.height
    return page


def _draw_colour_bar(page: Image.Image, draw: ImageDraw.ImageDraw, relative: np.ndarray, right: int, y: int) -> None:
    """The colours with what they stand for: attention as a multiple of its mean over the patches."""
    most = f"{relative.max():.1f} x mean"
    bar = _heat_map(np.linspace(0, 1, 128)[None], (96, 12), smooth=True)
    bar_left = right - round(draw.textlength(most, _font(18))) - 10 - bar.width
    page.paste(bar, (bar_left, y + 5))
    draw.text((bar_left - 10, y), f"{relative.min():.1f}", _FAINT, _font(18), anchor="ra")
    draw.text((right, y), most, _FAINT, _font(18), anchor="ra")


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
    """Cut a text until it fits into `room` pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip(" ,") + "…"


def _fit(image: Image.Image, longest: int) -> Image.Image:
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
