"""What unlearning reports: its rounds, where it stands, how it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from flax import nnx
from jaxtyping import Float

from ibau_jax.auditing.judgement import Suspect
from ibau_jax.config import UnlearnConfig
from ibau_jax.optimizers import make_optimizer
from ibau_jax.unlearning.players import Players

Status = Literal["completed", "diverged"]
Phase = Literal["search", "inner", "outer"]
OnBatch = Callable[[Phase, int, int, int], None]  # the phase, the round's number, batches done, and how many there are


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        number: counted from 1.
        perturbation: untargeted δ, float32 (perturbations, height, width, channels), in units of the image range; those
            of the first round again, where they are not renewed.
        perturbation_norm: ℓ2 norm of the first one, in its own unit (`UnlearnConfig.unit`).
        inner_loss: mean of L_in over the batches, in the round that found `perturbation`.
        outer_loss: mean of L_out over the batches.
        seconds: wall time without compilation and evaluation; of models that unlearn together, their share of it.
        outliers: what stands out after it, as the players see it, the most prominent class first.
    """

    number: int
    perturbation: Float[np.ndarray, "k h w c"] = field(repr=False)
    perturbation_norm: float
    inner_loss: float
    outer_loss: float
    seconds: float
    outliers: tuple[Suspect, ...] = ()


def that_found(rounds: Sequence[Round]) -> list[Round]:
    """Picks the rounds that found perturbations; where these are not renewed, later ones go on with the first one's."""
    same = [np.array_equal(one.perturbation, following.perturbation) for one, following in pairwise(rounds)]
    return [done for done, again in zip(rounds, [False, *same], strict=True) if not again]


@dataclass(frozen=True)
class State:
    """Where a run stands between two rounds: all it takes to go on.

    Attributes:
        model: the model after `rounds`.
        optimizer_state: of the outer optimiser.
        rounds: those done.
        players: of every space that the configuration names; None where it names none, and before the search that they
            begin with.
        mirrored: whether images that unlearn are mirrored.
        outliers: what stood out in the original model, the most prominent class first.
    """

    model: nnx.Module
    optimizer_state: Any = field(repr=False)
    rounds: tuple[Round, ...] = ()
    players: Players | None = field(default=None, repr=False)
    mirrored: bool = False
    outliers: tuple[Suspect, ...] = ()

    def after(self, done: Round, model: nnx.Module, optimizer_state: Any, players: Players | None) -> "State":
        """Makes the state after a round."""
        return replace(self, model=model, optimizer_state=optimizer_state, rounds=(*self.rounds, done), players=players)


def initial_state(model: nnx.Module, config: UnlearnConfig) -> State:
    """Makes the state before the first round and before any search."""
    return State(model, make_optimizer(config.optim, config.lr, config.b2).init(nnx.state(model, nnx.Param)))


@dataclass(frozen=True)
class Result:
    """What `unlearn` gives.

    Attributes:
        model: the cleaned model, after the last good round.
        rounds: the good rounds.
        status: `completed`, or `diverged` where a loss or logit became NaN or infinite.
        compile_seconds: time taken by compilation; of models that go one after the other, the first one's only.
        unlearn_seconds: time taken by the rounds, this process's only.
    """

    model: nnx.Module
    rounds: tuple[Round, ...]
    status: Status
    compile_seconds: float
    unlearn_seconds: float
