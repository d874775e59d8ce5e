"""Transformers of torchvision and timm in sizes that these have no name for."""

from tests.oracles.torchvision_models import models


def numbers(words, letter):
    """What follows a letter in `w32_d2_2`."""
    places = [place for place, word in enumerate(words) if word.startswith(letter) and word[1:].isdigit()]
    if not places:
        return []
    following = words[places[0] + 1 :]
    count = next((place for place, word in enumerate(following) if not word.isdigit()), len(following))
    return [int(words[places[0]][1:]), *map(int, following[:count])]


def swin(name, classes, window=7):
    words = name.removeprefix("swin_").split("_")
    (width,), depths = numbers(words, "w"), numbers(words, "d")
    heads = numbers(words, "h") or [width * 2**stage // 32 for stage in range(len(depths))]
    patch = numbers(words, "p") or [4]
    return models.swin_transformer.SwinTransformer(patch * 2, width, depths, heads, [window] * 2, num_classes=classes)
