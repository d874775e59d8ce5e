"""torchvision's own models in sizes for which it has no function, from names as `--model` takes them."""

import re

from torch import nn

from tests.oracles.torchvision_models import models


def numbers(name, letter):
    """Those behind a letter: 16 and 32 in `w16_32`."""
    found = re.search(rf"_{letter}(\d+(?:_\d+)*)(?![\d_]*\d)", name)
    return [int(one) for one in found[1].split("_")] if found else []


def torchvision_of_size(name: str, classes: int) -> nn.Module | None:
    """None of another architecture."""
    widths, depths = numbers(name, "w"), numbers(name, "d")
    if name.startswith("regnet"):
        (group,) = numbers(name, "g")
        groups, ones = [min(group, width) for width in widths], [1.0] * len(widths)
        squeeze = 0.25 if name.startswith("regnet_y") else None
        params = models.regnet.BlockParams(depths, widths, groups, ones, [2] * len(widths), squeeze)
        return models.RegNet(params, num_classes=classes)
    if name.startswith("convnext"):
        setting = [
            models.convnext.CNBlockConfig(*sizes) for sizes in zip(widths, [*widths[1:], None], depths, strict=True)
        ]
        return models.ConvNeXt(setting, num_classes=classes)
    if name.startswith("shufflenet"):
        return models.ShuffleNetV2(depths, [24, *widths, *numbers(name, "l")], num_classes=classes)
    return None
