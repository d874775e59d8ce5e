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
    "xception": partial(made, "legacy_xception"),
    "cait_w96_d2_c1_h4_p8": partial(
        made, "cait_xxs24_224", depth=2, depth_token_only=1, embed_dim=96, num_heads=4, img_size=40, patch_size=8
    ),
    "vit_w128_d2_p16_deit3": partial(made, "deit3_small_patch16_224", depth=2, embed_dim=128, num_heads=2),
    "convnextv2_w8_16_24_32_d1_2_1_1": partial(made, "convnextv2_atto", dims=(8, 16, 24, 32), depths=(1, 2, 1, 1)),
}
