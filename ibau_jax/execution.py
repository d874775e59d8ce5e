"""How a run computes: precision, memory, devices. But for the precision, none of it changes what is computed."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp

from ibau_jax.compilation import LoopForm, default_loop_form
from ibau_jax.config import Precision
from ibau_jax.errors import ConfigError

# Of matrix products and convolutions. On CPU the first two are the same.
_PRODUCTS: dict[str, str] = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}


@dataclass(frozen=True)
class Execution:
    """Choices about the machine.

    Raises:
        ConfigError: a value makes no sense.
    """

    precision: Precision = "float32"
    """float32; tf32: products rounded to TensorFloat-32 where the device has it; bfloat16: the whole model computes in
    bfloat16, weights, losses and optimisers stay in float32"""
    microbatch: int | None = None
    """images that go through the model at a time where gradients are computed; those of a batch are summed up over its
    parts. Players, 16 images each, and what has no gradient are not parted"""
    remat: bool = False
    """compute the linearised model anew for every product of second derivatives, instead of keeping it"""
    devices: int = 1
    """devices that share the work"""
    shard_params: bool = False
    """spread each weight and its optimiser state over the devices (fully sharded data parallel)"""
    loop: LoopForm | None = None
    """loop over batches in Python or by a scan on the device; the backend's faster one by default"""

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ConfigError(f"precision is {self.precision!r}; choose {', '.join(get_args(Precision))}")
        if self.microbatch is not None and self.microbatch < 1:
            raise ConfigError(f"microbatch is {self.microbatch}; it must be at least 1")
        if self.devices < 1:
            raise ConfigError(f"devices is {self.devices}; it must be at least 1")

    @property
    def recompute(self) -> bool:
        """Whether products of second derivatives keep nothing between them."""
        return self.remat or self.microbatch is not None

    @property
    def loop_form(self) -> LoopForm:
        """How batches are looped over."""
        return self.loop or default_loop_form()

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Everything traced inside multiplies matrices in this precision."""
        with jax.default_matmul_precision(_PRODUCTS[self.precision]):
            yield

    def compute_type(self, tree: Any) -> Any:
        """Float arrays in the type that the model computes in."""
        if self.precision != "bfloat16":
            return tree
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, tree)


DEFAULT_EXECUTION = Execution()
