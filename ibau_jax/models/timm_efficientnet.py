"""EfficientNet B5 to B7 and V2 as timm has them: with PyTorch's ε of BatchNorm and padding, or TensorFlow's (`tf_`).

torchvision's have TensorFlow's ε and PyTorch's padding, which is why timm's are networks of their own: they keep timm's
names of what follows the blocks. The names of the other layers are another spelling of torchvision's
(`checkpoints.spellings`), as all of B0 to B4 are, whose ε is the same in both.
"""

from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.alterations import normalize_by
from ibau_jax.models.blocks import UNSTRIDED
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.efficientnet import SCALES, TORCH_EPSILON, V2, EfficientNet, sizes
from ibau_jax.models.layers import Sequential, global_average, silu
from ibau_jax.models.registry import Architecture, Build, register
from ibau_jax.models.tensorflow import from_tensorflow


class TimmEfficientNet(nnx.Module):
    """timm's EfficientNet of a size: logits of RGB images of any size."""

    def __init__(self, name: str, unstrided: int, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        torchvisions = EfficientNet(name, unstrided, num_classes, image_size, rngs)
        *stages, last = torchvisions.features
        self.features = Sequential(stages)
        self.conv_head, self.bn2, _ = last
        self.classifier = torchvisions.classifier[-1]
        normalize_by(TORCH_EPSILON, self)
        self.activation = silu

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        x = self.activation(conv_norm(self.conv_head, self.bn2, self.features(x)))
        return self.classifier(global_average(x))


def _register(size: str, name: str, base: str, build: Build, image_size: int) -> None:
    network = sizes(size)
    register(
        Architecture(
            name=name,
            build=build,
            classifier="classifier.weight",
            image_sizes=squares(image_size),
            landmarks={"conv_head.weight": (network.last, network.stages[-1].features, 1, 1)},
            variant_of=None if name == base else base,
        )
    )


def _register_size(size: str, name: str, tensorflows: str, base: str) -> None:
    """Registers a size with PyTorch's padding and ε under one name, also for small images, and TensorFlow's."""
    image_size, plain = sizes(size).image_size, partial(TimmEfficientNet, size)
    networks: dict[str, tuple[Build, int]] = {
        **{
            name + suffix: (partial(plain, unstrided), 32 if unstrided else image_size)
            for suffix, unstrided in UNSTRIDED.items()
        },
        tensorflows: (from_tensorflow(partial(plain, 0)), image_size),
    }
    for one in sorted(networks, key=lambda one: one != base):  # the most common one comes first
        _register(size, one, base, *networks[one])


for _size in SCALES:
    if sizes(_size).epsilon != TORCH_EPSILON:
        _name = f"efficientnet_{_size}"
        _register_size(_size, f"{_name}_timm", f"tf_{_name}", f"{_name}_timm")
for _size in V2:  # of which timm has TensorFlow's weights only
    _name = f"efficientnet{_size}"
    _register_size(_size, _name, f"tf_{_name}", f"tf_{_name}")
