"""What unlearning reports: its rounds, where it stands, how it ended."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from flax import nnx

from ibau_jax.aims import Suspects

Status = Literal["completed", "diverged"]
Phase = Literal["search", "inner", "outer"]


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        number: counted from 1.
        perturbation: δ, float32 (perturbations, height, width, channels), in units of the image range; the
            published one, or the targeted ones.
        perturbation_norm: ℓ2 norm of the first one.
        inner_loss: mean of L_in over the batches.
        outer_loss: mean of L_out over the batches.
        seconds: wall time without compilation and evaluation; of models that unlearn together, their share of it.
    """

    number: int
    perturbation: np.ndarray = field(repr=False)
    perturbation_norm: float
    inner_loss: float
    outer_loss: float
    seconds: float


@dataclass(frozen=True)
class State:
    """Where a run stands between two rounds: all it takes to go on.

    Attributes:
        model: the model after `rounds`.
        optimizer_state: of the outer optimiser.
        rounds: those done.
        suspects: the classes that targeted perturbations lead to, where the configuration has any.
    """

    model: nnx.Module
    optimizer_state: Any = field(repr=False)
    rounds: tuple[Round, ...] = ()
    suspects: Suspects | None = None


@dataclass(frozen=True)
class Result:
    """What `unlearn` gives.

    Attributes:
        model: the cleaned model: after the last round, or after the last good one where a loss was not finite.
        rounds: the good rounds.
        status: `completed`, or `diverged` where a loss became NaN or infinite.
        compile_seconds: time taken by compilation; of models that share the compiled steps, the first one's only.
        unlearn_seconds: time taken by the rounds, this process's only.
    """

    model: nnx.Module
    rounds: tuple[Round, ...]
    status: Status
    compile_seconds: float
    unlearn_seconds: float
