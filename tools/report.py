#!/usr/bin/env python3
"""Draw the curves of one run, or of several over each other: loss, and top-1 or mAP, over the steps.

python tools/report.py runs/NAME                       writes runs/NAME/curves.svg
python tools/report.py runs/A runs/B --output ab.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from vitds.arguments import ToolParser
from vitds.errors import UsageError, exit_with
from vitds.report import draw_curves


def main() -> None:
    """Read the metrics, write one SVG."""
    parser = ToolParser(__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    parser.add_argument("--output", metavar="FILE", type=Path, help="else curves.svg in the first RUN")
    args = parser.parse()
    output = args.output or args.runs[0] / "curves.svg"
    if output.suffix != ".svg":
        raise UsageError(f"--output {output}: the picture is an SVG", fix=f"--output {output.with_suffix('.svg')}")
    picture = draw_curves(args.runs)
    try:
        output.write_text(picture)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(output)) from None
    print(f"written: {output}")


if __name__ == "__main__":
    exit_with(main)
