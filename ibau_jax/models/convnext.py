"""ConvNeXt (Liu et al., 2022) tiny, as torchvision names it."""

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.blocks import Features
from ibau_jax.models.layers import (
    Activation,
    Flatten,
    Identity,
    Sequential,
    conv,
    gelu,
    layer_norm,
    linear,
    parameter,
)
from ibau_jax.models.registry import Architecture, from_torchvision, register

STAGES = ((96, 3), (192, 3), (384, 9), (768, 3))  # features and blocks


class ConvNeXtBlock(nnx.Module):
    """A depthwise 7x7 convolution and a pointwise MLP, scaled channel by channel and added."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.layer_scale = parameter((features, 1, 1), rngs)
        self.block = Sequential(
            [
                conv(features, features, 7, rngs, groups=features, bias=True),
                Identity(),  # PyTorch goes from NCHW to NHWC here, and back at the end
                layer_norm(features, rngs),
                linear(features, 4 * features, rngs),
                Activation(gelu),
                linear(4 * features, features, rngs),
            ]
        )

    def __call__(self, x: Features) -> Features:
        return x + self.block(x) * self.layer_scale.reshape(1, 1, 1, -1)


class ConvNeXtTiny(nnx.Module):
    """Logits of RGB images of any size from 32 on."""

    def __init__(self, num_classes: int, image_size: int, rngs: nnx.Rngs) -> None:
        first = STAGES[0][0]
        layers = [Sequential([conv(3, first, 4, rngs, stride=4, padding=0, bias=True), layer_norm(first, rngs)])]
        for index, (features, blocks) in enumerate(STAGES):
            layers.append(Sequential([ConvNeXtBlock(features, rngs) for _ in range(blocks)]))
            if index + 1 < len(STAGES):
                halve = conv(features, STAGES[index + 1][0], 2, rngs, stride=2, padding=0, bias=True)
                layers.append(Sequential([layer_norm(features, rngs), halve]))
        self.features = Sequential(layers)
        last = STAGES[-1][0]
        self.classifier = Sequential([layer_norm(last, rngs), Flatten(), linear(last, num_classes, rngs)])

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.classifier(self.features(x).mean((1, 2), keepdims=True))


register(
    Architecture(
        name="convnext_tiny",
        build=ConvNeXtTiny,
        classifier="classifier.2.weight",
        image_sizes=(224,),
        landmarks={"features.5.8.layer_scale": (384, 1, 1)},
        torch_module=from_torchvision("convnext_tiny"),
    )
)
