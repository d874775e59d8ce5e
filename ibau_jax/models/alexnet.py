"""AlexNet in one tower (Krizhevsky, 2014), as torchvision names it."""

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.layers import (
    Activation,
    AdaptiveAvgPool,
    Flatten,
    Identity,
    MaxPool,
    Sequential,
    conv,
    linear,
    relu,
)
from ibau_jax.models.registry import Architecture, from_torchvision, register

# Features, kernel, stride, padding, and whether max pooling follows.
CONVOLUTIONS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)
GRID, HIDDEN = 6, 4096


class AlexNet(nnx.Module):
    """Logits of RGB images of 63 pixels and more."""

    def __init__(self, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        layers: list[nnx.Module] = []
        before = 3
        for features, kernel, stride, padding, pooled in CONVOLUTIONS:
            layers += [
                conv(before, features, kernel, rngs, stride=stride, padding=padding, bias=True),
                Activation(relu),
            ]
            layers += [MaxPool(3, 2)] if pooled else []
            before = features
        self.features, self.avgpool, self.flatten = Sequential(layers), AdaptiveAvgPool(GRID), Flatten()
        hidden = [linear(before * GRID**2, HIDDEN, rngs), Activation(relu)]
        second = [linear(HIDDEN, HIDDEN, rngs), Activation(relu)]
        self.classifier = Sequential([Identity(), *hidden, Identity(), *second, linear(HIDDEN, num_classes, rngs)])

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(self.flatten(self.avgpool(self.features(x))))


register(
    Architecture(
        name="alexnet",
        build=AlexNet,
        classifier="classifier.6.weight",
        image_sizes=squares(224),
        landmarks={"features.0.weight": (64, 3, 11, 11), "features.10.weight": (256, 256, 3, 3)},
        torch_module=from_torchvision("alexnet"),
    )
)
