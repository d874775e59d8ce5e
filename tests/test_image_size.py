"""The size of images as files, callers and the command line spell it."""

import pytest

from ibau_jax.image_size import ImageSize, squares


@pytest.mark.parametrize(
    ("text", "size", "shown", "shortest", "plain"),
    [
        ("32", (32, 32), "32x32", "32", 32),
        ("32x32", (32, 32), "32x32", "32", 32),
        ("96x160", (96, 160), "96x160", "96x160", [96, 160]),
    ],
)
def test_spellings(text, size, shown, shortest, plain):
    parsed = ImageSize.parsed(text)
    assert parsed == size
    assert (str(parsed), parsed.shortest(), parsed.plain()) == (shown, shortest, plain)
    assert ImageSize.of(parsed.plain()) == ImageSize.of(parsed) == ImageSize.parsed(parsed.shortest()) == parsed


@pytest.mark.parametrize(
    "text", ["", "32x", "x32", "0x10", "10x0", "-3", "32x32x3", "3.5", "32 x 32", "4097", "99999999"]
)
def test_what_spells_no_size(text):
    with pytest.raises(ValueError, match="--image-size is N or HEIGHTxWIDTH"):
        ImageSize.parsed(text)


@pytest.mark.parametrize(
    "value", [0, -1, 32.0, True, "32", None, [], [32], [32, 32, 3], [32, 0], [32, True], [4097, 1], {"height": 1}]
)
def test_what_is_no_size(value):
    with pytest.raises(ValueError, match="do not exist"):
        ImageSize.of(value)


def test_places_of_maps():
    assert ImageSize(96, 160).places(lambda side: side // 32) == 15
    assert squares(32, 64) == ((32, 32), (64, 64))
