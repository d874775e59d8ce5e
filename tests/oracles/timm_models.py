"""timm's own models, by the names that the networks here have."""

import warnings
from functools import partial

from tests.oracles import torchvision_models  # noqa: F401 - before timm imports torchvision

with warnings.catch_warnings(action="ignore"):  # of torch, about timm's own code
    import timm


def made(name, classes, **options):
    """A model of timm's without weights."""
    return timm.create_model(name, num_classes=classes, **options)


NAMES = ("seresnet18", "resnet10t", "resnet14t", "resnet18d", "seresnext26d_32x4d")
TIMM = {name: partial(made, name) for name in NAMES} | {
    "convnextv2_w8_16_24_32_d1_2_1_1": partial(made, "convnextv2_atto", dims=(8, 16, 24, 32), depths=(1, 2, 1, 1)),
}
