"""Images that several commands are tried on."""

import numpy as np
import pytest

from ibau_jax.data import load_dataset


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory):
    """120 digits as a .npz file: enough for every path through the command line."""
    digits = load_dataset("digits", (32, 32, 3))
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, x=digits.images[:120], y=digits.labels[:120])
    return path
