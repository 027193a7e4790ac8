"""Labels written as text, in any kind of table: names of classes, numbered in sorted order, or integers.

Integers are positions in the list of classes, unless all of them are names in a list that is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vitds.data.sources.base import MAX_CLASSES
from vitds.errors import DataError, nearest

_INTEGER = re.compile(r"-?\d{1,18}(\.0+)?")  # as 3.0, too: what pandas makes of integers with a gap among them


class Numbering:
    """What number each label has. `by_names` says that labels are names; `classes` are all of them, by number."""

    def __init__(self, places: Mapping[str, str], classes: list[str] | None, where: str) -> None:
        """Look at all labels that there are, each with the place where it stands first, for a person to look at.

        Raises: DataError when some are names and others integers, and no list of classes is given.
        """
        integers = [label for label in places if _INTEGER.fullmatch(label)]
        if classes is not None:
            self.by_names = len(integers) < len(places) or set(places) <= set(classes)
            self.classes = classes
        elif not integers:
            self.by_names, self.classes = True, sorted(places)
        elif len(integers) < len(places):
            odd, one = next(label for label in places if label not in integers), integers[0]
            raise DataError(
                f'labels are names and integers: "{odd}" in {places[odd]}, "{one}" in {places[one]}',
                where=where,
                fix="correct them, or give the names of all classes with --classes FILE",
            )
        else:
            num_classes = min(max(int(float(label)) for label in integers) + 1, MAX_CLASSES)
            self.by_names, self.classes = False, [str(label) for label in range(num_classes)]
        self._positions = {name: label for label, name in enumerate(self.classes)}
        self._hints: dict[str, str] = {}

    def numbers(self, texts: Iterable[str]) -> tuple[tuple[int, ...], str]:
        """The numbers of a sample's labels, each once and sorted; and in words which label is wrong, if one is."""
        texts = list(texts)
        numbers = [self._positions.get(text, -1) if self.by_names else int(float(text)) for text in texts]
        wrong = [text for text, label in zip(texts, numbers, strict=True) if not 0 <= label < len(self.classes)]
        if not wrong:
            return tuple(sorted(set(numbers))), ""
        if wrong[0] not in self._hints:
            near = nearest(wrong[0], self.classes)
            self._hints[wrong[0]] = f' (did you mean "{near}"?)' if near else ""
        return (), f"label {wrong[0]} is none of the {len(self.classes)} classes{self._hints[wrong[0]]}"
