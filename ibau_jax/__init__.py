"""I-BAU backdoor unlearning for PyTorch image classifiers, in JAX/Flax.

import ibau_jax

checkpoint = ibau_jax.load("suspicious.pth")
images = ibau_jax.load_dataset("clean.npz", checkpoint.input_shape)
split = ibau_jax.split_dataset(images, n_clean=5000, seed=0)
checkpoint = ibau_jax.settle(checkpoint, split.clean_set)  # of several networks with the same names and shapes
result = ibau_jax.unlearn(checkpoint.model(), split.clean_set, ibau_jax.PRESETS["robust"])
print(ibau_jax.evaluate(result.model, split.evaluation))
ibau_jax.save(checkpoint.with_weights(result.model), "cleaned.pth")
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ibau_jax.auditing import Audit, Auditor, audit
    from ibau_jax.checkpoints import Checkpoint, load, save
    from ibau_jax.checkpoints.variants import settle
    from ibau_jax.config import AuditConfig, UnlearnConfig
    from ibau_jax.data import Dataset, load_dataset, make_dataset, separate_clean_set, split_dataset
    from ibau_jax.errors import IbauError
    from ibau_jax.execution import Execution
    from ibau_jax.metrics import Metrics, evaluate
    from ibau_jax.models import NORMALIZATIONS, Normalization, Normalized
    from ibau_jax.presets import PRESETS
    from ibau_jax.triggers import Attack, load_attack
    from ibau_jax.unlearning import Member, Result, Round, State, unlearn, unlearn_many

__all__ = [
    "NORMALIZATIONS",
    "PRESETS",
    "Attack",
    "Audit",
    "AuditConfig",
    "Auditor",
    "Checkpoint",
    "Dataset",
    "Execution",
    "IbauError",
    "Member",
    "Metrics",
    "Normalization",
    "Normalized",
    "Result",
    "Round",
    "State",
    "UnlearnConfig",
    "__version__",
    "audit",
    "evaluate",
    "load",
    "load_attack",
    "load_dataset",
    "make_dataset",
    "save",
    "separate_clean_set",
    "settle",
    "split_dataset",
    "unlearn",
    "unlearn_many",
]

_PLACES = {
    "NORMALIZATIONS": "models",
    "PRESETS": "presets",
    "Attack": "triggers",
    "Audit": "auditing",
    "AuditConfig": "config",
    "Auditor": "auditing",
    "Checkpoint": "checkpoints",
    "Dataset": "data",
    "Execution": "execution",
    "IbauError": "errors",
    "Member": "unlearning",
    "Metrics": "metrics",
    "Normalization": "models",
    "Normalized": "models",
    "Result": "unlearning",
    "Round": "unlearning",
    "State": "unlearning",
    "UnlearnConfig": "config",
    "audit": "auditing",
    "evaluate": "metrics",
    "load": "checkpoints",
    "load_attack": "triggers",
    "load_dataset": "data",
    "make_dataset": "data",
    "save": "checkpoints",
    "separate_clean_set": "data",
    "settle": "checkpoints.variants",
    "split_dataset": "data",
    "unlearn": "unlearning",
    "unlearn_many": "unlearning",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import ibau_jax` alone costs next to nothing."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
