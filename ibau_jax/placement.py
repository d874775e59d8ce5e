"""Which part of which array lies on which device.

The mesh has two axes: models that unlearn together are spread over `member`, the images of a batch over `data`. With
`shard_params` each weight, and what the optimiser keeps of it, is spread over `data` as well, along its longest axis.
One device is a mesh of one, so there is one path through the code. Several hosts are one mesh too: each holds all
images in its memory and gives the devices their part of them.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ibau_jax.errors import ConfigError

MEMBER, DATA = "member", "data"
PyTree = Any


def make_mesh(devices: int, members: int) -> Mesh:
    """A mesh of the first `devices` devices: as many along `member` as divide both numbers, the others along `data`.

    Raises:
        ConfigError: there are not so many devices.
    """
    if devices > len(jax.devices()):
        raise ConfigError(f"--devices {devices}: JAX sees {len(jax.devices())} ({jax.default_backend()})")
    along_member = math.gcd(devices, members)
    grid = np.asarray(jax.devices()[:devices]).reshape(along_member, devices // along_member)
    return Mesh(grid, (MEMBER, DATA))


@dataclass(frozen=True)
class Placement:
    """Puts arrays on the devices of a mesh. Every array has a leading axis of members, after that of batches if any."""

    mesh: Mesh
    shard_params: bool = False

    @staticmethod
    def one_device() -> "Placement":
        """Everything on this process's first device."""
        return Placement(Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1), (MEMBER, DATA)))

    def members(self, tree: PyTree) -> PyTree:
        """Arrays (members, ...), whole for each member."""
        return jax.tree.map(lambda array: self._put(array, (MEMBER,)), tree)

    def weights(self, tree: PyTree) -> PyTree:
        """Arrays (members, ...) of weights or of the optimiser's state."""
        return jax.tree.map(lambda array: self._put(array, (MEMBER, *self._spread(array.shape[1:]))), tree)

    def batch(self, tree: PyTree) -> PyTree:
        """Arrays (members, images, ...), spread over both."""
        return jax.tree.map(lambda array: self._put(array, (MEMBER, DATA)), tree)

    def batches(self, tree: PyTree) -> PyTree:
        """Arrays (batches, members, images, ...)."""
        return jax.tree.map(lambda array: self._put(array, (None, MEMBER, DATA)), tree)

    def whole(self) -> NamedSharding:
        """Of what every device has all of."""
        return NamedSharding(self.mesh, PartitionSpec())

    def local(self, tree: PyTree) -> PyTree:
        """The same arrays on this process's first device, wherever their parts are."""
        if self.mesh.size == 1:
            return tree
        if jax.process_count() > 1:
            whole = jax.jit(lambda tree: tree, out_shardings=self.whole())(tree)
            return jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), whole)
        return jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), tree)

    def _spread(self, shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """Over `data` along the longest axis that it divides; small or odd arrays stay whole."""
        count = self.mesh.shape[DATA]
        fitting = [axis for axis, size in enumerate(shape) if size % count == 0]
        if not (self.shard_params and fitting):
            return ()
        longest = max(fitting, key=lambda axis: shape[axis])
        return tuple(DATA if axis == longest else None for axis in range(len(shape)))

    def _put(self, array: Any, axes: tuple[str | None, ...]) -> jax.Array:
        sharding = NamedSharding(self.mesh, PartitionSpec(*axes[: np.ndim(array)]))
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
