"""Pictures of runs, drawn from their metrics.jsonl. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from vitds.errors import CheckpointError, did_you_mean

_COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bc4c00", "#57606a")
_INK, _SOFT, _GRID = "#1f2328", "#656d76", "#d8dee4"
_WIDTH, _HEIGHT, _MARGIN = 460, 300, 52

Series = tuple[str, list[tuple[float, float]], bool, str]  # name, points, drawn with dots, colour


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl.

    Raises: CheckpointError when the directory holds none, or is not there.
    """
    path = run_dir / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError:
        if run_dir.exists():
            raise CheckpointError("holds no metrics.jsonl: not a run", where=str(run_dir)) from None
        runs = sorted(path.parent.name for path in run_dir.parent.glob("*/metrics.jsonl"))
        fix = did_you_mean(run_dir.name, runs) if runs else ""
        raise CheckpointError("no such directory", where=str(run_dir), fix=fix) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from None


def draw_curves(run_dirs: Sequence[Path]) -> str:
    """Loss, and top-1 or mean average precision, over the steps of one or several runs, as one SVG."""
    losses: list[Series] = []
    accuracies: list[Series] = []
    precisions: list[Series] = []
    for index, run_dir in enumerate(run_dirs):
        lines = read_metrics(run_dir)
        name, colour = run_dir.resolve().name, _COLOURS[index % len(_COLOURS)]
        losses.append((f"{name} train", _points(lines, "train", "loss"), False, colour))
        losses.append((f"{name} val", _points(lines, "val", "loss"), True, colour))
        accuracies.append((f"{name} val", [(x, 100 * y) for x, y in _points(lines, "val", "top1")], True, colour))
        precisions.append((f"{name} val", [(x, 100 * y) for x, y in _points(lines, "val", "map")], True, colour))
    panels = [("loss", losses)] + [
        (title, series)
        for title, series in (("top-1, %", accuracies), ("mAP, %", precisions))
        if any(points for _, points, _, _ in series)
    ]
    body = [
        f'<g transform="translate({index * _WIDTH} 0)">{_panel(title, series)}</g>'
        for index, (title, series) in enumerate(panels)
    ]
    size = f'viewBox="0 0 {_WIDTH * len(panels)} {_HEIGHT}"'
    font = 'font-family="-apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif" font-size="12"'
    background = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>', background, *body, "</svg>\n"])


def _points(lines: list[dict[str, Any]], split: str, key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line["split"] == split and line.get(key) is not None]


def _panel(title: str, series: list[Series]) -> str:
    """Axes, grid, one line a series, and the names of the series at the top."""
    drawn = [one for one in series if one[1]]
    xs = [x for _, points, _, _ in drawn for x, _ in points] or [0, 1]
    ys = [y for _, points, _, _ in drawn for _, y in points] or [0, 1]
    x_ticks, y_ticks = _ticks(0, max(xs)), _ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _MARGIN + across * (_WIDTH - 1.5 * _MARGIN), _HEIGHT - 40 - up * (_HEIGHT - 40 - _MARGIN)

    parts = [f'<text x="{_MARGIN}" y="22" fill="{_INK}" font-size="14" font-weight="600">{escape(title)}</text>']
    for tick in y_ticks:
        (left, y), (right, _) = place(x_ticks[0], tick), place(x_ticks[-1], tick)
        parts.append(f'<path d="M{left:.1f} {y:.1f} H{right:.1f}" stroke="{_GRID}"/>')
        parts.append(f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="{_SOFT}">{tick:g}</text>')
    for tick in x_ticks:
        x, y = place(tick, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" fill="{_SOFT}">{tick:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle" fill="{_SOFT}">step</text>')
    for index, (name, points, dotted, colour) in enumerate(drawn):
        placed = [place(x, y) for x, y in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        width, opacity = (2, 1) if dotted else (1.3, 0.55)
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}"/>'
        )
        if dotted:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        last = f"{points[-1][1]:.4g}"
        legend = f"{escape(name)} {last}" if not dotted else f"● {escape(name)} {last}"
        parts.append(
            f'<text x="{_WIDTH - _MARGIN / 2}" y="{22 + 15 * index}" text-anchor="end" fill="{colour}" stroke="#ffffff"'
            f' stroke-width="3" paint-order="stroke">{legend}</text>'
        )
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that span [low, high]."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 7)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]
