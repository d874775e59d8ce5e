"""The small VGG of the checkpoints published with the I-BAU paper: three blocks of two 3x3 convolutions, ELU."""

from typing import TYPE_CHECKING

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.layers import Activation, Flatten, Identity, MaxPool, Sequential, batch_norm, conv, elu, linear
from ibau_jax.models.registry import Architecture, register

if TYPE_CHECKING:
    import torch

BLOCKS = (32, 64, 128)  # features of each block's two convolutions
DROPOUT = (0.3, 0.4, 0.4)  # after each block, in training


class SmallVGG(nnx.Module):
    """Logits of 32x32 RGB images in [0, 1]."""

    def __init__(self, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        layers: list[nnx.Module] = []
        features = 3
        for block in BLOCKS:
            for _ in range(2):
                layers += [conv(features, block, 3, rngs, bias=True), batch_norm(block, rngs), Activation(elu)]
                features = block
            layers += [MaxPool(2), Identity()]
        self.features = Sequential(layers)
        self.flatten = Flatten()
        self.classifier = linear(BLOCKS[-1] * image_size.places(lambda side: side // 8), num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(self.flatten(self.features(x)))


def torch_module(num_classes: int) -> "torch.nn.Module":
    """The same network in PyTorch, the oracle of `--verify` and of the tests. Needs torch."""
    from torch import nn

    layers: list[nn.Module] = []
    features = 3
    for block, dropout in zip(BLOCKS, DROPOUT, strict=True):
        for _ in range(2):
            layers += [nn.Conv2d(features, block, 3, padding=1), nn.BatchNorm2d(block), nn.ELU()]
            features = block
        layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(*layers))
    model.add_module("flatten", nn.Flatten())
    model.add_module("classifier", nn.Linear(BLOCKS[-1] * 4 * 4, num_classes))
    return model


register(
    Architecture(
        name="small_vgg",
        build=SmallVGG,
        classifier="classifier.weight",
        landmarks={"features.19.weight": (128, 128, 3, 3)},
        torch_module=torch_module,
    )
)
