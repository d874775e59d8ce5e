"""VGG as timm has it: its two hidden layers are convolutions, and the mean over the image follows them.

For images of 224x224 and smaller it computes what torchvision's VGG does.
"""

from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Features
from ibau_jax.models.layers import AdaptiveAvgPool, NamedSequential, conv, global_average, linear, relu
from ibau_jax.models.registry import Architecture, register
from ibau_jax.models.vgg import BLOCKS, convolutions, landmarks_of

GRID, WIDTH = 7, 4096


class PreLogits(nnx.Module):
    """Two convolutions in the place of linear layers; smaller features are made as large as the first needs."""

    def __init__(self, in_features: int, rngs: nnx.Rngs) -> None:
        self.fc1 = conv(in_features, WIDTH, GRID, rngs, padding=0, bias=True)
        self.fc2 = conv(WIDTH, WIDTH, 1, rngs, bias=True)
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        rows, columns = x.shape[1:3]
        x = AdaptiveAvgPool((max(rows, GRID), max(columns, GRID)))(x) if min(rows, columns) < GRID else x
        return self.activation(self.fc2(self.activation(self.fc1(x))))


class TimmVGG(nnx.Module):
    """timm's VGG: logits of RGB images of any size from 32 on."""

    def __init__(self, depth: int, normalized: bool, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        self.features = convolutions(depth, normalized, rngs)
        self.pre_logits = PreLogits(BLOCKS[depth][-1][-1], rngs)
        self.head = NamedSequential({"fc": linear(WIDTH, num_classes, rngs)})

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.head(global_average(self.pre_logits(self.features(x))))


def _register(depth: int, normalized: bool) -> None:
    register(
        Architecture(
            name=f"vgg{depth}{'_bn' if normalized else ''}_timm",
            build=partial(TimmVGG, depth, normalized),
            classifier="head.fc.weight",
            image_sizes=squares(224),
            landmarks={**landmarks_of(depth, normalized), "pre_logits.fc1.weight": (WIDTH, 512, GRID, GRID)},
        )
    )


for _depth in BLOCKS:
    for _normalized in (False, True):
        _register(_depth, _normalized)
