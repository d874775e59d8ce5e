"""timm's own models, by the names that the networks here have."""

import warnings
from functools import partial

from tests.oracles import torchvision_models  # noqa: F401 - before timm imports torchvision

with warnings.catch_warnings(action="ignore"):  # of torch, about timm's own code
    import timm


def made(name, classes):
    """A model of timm's without weights."""
    return timm.create_model(name, num_classes=classes)


NAMES = ("seresnet18", "resnet10t", "resnet14t", "resnet18d", "seresnext26d_32x4d")
TIMM = {name: partial(made, name) for name in NAMES} | {"xception": partial(made, "legacy_xception")}
