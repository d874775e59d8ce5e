"""A network that draws pictures from pictures: the patterns and the masks of input-aware triggers."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.layers import ABSTRACT, Activation, MaxPool, Sequential, batch_norm, conv, relu

STEPS = 3  # halvings, and doublings
SMALLEST = 2**STEPS  # pixels, height and width

NamedArrays: TypeAlias = Mapping[str, np.ndarray]


class Generator(nnx.Module):
    """Pictures with values in [0, 1] of images, of their height and width (Nguyen and Tran, NeurIPS 2020).

    Three times two convolutions and a halving, `width` features first and twice as many each time; a convolution;
    three times a doubling and two convolutions.
    """

    def __init__(self, channels: int, drawn: int, width: int, rngs: nnx.Rngs) -> None:
        features = [width * 2**step for step in range(STEPS)]
        self.down = nnx.List(
            [_pair(before, now, now, rngs) for before, now in zip([channels, *features], features, strict=False)]
        )
        self.halve = MaxPool(2)
        self.middle = Sequential(_block(features[-1], features[-1], rngs))
        after = [*reversed(features[:-1]), drawn]
        self.up = nnx.List([_pair(now, now, then, rngs) for now, then in zip(reversed(features), after, strict=True)])
        self.up[-1].pop()  # the last one ends without a relu

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w d"]:
        sizes = []
        for pair in self.down:
            x = pair(x)
            sizes.append(x.shape[1:3])
            x = self.halve(x)
        x = self.middle(x)
        for pair in self.up:
            x = pair(jax.image.resize(x, (len(x), *sizes.pop(), x.shape[-1]), "bilinear"))
        return (jnp.tanh(x) + 1) / 2


def _block(before: int, after: int, rngs: nnx.Rngs) -> list[nnx.Module]:
    return [conv(before, after, 3, rngs, bias=True), batch_norm(after, rngs), Activation(relu)]


def _pair(before: int, between: int, after: int, rngs: nnx.Rngs) -> Sequential:
    return Sequential([*_block(before, between, rngs), *_block(between, after, rngs)])


def arrays_of(generator: nnx.Module) -> dict[str, np.ndarray]:
    """A generator's arrays by name, such as `down.0.1.scale`."""
    flat = nnx.to_flat_state(nnx.state(generator))
    return {_name(path): np.asarray(variable[...]) for path, variable in flat}


def generator_of(arrays: NamedArrays) -> Generator:
    """The generator that has these arrays, as `arrays_of` gave them.

    Raises:
        ValueError: they are not those of a generator.
    """
    first, last = (arrays.get(name, np.empty(0)) for name in ("down.0.0.kernel", f"up.{STEPS - 1}.3.kernel"))
    if not (first.ndim == last.ndim == 4 and first.size and last.size):  # an empty one may have any width
        raise ValueError("no generator has these arrays")
    generator = Generator(first.shape[2], last.shape[3], first.shape[3], ABSTRACT)
    flat: Any = nnx.to_flat_state(nnx.state(generator))
    expected = {_name(path): variable.shape for path, variable in flat}
    found = {name: array.shape for name, array in arrays.items()}
    wrong = [name for name in {*expected, *found} if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(f"no generator of {first.shape[3]} features has the array {min(wrong)} as it is")
    filled = [(path, variable.replace(jnp.asarray(arrays[_name(path)]))) for path, variable in flat]
    nnx.update(generator, nnx.from_flat_state(filled))
    return generator


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
