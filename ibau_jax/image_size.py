"""The height and the width of images, as networks, data sets and the command line have them."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_IMAGE_SIZE = 4096  # pixels, height and width
SPELLED = re.compile(r"(\d{1,6})(?:x(\d{1,6}))?")
FORM = f"--image-size is N or HEIGHTxWIDTH, such as 32 or 96x160, of 1 to {MAX_IMAGE_SIZE} pixels"


class ImageSize(NamedTuple):
    """Height and width of an image in pixels; `str` gives `96x160`."""

    height: int
    width: int

    @classmethod
    def of(cls, value: Any) -> "ImageSize":
        """A size as files and callers give it: a pair (height, width), or the one side of a square.

        Raises:
            ValueError: `value` is neither, or no image has that size.
        """
        sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
        if len(sides) != 2 or not whole or not all(0 < side <= MAX_IMAGE_SIZE for side in sides):
            raise ValueError(f"images of size {str(value)[:40]} do not exist; {FORM}")
        return cls(*sides)

    @classmethod
    def parsed(cls, text: str) -> "ImageSize":
        """The size that `32` or `96x160` spells.

        Raises:
            ValueError: it spells none.
        """
        match = SPELLED.fullmatch(text)
        if match is None:
            raise ValueError(f"{text[:40]!r} is no size of images; {FORM}")
        return cls.of((int(match[1]), int(match[2] or match[1])))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def is_square(self) -> bool:
        """Whether height and width are the same."""
        return self.height == self.width

    def plain(self) -> int | list[int]:
        """The size as files have it, for `of`: the one side of a square, or [height, width]."""
        return self.height if self.is_square else [self.height, self.width]

    def shortest(self) -> str:
        """The shortest spelling, for `parsed`: `32`, or `96x160`."""
        return "x".join(map(str, dict.fromkeys(self)))

    def places(self, side_after: Callable[[int], int]) -> int:
        """How many places maps have, whose height and width `side_after` makes of the image's."""
        return side_after(self.height) * side_after(self.width)


def squares(*sides: int) -> tuple[ImageSize, ...]:
    """Sizes of square images."""
    return tuple(ImageSize(side, side) for side in sides)
