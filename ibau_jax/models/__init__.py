"""Flax NNX models whose attribute names mirror PyTorch's module tree, and their registry."""

from ibau_jax.models import small_vgg  # noqa: F401 - registers itself
from ibau_jax.models.layers import Normalized
from ibau_jax.models.registry import Architecture, architectures, get_architecture, register

__all__ = ["Architecture", "Normalized", "architectures", "get_architecture", "register"]
