"""MobileNetV3 as timm has it, also with TensorFlow's weights (`tf_mobilenetv3_large_100`).

The names of its layers are another spelling of torchvision's (`checkpoints.spellings`) but for what follows the mean
over the image: there timm has a convolution, by which its networks are known. Their ε of BatchNorm is PyTorch's, not
torchvision's 1e-3.
"""

from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.alterations import normalize_by
from ibau_jax.models.blocks import UNSTRIDED
from ibau_jax.models.layers import conv, hardswish, linear
from ibau_jax.models.mobilenet import V3_EXPANSION, V3_SIZES, MobileNetV3
from ibau_jax.models.registry import Architecture, Build, register
from ibau_jax.models.tensorflow import from_tensorflow

EPSILON = 1e-5


class TimmMobileNetV3(nnx.Module):
    """timm's MobileNetV3 of a size: logits of RGB images of any size."""

    def __init__(self, size: str, unstrided: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        blocks, hidden = V3_SIZES[size]
        self.features = MobileNetV3(size, unstrided, num_classes, image_size, rngs).features
        normalize_by(EPSILON, self)
        self.conv_head = conv(V3_EXPANSION * blocks[-1][2], hidden, 1, rngs, bias=True)
        self.classifier = linear(hidden, num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        mean = self.features(x).mean((1, 2), keepdims=True)
        return self.classifier(hardswish(self.conv_head(mean))[:, 0, 0])


def _register(size: str, name: str, build: Build, side: int) -> None:
    (blocks, hidden), base = V3_SIZES[size], f"mobilenetv3_{size}_100"
    last = blocks[-1][2]
    register(
        Architecture(
            name=name,
            build=build,
            classifier="classifier.weight",
            image_sizes=squares(side),
            landmarks={
                "conv_head.weight": (hidden, V3_EXPANSION * last, 1, 1),
                f"features.{len(blocks) + 1}.0.weight": (V3_EXPANSION * last, last, 1, 1),
            },
            variant_of=None if name == base else base,
        )
    )


for _size in V3_SIZES:
    for _suffix, _unstrided in UNSTRIDED.items():
        _plain = partial(TimmMobileNetV3, _size, _unstrided)
        _register(_size, f"mobilenetv3_{_size}_100{_suffix}", _plain, 32 if _unstrided else 224)
    _register(_size, f"tf_mobilenetv3_{_size}_100", from_tensorflow(partial(TimmMobileNetV3, _size, 0)), 224)
