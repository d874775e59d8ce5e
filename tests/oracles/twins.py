"""The same weights in Flax and in PyTorch."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from ibau_jax.checkpoints.conversion import to_torch, torch_name
from ibau_jax.models import get_architecture


def as_torch(images):
    """NHWC to NCHW."""
    return torch.as_tensor(np.asarray(images).transpose(0, 3, 1, 2).copy())


def randomised(model, rng):
    """The model with random BatchNorm statistics and scales: fresh ones are 0 and 1, which hides mistakes."""
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable) and path[-1] in ("mean", "bias"):
            variable[...] = jnp.asarray(0.1 * rng.normal(size=variable.shape).astype(np.float32))
        elif isinstance(variable, nnx.Variable) and path[-1] in ("var", "scale", "gamma", "gamma_1", "gamma_2"):
            variable[...] = jnp.asarray(rng.uniform(0.5, 1.5, variable.shape).astype(np.float32))
    return model


def torch_twin(model, num_classes=10):
    """The same weights in PyTorch, put there by the names and layouts of the conversion."""
    twin = get_architecture("small_vgg").torch_module(num_classes)
    flat = nnx.to_flat_state(nnx.state(model))
    weights = {torch_name(path): torch.as_tensor(to_torch(path, np.array(leaf[...])).copy()) for path, leaf in flat}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return twin.eval()
