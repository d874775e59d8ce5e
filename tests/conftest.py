"""Strict numerics, the shared real data, and small things that many tests need."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("IBAU_SHARED", ROOT.parent / "shared"))

# Strict dtype promotion is not possible: optax's own Adam raises a float to an integer array.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and real poisoned checkpoints."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip(f"no real data: {SHARED} is not there (set IBAU_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def shared_checkpoints(shared) -> list[Path]:
    return sorted((shared / "checkpoints").glob("*.pth"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
