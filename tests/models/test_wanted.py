"""The rows of `cases/wanted_checkpoints.md`: recognised, computed as PyTorch computes them, written back as they were."""

import jax
import numpy as np
import pytest
import torch

from ibau_jax import load, save
from tests.conftest import SHARED
