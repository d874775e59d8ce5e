"""GoogLeNet (Szegedy et al., 2015), as torchvision names it, also with a small stem, and as kuangliu does.

Where the paper has a 5x5 convolution, torchvision has a 3x3 one and kuangliu has two. torchvision's, if made with
weights of ImageNet, normalises images anew, which leaves no trace in a state dict (`_transform_input`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Features
from ibau_jax.models.convolution import Size, conv_norm
from ibau_jax.models.layers import (
    Activation,
    MaxPool,
    NamedSequential,
    Sequential,
    apply_in_order,
    batch_norm,
    conv,
    global_average,
    linear,
    relu,
)
from ibau_jax.models.normalized import NORMALIZATIONS
from ibau_jax.models.registry import Architecture, from_torchvision, register

Widths = tuple[int, int, int, int, int, int]
# Features of each block's 1x1 convolution, of its 3x3 one behind a reduction to fewer, of its 5x5 one likewise, and of
# the one behind its pooling: table 1 of the paper.
BLOCKS: dict[str, Widths] = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
SHRUNK = ("4a", "5a")  # blocks before which a pooling halves the maps
STEM_FEATURES = 192


def _blocks() -> Iterator[tuple[str, int]]:
    """Each block's name and how many features it takes."""
    in_features = STEM_FEATURES
    for name in BLOCKS:
        yield name, in_features
        in_features = _features(name)


def _features(name: str) -> int:
    """How many features a block gives."""
    direct, _, by_3x3, _, by_5x5, pooled = BLOCKS[name]
    return direct + by_3x3 + by_5x5 + pooled


class BasicConv(nnx.Module):
    """torchvision's `BasicConv2d`: convolution `conv`, BatchNorm `bn` with ε 0.001, ReLU."""

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel: Size,
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        padding: Size | None = None,
    ) -> None:
        self.conv = conv(in_features, features, kernel, rngs, stride=stride, padding=padding)
        self.bn = batch_norm(features, rngs, 1e-3)
        self.activation = relu

    def __call__(self, x: Features) -> Features:
        return self.activation(conv_norm(self.conv, self.bn, x))


class InceptionNetwork(NamedSequential):
    """torchvision's GoogLeNet or Inception v3: layers in order, the mean over all places, and `fc`.

    With `transform_input`, images that are normalised with the mean and the deviation of ImageNet's go from -1 to 1.
    """

    def __init__(
        self,
        layers: Mapping[str, nnx.Module],
        features: int,
        num_classes: int,
        transform_input: bool,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(layers)
        self.fc, self.transform_input = linear(features, num_classes, rngs), transform_input

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        imagenet = NORMALIZATIONS["imagenet"]
        if self.transform_input and imagenet:
            channels = (1, 1, 1, -1)
            mean, std = (jnp.asarray(values, x.dtype).reshape(channels) for values in (imagenet.mean, imagenet.std))
            x = (x * std + mean - 0.5) / 0.5
        return self.fc(global_average(super().__call__(x)))


class Inception(nnx.Module):
    """torchvision's block: three branches of convolutions and one behind a pooling, beside one another."""

    def __init__(self, in_features: int, widths: Widths, rngs: nnx.Rngs) -> None:
        direct, reduced_3x3, by_3x3, reduced_5x5, by_5x5, pooled = widths
        layer = partial(BasicConv, rngs=rngs)
        self.branch1 = layer(in_features, direct, 1)
        self.branch2 = Sequential([layer(in_features, reduced_3x3, 1), layer(reduced_3x3, by_3x3, 3)])
        self.branch3 = Sequential([layer(in_features, reduced_5x5, 1), layer(reduced_5x5, by_5x5, 3)])
        self.branch4 = Sequential([MaxPool(3, 1, 1, ceil=True), layer(in_features, pooled, 1)])

    def __call__(self, x: Features) -> Features:
        return jnp.concatenate([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], axis=-1)


def _large_stem(rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """torchvision's first layers."""
    return {
        "conv1": BasicConv(3, 64, 7, rngs, stride=2),
        "maxpool1": MaxPool(3, 2, ceil=True),
        "conv2": BasicConv(64, 64, 1, rngs),
        "conv3": BasicConv(64, STEM_FEATURES, 3, rngs),
        "maxpool2": MaxPool(3, 2, ceil=True),
    }


def _googlenet(
    small_stem: bool, transform_input: bool, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs
) -> InceptionNetwork:
    """torchvision's GoogLeNet: logits of RGB images of any size."""
    layers: dict[str, nnx.Module]
    layers = {"conv1": BasicConv(3, STEM_FEATURES, 3, rngs)} if small_stem else _large_stem(rngs)
    pools = (MaxPool(3, 2, 1), MaxPool(3, 2, 1)) if small_stem else (MaxPool(3, 2, ceil=True), MaxPool(2, ceil=True))
    for name, in_features in _blocks():
        if name in SHRUNK:
            number = SHRUNK.index(name)
            layers[f"maxpool{number + 3}"] = pools[number]
        layers[f"inception{name}"] = Inception(in_features, BLOCKS[name], rngs)
    return InceptionNetwork(layers, _features("5b"), num_classes, transform_input, rngs)


def _branch(in_features: int, convolutions: list[tuple[int, int]], rngs: nnx.Rngs) -> list[nnx.Module]:
    """Convolutions of such features and kernels, each with a bias, BatchNorm and ReLU behind it."""
    layers: list[nnx.Module] = []
    for features, kernel in convolutions:
        layers += [conv(in_features, features, kernel, rngs, bias=True), batch_norm(features, rngs), Activation(relu)]
        in_features = features
    return layers


class CifarInception(nnx.Module):
    """kuangliu's block: two 3x3 convolutions for the 5x5 one."""

    def __init__(self, in_features: int, widths: Widths, rngs: nnx.Rngs) -> None:
        direct, reduced_3x3, by_3x3, reduced_5x5, by_5x5, pooled = widths
        self.b1 = Sequential(_branch(in_features, [(direct, 1)], rngs))
        self.b2 = Sequential(_branch(in_features, [(reduced_3x3, 1), (by_3x3, 3)], rngs))
        self.b3 = Sequential(_branch(in_features, [(reduced_5x5, 1), (by_5x5, 3), (by_5x5, 3)], rngs))
        self.b4 = Sequential([MaxPool(3, 1, 1), *_branch(in_features, [(pooled, 1)], rngs)])

    def __call__(self, x: Features) -> Features:
        return jnp.concatenate([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], axis=-1)


class CifarGoogLeNet(nnx.Module):
    """kuangliu's GoogLeNet: logits of RGB images of any size. It calls block 3a `a3`."""

    def __init__(self, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        self.pre_layers = Sequential(_branch(3, [(STEM_FEATURES, 3)], rngs))
        self.maxpool = MaxPool(3, 2, 1)
        for name, in_features in _blocks():
            setattr(self, name[::-1], CifarInception(in_features, BLOCKS[name], rngs))
        self.linear = linear(_features("5b"), num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        layers: list[nnx.Module] = [self.pre_layers]
        for name in BLOCKS:
            layers += [self.maxpool] if name in SHRUNK else []
            layers.append(getattr(self, name[::-1]))
        return self.linear(global_average(apply_in_order(layers, x)))


def register_inception(
    base: Architecture, make: Callable[..., InceptionNetwork], stem: str, widths: tuple[int, int], kernel: int
) -> None:
    """Registers torchvision's network, that with its images normalised anew, and huyvnphan's with a small stem.

    Args:
        base: what they have in common, under the name that torchvision has for it; its landmarks without the stem's.
        make: `make(small_stem, transform_input, num_classes, image_size, rngs)` builds each.
        stem: the name of the first convolution's weight.
        widths: its features, of torchvision's and of huyvnphan's.
        kernel: of torchvision's.
    """
    options = {"aux_logits": False, "init_weights": False}
    stems = [{stem: (width, 3, size, size)} for width, size in zip(widths, (kernel, 3), strict=True)]
    for again in (False, True):
        register(
            replace(
                base,
                name=f"{base.name}_transform_input" if again else base.name,
                build=partial(make, False, again),
                landmarks={**stems[0], **base.landmarks},
                torch_module=from_torchvision(base.name, **options, transform_input=again),
                variant_of=base.name if again else None,
            )
        )
    register(
        replace(
            base,
            name=f"{base.name}_small_stem",
            build=partial(make, True, False),
            image_sizes=squares(32),
            landmarks={**stems[1], **base.landmarks},
        )
    )


register_inception(
    Architecture(
        name="googlenet",
        build=partial(_googlenet, False, False),
        classifier="fc.weight",
        image_sizes=squares(224),
        landmarks={"inception5b.branch3.1.conv.weight": (128, 48, 3, 3)},
        unused=("aux1", "aux2"),
    ),
    _googlenet,
    "conv1.conv.weight",
    (64, STEM_FEATURES),
    7,
)
register(
    Architecture(
        name="googlenet_cifar",
        build=CifarGoogLeNet,
        classifier="linear.weight",
        landmarks={"pre_layers.0.weight": (STEM_FEATURES, 3, 3, 3), "b5.b3.6.weight": (128, 128, 3, 3)},
    )
)
