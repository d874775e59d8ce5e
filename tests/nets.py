"""Small networks that several tests use."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ibau_jax.data import Dataset


class Brightness(nnx.Module):
    """Class 1 where the first pixel is brighter than one half; class 2 where the last one is above 0.9."""

    def __call__(self, x):
        first = 10 * (x[:, 0, 0, 0] - 0.5)
        return jnp.stack([-first, first, 1000 * (x[:, -1, -1, 0] - 0.9)], axis=1)


def brightness_data(rng, wrong=0):
    """Images that `Brightness` classifies rightly, but for `wrong` of them."""
    labels = np.arange(40) % 2
    images = np.full((40, 4, 4, 1), 0.2, np.float32)
    images[labels == 1, 0, 0] = 0.8
    labels[:wrong] = 1 - labels[:wrong]
    return Dataset(images, labels)
