"""Flax NNX models whose attribute names mirror PyTorch's module tree, and their registry."""

from ibau_jax.models import (  # noqa: F401 - each registers what it defines
    alexnet,
    cifar_densenet,
    cifar_efficientnet,
    cifar_resnext,
    convnext,
    densenet,
    efficientnet,
    mixer,
    mnasnet,
    mobilenet,
    mobilenet_v1,
    preact_resnet,
    regnet,
    resnet,
    senet,
    shufflenet,
    small_cnn,
    small_vgg,
    squeezenet,
    swin,
    thin_resnet,
    timm_mobilenet,
    timm_vgg,
    vgg,
    vit,
    wide_resnet,
)
from ibau_jax.models.custom import find_architecture
from ibau_jax.models.normalized import NORMALIZATIONS, Normalization, Normalized
from ibau_jax.models.registry import (
    Architecture,
    architectures,
    get_architecture,
    name_patterns,
    proposed,
    register,
    variants,
)

__all__ = [
    "NORMALIZATIONS",
    "Architecture",
    "Normalization",
    "Normalized",
    "architectures",
    "find_architecture",
    "get_architecture",
    "name_patterns",
    "proposed",
    "register",
    "variants",
]
