"""The command line of the tools: argparse whose mistakes are short messages with the nearest valid flag.

From its import on, Ctrl-C ends a tool without a traceback: the imports behind it may take seconds, and `exit_with`
hears it only when they are done.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

from vitds.errors import UsageError, did_you_mean


def _show_unless_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _show_unless_interrupted  # Python then ends itself by SIGINT: 130 to a shell


class ToolParser(argparse.ArgumentParser):
    """Flags without abbreviations; underscores equal hyphens; every mistake is a UsageError."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Read the command line.

        Raises: UsageError for anything misspelt, missing or out of range.
        """
        given = [_hyphenated(text) for text in (sys.argv[1:] if argv is None else argv)]
        flags = [option for option in self._option_string_actions if option.startswith("--")]
        # Before argparse, which would name a required flag that is only misspelt as missing.
        misspelt = [text for text in given if text[:2] == "--" != text and text.partition("=")[0] not in flags]
        args, unknown = self.parse_known_args(given) if not misspelt else (argparse.Namespace(), misspelt)
        if unknown:
            raise UsageError(f'unknown argument "{unknown[0]}"', fix=did_you_mean(unknown[0].partition("=")[0], flags))
        return args

    def error(self, message: str) -> NoReturn:
        """Raises: UsageError, where argparse would print its usage and leave."""
        raise UsageError(message, fix=f"see {self.prog} --help")


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """The options of tools that take weights: what a file does not say itself, another image size, or the average."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        default="auto",
        help="check the architecture; auto:timm for timm's GELU",
    )
    parser.add_argument("--image-size", metavar="S|HxW", type=image_size, help="in pixels; else the weights' own")
    parser.add_argument(
        "--set",
        metavar="data.KEY=VALUE",
        dest="settings",
        action="append",
        default=[],
        help="preprocessing that the weights do not state: data.mean=[0.485,0.456,0.406], data.eval_crop=center, ...",
    )
    parser.add_argument("--ema", action="store_true", help="the average that the run kept (ema_decay), not the weights")


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument's type."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def positive_number(text: str) -> float:
    """A number above 0, as an argument's type."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def share(text: str) -> float:
    """A number between 0 and 1, as an argument's type."""
    if not 0 < (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def num_bytes(text: str) -> int:
    """A size such as 256M or 1G (powers of 1024), in bytes; an argument's type."""
    found = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", text, re.IGNORECASE)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f'"{text}" is no size such as 256M')
    return int(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")


def part_of(text: str) -> tuple[int, int]:
    """A part such as 3/16, as (number, of); an argument's type."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f'"{text}" is no part such as 3/16')
    return int(found[1]), int(found[2])


def image_size(text: str) -> tuple[int, int]:
    """S or HxW, in pixels, as (height, width); an argument's type."""
    sides = text.split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f'"{text}" is neither S nor HxW, in pixels')
    return int(sides[0]), int(sides[-1])


def _hyphenated(text: str) -> str:
    """--image_size as --image-size; values stay."""
    if not text.startswith("--"):
        return text
    flag, equals, value = text.partition("=")
    return flag.replace("_", "-") + equals + value
