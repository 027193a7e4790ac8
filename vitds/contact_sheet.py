"""Many small pictures on one sheet, each over its caption."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 12  # pixels, around the sheet and between tiles
_GAP = 4  # between pictures of one tile, and above its caption
_FONT_SIZE, _TITLE_SIZE = 14, 18
_MAX_CAPTION_LINES = 4
_PAPER, _INK, _FAINT = "white", "black", "#666666"


def beside(pictures: Sequence[Image.Image], side: int = 176) -> Image.Image:
    """Pictures in a row, each as large as fits a square of `side` pixels; small ones in whole pixels, not smoothed."""
    row = Image.new("RGB", (len(pictures) * (side + _GAP) - _GAP, side), _PAPER)
    for place, picture in enumerate(pictures):
        scale = min(side / picture.width, side / picture.height)
        scale = int(scale) if scale > 1 else scale
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        filter_ = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        left, top = place * (side + _GAP) + (side - size[0]) // 2, (side - size[1]) // 2
        row.paste(picture.convert("RGB").resize(size, filter_), (left, top))
    return row


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], title: str = "", columns: int = 4
) -> Image.Image:
    """Images in rows, each over its caption, under a title.

    The first line of a caption is what the image is called: black and cut in its middle where it is too long. The rest
    is grey and wrapped, up to four lines in all.
    """
    columns = min(len(images), columns)
    font, title_font = ImageFont.load_default(_FONT_SIZE), ImageFont.load_default(_TITLE_SIZE)
    width, height = max(image.width for image in images), max(image.height for image in images)
    lines = [_caption_lines(caption, font, width) for caption in captions]
    line_height, title_height = round(1.3 * _FONT_SIZE), round(1.3 * _TITLE_SIZE) + _MARGIN if title else 0
    rows = [range(first, min(first + columns, len(images))) for first in range(0, len(images), columns)]
    row_heights = [height + _GAP + line_height * max(len(lines[place]) for place in row) for row in rows]

    size = (columns * (width + _MARGIN) + _MARGIN, sum(row_heights) + (len(rows) + 1) * _MARGIN + title_height)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN), _cut(title, title_font, size[0] - 2 * _MARGIN), _INK, title_font)
    top = _MARGIN + title_height
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, place in enumerate(row):
            left = _MARGIN + column * (width + _MARGIN)
            image = images[place]
            sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
            for number, line in enumerate(lines[place]):
                at = (left, top + height + _GAP + number * line_height)
                draw.text(at, line, _FAINT if number else _INK, font)
        top += row_height + _MARGIN
    return sheet


def _caption_lines(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    name, *rest = caption.splitlines() or [""]
    lines = [_cut(name, font, width)]
    for paragraph in rest:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(_cut(line, font, width))
                longer = word
            line = longer
        lines.append(_cut(line, font, width))
    if len(lines) > _MAX_CAPTION_LINES:
        lines = [*lines[: _MAX_CAPTION_LINES - 1], _cut(lines[_MAX_CAPTION_LINES - 1] + " ...", font, width)]
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Text that fits, with dots for what its middle lost."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        shorter = f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"
        if font.getlength(shorter) <= width:
            return shorter
    return "..."
