"""Small CNNs as tutorials and the backdoor literature have them for CIFAR-10 and MNIST: a list of layers each.

They are PyTorch's CIFAR-10 tutorial's (kuangliu/pytorch-cifar's LeNet has its names too), pytorch/examples' (whose
log-softmax at the end leaves the order of classes), and those of BackdoorBox, of Input-aware attacks and RNP, of WaNet
and BppAttack, and of NAD and ABL.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flax import nnx

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.layers import Activation, Flatten, MaxPool, NamedSequential, batch_norm, conv, linear, relu
from ibau_jax.models.registry import Architecture, register

Layers = dict[str, nnx.Module]
MakeLayers = Callable[[int, ImageSize, nnx.Rngs], Layers]


def _relu() -> nnx.Module:
    return Activation(relu)


@dataclass(frozen=True)
class LeNet:
    """Unpadded 5x5 convolutions, each behind ReLU and max pooling, and linear layers with ReLU between them.

    Attributes:
        channels: of images.
        convolutions: their names and features.
        linears: names and features of the linear layers but for the last.
        last: the name of the last one.
    """

    channels: int
    convolutions: tuple[tuple[str, int], ...]
    linears: tuple[tuple[str, int], ...]
    last: str

    def __call__(self, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> Layers:
        layers: Layers = {}
        before = self.channels
        for name, features in self.convolutions:
            layers[name] = conv(before, features, 5, rngs, padding=0, bias=True)
            layers |= {f"{name}_relu": _relu(), f"{name}_pool": MaxPool(2)}
            before = features
        layers["flatten"], before = Flatten(), before * image_size.places(self.side_after)
        for name, features in self.linears:
            layers |= {name: linear(before, features, rngs), f"{name}_relu": _relu()}
            before = features
        return {**layers, self.last: linear(before, num_classes, rngs)}

    def side_after(self, side: int) -> int:
        """The height or width of the last maps, of images of this one."""
        return functools.reduce(lambda before, _: (before - 4) // 2, self.convolutions, side)


def mnist_examples(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> Layers:
    """Two unpadded 3x3 convolutions, one max pooling, two linear layers."""
    places = image_size.places(lambda side: (side - 4) // 2)
    return {
        "conv1": conv(1, 32, 3, rngs, padding=0, bias=True),
        "relu1": _relu(),
        "conv2": conv(32, 64, 3, rngs, padding=0, bias=True),
        "relu2": _relu(),
        "pool": MaxPool(2),
        "flatten": Flatten(),
        "fc1": linear(64 * places, 128, rngs),
        "relu3": _relu(),
        "fc2": linear(128, num_classes, rngs),
    }


def mnist_wanet(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> Layers:
    """Three 3x3 convolutions of stride 2, the last two behind BatchNorm and ReLU, and two linear layers."""
    places = image_size.places(lambda side: -(-side // 8))

    def block(in_features: int, features: int) -> nnx.Module:
        layers = {"bn1": batch_norm(in_features, rngs), "ind": _relu()}
        return NamedSequential({**layers, "conv1": conv(in_features, features, 3, rngs, stride=2)})

    return {
        "conv1": conv(1, 32, 3, rngs, stride=2, bias=True),
        "relu1": _relu(),
        "layer2": block(32, 64),
        "layer3": block(64, 64),
        "flatten": Flatten(),
        "linear6": linear(64 * places, 512, rngs),
        "relu7": _relu(),
        "linear9": linear(512, num_classes, rngs),
    }


def lenet_nad(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> Layers:
    """Two unpadded 3x3 convolutions, max pooling before each ReLU, and two linear layers."""
    places = image_size.places(lambda side: ((side - 2) // 2 - 2) // 2)
    return {
        "conv1": conv(3, 32, 3, rngs, padding=0, bias=True),
        "pool1": MaxPool(2),
        "relu1": _relu(),
        "conv2": conv(32, 64, 3, rngs, padding=0, bias=True),
        "pool2": MaxPool(2),
        "relu2": _relu(),
        "flatten": Flatten(),
        "fc1": linear(64 * places, 128, rngs),
        "relu3": _relu(),
        "fc2": linear(128, num_classes, rngs),
    }


LENET = LeNet(3, (("conv1", 6), ("conv2", 16)), (("fc1", 120), ("fc2", 84)), "fc3")
BACKDOORBOX = LeNet(1, (("conv1", 16), ("conv2", 32)), (("fc1", 512),), "fc2")
INPUT_AWARE = LeNet(1, (("conv1", 32), ("conv5", 64)), (("linear6", 512),), "linear9")

# By name: the layers, the last of them, the image's side and channels, and tensors that tell each from its relatives.
NETWORKS: dict[str, tuple[MakeLayers, str, int, int, dict[str, tuple[int, ...]]]] = {
    "lenet": (LENET, LENET.last, 32, 3, {"conv2.weight": (16, 6, 5, 5), "fc2.weight": (84, 120)}),
    "lenet_nad": (lenet_nad, "fc2", 32, 3, {"conv1.weight": (32, 3, 3, 3), "conv2.weight": (64, 32, 3, 3)}),
    "mnist_examples": (mnist_examples, "fc2", 28, 1, {"conv1.weight": (32, 1, 3, 3), "conv2.weight": (64, 32, 3, 3)}),
    "mnist_backdoorbox": (
        BACKDOORBOX,
        BACKDOORBOX.last,
        28,
        1,
        {"conv1.weight": (16, 1, 5, 5), "conv2.weight": (32, 16, 5, 5)},
    ),
    "mnist_input_aware": (
        INPUT_AWARE,
        INPUT_AWARE.last,
        28,
        1,
        {"conv1.weight": (32, 1, 5, 5), "conv5.weight": (64, 32, 5, 5)},
    ),
    "mnist_wanet": (
        mnist_wanet,
        "linear9",
        28,
        1,
        {"conv1.weight": (32, 1, 3, 3), "layer3.conv1.weight": (64, 64, 3, 3)},
    ),
}


def _build(layers: MakeLayers, num_classes: int, size: ImageSize, rngs: nnx.Rngs) -> nnx.Module:
    return NamedSequential(layers(num_classes, size, rngs))


for _name, (_layers, _last, _side, _channels, _landmarks) in NETWORKS.items():
    register(
        Architecture(
            name=_name,
            build=partial(_build, _layers),
            classifier=f"{_last}.weight",
            image_sizes=squares(_side, 28 if _side == 32 else 32),
            landmarks=_landmarks,
            channels=_channels,
        )
    )
