"""Deep layer aggregation (Yu et al., 2018) for CIFAR-10, as kuangliu names it, also in its simple form."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.blocks import Features
from ibau_jax.models.convolution import conv_norm
from ibau_jax.models.layers import Activation, Sequential, batch_norm, conv, global_average, linear, relu
from ibau_jax.models.registry import Architecture, register
from ibau_jax.models.resnet import CIFAR, BasicBlock

WIDTHS = (16, 16, 32)  # of the first convolutions
# Of `layer3` to `layer6` the features before and behind, whether trees are nested, and the stride.
TREES = ((32, 64, False, 1), (64, 128, True, 2), (128, 256, True, 2), (256, 512, False, 2))

Tree = Callable[[int, int, bool, int, nnx.Rngs], nnx.Module]  # (in_features, features, nested, stride, rngs)


class Root(nnx.Module):
    """What aggregates: a 1x1 convolution of several features beside one another."""

    def __init__(self, in_features: int, features: int, rngs: nnx.Rngs) -> None:
        self.conv, self.bn = conv(in_features, features, 1, rngs), batch_norm(features, rngs)
        self.activation = relu

    def __call__(self, *features: Features) -> Features:
        return self.activation(conv_norm(self.conv, self.bn, jnp.concatenate(features, axis=-1)))


class HierarchicalTree(nnx.Module):
    """Two blocks, one behind another, whose outputs the root aggregates.

    One that is nested has a smaller tree before them, and a block beside that; the root aggregates all four.
    """

    def __init__(self, in_features: int, features: int, nested: bool, stride: int, rngs: nnx.Rngs) -> None:
        block = partial(BasicBlock, CIFAR, rngs)
        self.prev_root = block(in_features, features, stride) if nested else None
        self.level_1 = HierarchicalTree(in_features, features, False, stride, rngs) if nested else None
        self.left_node = block(features, features, 1) if nested else block(in_features, features, stride)
        self.right_node = block(features, features, 1)
        self.root = Root((4 if nested else 2) * features, features, rngs)

    def __call__(self, x: Features) -> Features:
        if self.prev_root is None or self.level_1 is None:
            return self._aggregated(x, [])
        nested = self.level_1(x)
        return self._aggregated(nested, [self.prev_root(x), nested])

    def _aggregated(self, x: Features, others: list[Features]) -> Features:
        left = self.left_node(x)
        return self.root(*others, left, self.right_node(left))


class BinaryTree(nnx.Module):
    """Two blocks, one behind another, or two smaller trees where it is nested; the root aggregates what both give."""

    def __init__(self, in_features: int, features: int, nested: bool, stride: int, rngs: nnx.Rngs) -> None:
        def made(in_features: int, stride: int) -> nnx.Module:
            if nested:
                return BinaryTree(in_features, features, False, stride, rngs)
            return BasicBlock(CIFAR, rngs, in_features, features, stride)

        self.root = Root(2 * features, features, rngs)
        self.left_tree, self.right_tree = made(in_features, stride), made(features, 1)

    def __call__(self, x: Features) -> Features:
        left = self.left_tree(x)
        return self.root(left, self.right_tree(left))


class DeepLayerAggregation(nnx.Module):
    """Logits of RGB images of any size."""

    def __init__(self, tree: Tree, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        in_features = 3
        for name, features in zip(("base", "layer1", "layer2"), WIDTHS, strict=True):
            layers = [conv(in_features, features, 3, rngs), batch_norm(features, rngs), Activation(relu)]
            setattr(self, name, Sequential(layers))
            in_features = features
        for number, sizes in enumerate(TREES, start=3):
            setattr(self, f"layer{number}", tree(*sizes, rngs))
        self.linear = linear(TREES[-1][1], num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        for name in ("base", *(f"layer{number}" for number in range(1, len(TREES) + 3))):
            x = getattr(self, name)(x)
        return self.linear(global_average(x, kernel=4))


_PARTS = {"dla_cifar": (HierarchicalTree, "right_node"), "simple_dla_cifar": (BinaryTree, "right_tree")}
for _name, (_tree, _right) in _PARTS.items():
    register(
        Architecture(
            name=_name,
            build=partial(DeepLayerAggregation, _tree),
            classifier="linear.weight",
            landmarks={
                f"layer6.{_right}.conv2.weight": (512, 512, 3, 3),
                "layer6.root.conv.weight": (512, 1024, 1, 1),
            },
        )
    )
