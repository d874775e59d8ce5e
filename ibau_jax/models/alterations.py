"""What can be otherwise in a network and leaves no trace in its state dict, for all architectures alike.

`NAME+ALTERATION` is the architecture called NAME with another activation, pooling or ε of its normalisations, or
without its last stride: `resnet18_small_stem+silu`. Clean images tell which it is, where it moves the statistics of
BatchNorm's inputs (`ibau_jax.checkpoints.variants`); the ε of LayerNorm is told by whose names a file has, and by a
configuration beside it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ibau_jax.models.layers import AvgPool, Function, MaxPool, elu, gelu, hardswish, leaky_relu, relu, relu6, silu


def mish(x: Array) -> Array:
    """`torch.nn.Mish`."""
    return x * jnp.tanh(jax.nn.softplus(x))


ACTIVATIONS: dict[str, Function] = {
    "relu": relu,
    "relu6": relu6,
    "leaky_relu": partial(leaky_relu, slope=0.01),
    "leaky_relu0.1": leaky_relu,
    "leaky_relu0.2": partial(leaky_relu, slope=0.2),
    "elu": elu,
    "selu": jax.nn.selu,
    "silu": silu,
    "gelu": gelu,
    "hardswish": hardswish,
    "mish": mish,
    "tanh": jnp.tanh,
}


def _activate_by(function: Function, model: nnx.Module) -> bool:
    """The activation that the model has most often becomes another; whether there was one to change."""
    having = [module for _, module in nnx.iter_graph(model) if hasattr(module, "activation")]
    counts = Counter(module.activation for module in having).most_common(1)
    changing = [module for module in having if module.activation is counts[0][0] is not function]
    for module in changing:
        module.activation = function
    return bool(changing)


def _pool_by(replacement: Callable[[MaxPool], nnx.Module | None], model: nnx.Module) -> bool:
    """Max poolings become other layers; those stay that have no replacement."""
    changed = False
    for _, module in list(nnx.iter_graph(model)):
        if not isinstance(module, nnx.Module):
            continue
        layers: Any = enumerate(module) if isinstance(module, nnx.List) else list(vars(module).items())
        for place, layer in layers:
            if isinstance(layer, MaxPool) and (other := replacement(layer)):
                if isinstance(module, nnx.List):
                    module[place] = other
                else:
                    setattr(module, place, other)
                changed = True
    return changed


def normalize_by(epsilon: float, model: nnx.Module) -> bool:
    """BatchNorm's ε becomes another."""
    return _set_epsilon([one for _, one in nnx.iter_graph(model) if isinstance(one, nnx.BatchNorm)], epsilon)


def _normalize_layers_by(epsilon: float, model: nnx.Module) -> bool:
    """LayerNorm's ε becomes another."""
    return _set_epsilon([one for _, one in nnx.iter_graph(model) if isinstance(one, nnx.LayerNorm)], epsilon)


def _normalize_head_by(epsilon: float, model: nnx.Module) -> bool:
    """The ε of the LayerNorm that the classifier begins with becomes another."""
    layers = [one for path, one in nnx.iter_graph(model) if "classifier" in path]
    return _set_epsilon([one for one in layers if isinstance(one, nnx.LayerNorm)], epsilon)


def _set_epsilon(norms: Sequence[nnx.BatchNorm | nnx.LayerNorm], epsilon: float) -> bool:
    """Gives normalisations another ε; whether one of them had another before."""
    changing = [norm for norm in norms if norm.epsilon != epsilon]
    for norm in changing:
        norm.epsilon = epsilon
    return bool(changing)


def _keep_size(model: nnx.Module) -> bool:
    """The last block that makes its maps smaller by a convolution's stride keeps their size."""
    modules = list(nnx.iter_graph(model))
    strided = [path[:2] for path, module in modules if isinstance(module, nnx.Conv) and module.strides == 2]
    for path, module in modules:
        if strided and path[:2] == strided[-1]:
            if isinstance(module, nnx.Conv):
                module.strides = 1
            elif isinstance(module, AvgPool):  # of a shortcut that pools where the other branch has a stride
                module.size = module.stride = 1
    return bool(strided)


Alter = Callable[[nnx.Module], bool]  # changes a model in place; whether there was anything to change

POOLINGS: dict[str, Alter] = {
    "avg_pool": partial(_pool_by, lambda pool: AvgPool(pool.size, pool.stride, pool.padding, ceil=pool.ceil)),
    "pool2": partial(_pool_by, lambda pool: MaxPool(2) if (pool.size, pool.stride) == (3, 2) else None),
    "pool3": partial(_pool_by, lambda pool: MaxPool(3, 2, 1) if pool.size == 2 else None),
    "pool_ceil": partial(
        _pool_by, lambda pool: None if pool.ceil else MaxPool(pool.size, pool.stride, pool.padding, ceil=True)
    ),
}

# The ε of all LayerNorms, and of the classifier's alone, by the alteration that gives it.
EPSILONS = {"1e-12": 1e-12, "1e-8": 1e-8, "1e-6": 1e-6, "1e-5": 1e-5}
LAYER_EPSILONS = {f"ln_eps{text}": epsilon for text, epsilon in EPSILONS.items()}
HEAD_EPSILONS = {f"head_ln_eps{text}": epsilon for text, epsilon in EPSILONS.items()}

# Of each kind a network has one at most, the more common first.
KINDS: tuple[dict[str, Alter], ...] = (
    {name: partial(_activate_by, function) for name, function in ACTIVATIONS.items()},
    POOLINGS,
    {"last_stride1": _keep_size},
    {"eps1e-3": partial(normalize_by, 1e-3)},
    {name: partial(_normalize_layers_by, epsilon) for name, epsilon in LAYER_EPSILONS.items()},
    {name: partial(_normalize_head_by, epsilon) for name, epsilon in HEAD_EPSILONS.items()},
)
ALTERATIONS: dict[str, Alter] = {name: alter for kind in KINDS for name, alter in kind.items()}

# These move the statistics of BatchNorm's inputs too little for clean images to tell.
FAINT = ("relu6", "leaky_relu", "eps1e-3", *LAYER_EPSILONS, *HEAD_EPSILONS)


def replacing(chosen: Sequence[str], kind: Collection[str], name: str | None) -> tuple[str, ...]:
    """Alterations with the one of a kind replaced by another, or left out, in the order of kinds."""
    names = {*(one for one in chosen if one not in kind), *((name,) if name else ())}
    return tuple(one for one in ALTERATIONS if one in names)
