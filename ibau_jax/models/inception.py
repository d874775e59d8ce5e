"""Inception v3 (Szegedy et al., 2016), as torchvision and timm name it, also with a small stem.

torchvision's, if made with weights of ImageNet, normalises images anew, which leaves no trace in a state dict
(`_transform_input`).
"""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from flax import nnx

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Features
from ibau_jax.models.convolution import Size
from ibau_jax.models.googlenet import BasicConv, InceptionNetwork, register_inception
from ibau_jax.models.layers import AvgPool, MaxPool
from ibau_jax.models.registry import Architecture

# Of each of a branch's convolutions the features and the kernel; two kernels stand for two that read the same.
Branch = tuple[tuple[int, tuple[Size, ...]], ...]
POINT: tuple[Size, ...] = (1,)
SQUARE: tuple[Size, ...] = (3,)
LARGE: tuple[Size, ...] = (5,)
ROW: tuple[Size, ...] = ((1, 7),)
COLUMN: tuple[Size, ...] = ((7, 1),)
FORK: tuple[Size, ...] = ((1, 3), (3, 1))


def _factorised(inner: int) -> dict[str, Branch]:
    """The branches of a block with 7x7 convolutions made of rows and columns: figure 6 of the paper."""
    twice = ((inner, POINT), *((inner, kernel) for kernel in (COLUMN, ROW, COLUMN)), (192, ROW))
    return {
        "branch1x1": ((192, POINT),),
        "branch7x7": ((inner, POINT), (inner, ROW), (192, COLUMN)),
        "branch7x7dbl": twice,
    }


BRANCHES_5 = {
    "branch1x1": ((64, POINT),),
    "branch5x5": ((48, POINT), (64, LARGE)),
    "branch3x3dbl": ((64, POINT), (96, SQUARE), (96, SQUARE)),
}
BRANCHES_7 = {
    "branch1x1": ((320, POINT),),
    "branch3x3": ((384, POINT), (384, FORK)),
    "branch3x3dbl": ((448, POINT), (384, SQUARE), (384, FORK)),
}
# Each block's branches, and the features of the one behind its pooling; None where the block halves the maps.
BLOCKS: dict[str, tuple[dict[str, Branch], int | None]] = {
    "Mixed_5b": (BRANCHES_5, 32),
    "Mixed_5c": (BRANCHES_5, 64),
    "Mixed_5d": (BRANCHES_5, 64),
    "Mixed_6a": (
        {"branch3x3": ((384, SQUARE),), "branch3x3dbl": ((64, POINT), (96, SQUARE), (96, SQUARE))},
        None,
    ),
    "Mixed_6b": (_factorised(128), 192),
    "Mixed_6c": (_factorised(160), 192),
    "Mixed_6d": (_factorised(160), 192),
    "Mixed_6e": (_factorised(192), 192),
    "Mixed_7a": (
        {
            "branch3x3": ((192, POINT), (320, SQUARE)),
            "branch7x7x3": ((192, POINT), (192, ROW), (192, COLUMN), (192, SQUARE)),
        },
        None,
    ),
    "Mixed_7b": (BRANCHES_7, 192),
    "Mixed_7c": (BRANCHES_7, 192),
}
STEM_FEATURES = 192


class Mixed(nnx.Module):
    """Branches of convolutions beside one another, and beside a pooling.

    Where the block halves the maps, so do the last convolution of each branch and the pooling, without padding.
    """

    def __init__(self, in_features: int, branches: Mapping[str, Branch], pooled: int | None, rngs: nnx.Rngs) -> None:
        self.chains = tuple(self._chain(in_features, name, branches[name], pooled is None, rngs) for name in branches)
        self.pool = MaxPool(3, 2) if pooled is None else AvgPool(3, 1, 1)
        self.branch_pool = BasicConv(in_features, pooled, 1, rngs) if pooled else None
        outputs = [len(branch[-1][1]) * branch[-1][0] for branch in branches.values()]
        self.features = sum(outputs) + (pooled or in_features)

    def _chain(
        self, in_features: int, branch: str, convolutions: Branch, halves: bool, rngs: nnx.Rngs
    ) -> tuple[tuple[str, ...], ...]:
        """Makes a branch's convolutions, and gives their names, those that read the same together."""
        chain = []
        for number, (features, kernels) in enumerate(convolutions, start=1):
            name = f"{branch}_{number}" if len(convolutions) > 1 else branch
            names = tuple(f"{name}{letter}" for letter in "ab") if len(kernels) > 1 else (name,)
            options = {"stride": 2, "padding": 0} if halves and number == len(convolutions) else {}
            for one, kernel in zip(names, kernels, strict=True):
                setattr(self, one, BasicConv(in_features, features, kernel, rngs, **options))
            in_features = features
            chain.append(names)
        return tuple(chain)

    def __call__(self, x: Features) -> Features:
        pooled = self.pool(x)
        outputs = [self._branch(x, chain) for chain in self.chains]
        return jnp.concatenate([*outputs, self.branch_pool(pooled) if self.branch_pool else pooled], axis=-1)

    def _branch(self, x: Features, chain: tuple[tuple[str, ...], ...]) -> Features:
        for names in chain:
            x = jnp.concatenate([getattr(self, name)(x) for name in names], axis=-1)
        return x


def _large_stem(rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """torchvision's first layers."""
    return {
        "Conv2d_1a_3x3": BasicConv(3, 32, 3, rngs, stride=2, padding=0),
        "Conv2d_2a_3x3": BasicConv(32, 32, 3, rngs, padding=0),
        "Conv2d_2b_3x3": BasicConv(32, 64, 3, rngs),
        "maxpool1": MaxPool(3, 2),
        "Conv2d_3b_1x1": BasicConv(64, 80, 1, rngs),
        "Conv2d_4a_3x3": BasicConv(80, STEM_FEATURES, 3, rngs, padding=0),
        "maxpool2": MaxPool(3, 2),
    }


def _inception_v3(
    small_stem: bool, transform_input: bool, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs
) -> InceptionNetwork:
    """Inception v3: logits of RGB images of any size from 75 on, or from 16 with the small stem."""
    layers: dict[str, nnx.Module]
    layers = {"Conv2d_1a_3x3": BasicConv(3, STEM_FEATURES, 3, rngs)} if small_stem else _large_stem(rngs)
    features = STEM_FEATURES
    for name, (branches, pooled) in BLOCKS.items():
        block = Mixed(features, branches, pooled, rngs)
        layers[name], features = block, block.features
    return InceptionNetwork(layers, features, num_classes, transform_input, rngs)


register_inception(
    Architecture(
        name="inception_v3",
        build=partial(_inception_v3, False, False),
        classifier="fc.weight",
        image_sizes=squares(299),
        landmarks={"Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1)},
        unused=("AuxLogits",),
    ),
    _inception_v3,
    "Conv2d_1a_3x3.conv.weight",
    (32, STEM_FEATURES),
    3,
)
