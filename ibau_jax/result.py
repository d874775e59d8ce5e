"""What unlearning reports: its rounds, where it stands, how it ended."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from flax import nnx

from ibau_jax.aims import Suspects

Status = Literal["completed", "diverged"]
Phase = Literal["search", "rehearsal", "inner", "outer"]
OnBatch = Callable[[Phase, int, int, int], None]  # the phase, the round's number, batches done, and how many there are


@dataclass(frozen=True)
class Standing:
    """What can be said of a model without knowing the trigger, on clean images that do not unlearn; shares in [0, 1].

    Attributes:
        acc: images classified rightly.
        residual: images that the suspected short cuts of the model as it came still lead to their classes, of those
            that are not there anyway; of several suspects, the largest share.
        images: how many measured.
    """

    acc: float
    residual: float
    images: int

    @property
    def score(self) -> float:
        """Accurate, and the short cut is closed."""
        return self.acc - self.residual

    @property
    def standard_error(self) -> float:
        """Of the accuracy: how far chance alone may move it."""
        return math.sqrt(self.acc * (1 - self.acc) / self.images)


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        number: counted from 1.
        perturbation: δ, float32 (perturbations, height, width, channels), in units of the image range.
        perturbation_norm: ℓ2 norm of the first one, in its own unit (`UnlearnConfig.unit`).
        inner_loss: mean of L_in over the batches.
        outer_loss: mean of L_out over the batches.
        seconds: wall time without compilation and evaluation; of models that unlearn together, their share of it.
        standing: of the model after it, where images are held out.
        undone: whether it cost too much accuracy: the next one began where this one had begun.
    """

    number: int
    perturbation: np.ndarray = field(repr=False)
    perturbation_norm: float
    inner_loss: float
    outer_loss: float
    seconds: float
    standing: Standing | None = None
    undone: bool = False


@dataclass(frozen=True)
class State:
    """Where a run stands between two rounds: all it takes to go on.

    Attributes:
        model: the model after `rounds`, without those undone.
        optimizer_state: of the outer optimiser.
        rounds: those done.
        suspects: the classes that targeted perturbations lead to, where the configuration asks for them.
        initial: how the model stood as it came, where images are held out.
        mirrored: whether images that unlearn are mirrored.
        best: the model of `kept_round`, where images are held out and a round was not undone.
        rehearsed: how models stood after each round of rehearsals, where the configuration asks for those.
        pace: the learning rate is so many times the configuration's.
    """

    model: nnx.Module
    optimizer_state: Any = field(repr=False)
    rounds: tuple[Round, ...] = ()
    suspects: Suspects | None = None
    initial: Standing | None = None
    mirrored: bool = False
    best: nnx.Module | None = field(default=None, repr=False)
    rehearsed: tuple[Standing, ...] = ()
    pace: float = 1.0

    def after(self, done: Round, model: nnx.Module, optimizer_state: Any) -> "State":
        """The state after a round."""
        state = replace(self, model=model, optimizer_state=optimizer_state, rounds=(*self.rounds, done))
        return replace(state, best=model) if done.standing and state.kept_round == done.number else state

    def undone(self, done: Round) -> "State":
        """The state after a round that is undone."""
        return replace(self, rounds=(*self.rounds, done))

    @property
    def searched_after(self) -> int:
        """Rounds that were done when suspects were last found."""
        return 0 if self.suspects is None else int(self.suspects.found_after.max())

    @property
    def reference(self) -> Standing | None:
        """What the accuracy of a round is compared with: how the model stood as it came, or before the last search."""
        before = [done.standing for done in self.rounds[: self.searched_after] if not done.undone]
        return before[-1] if before else self.initial

    @property
    def kept_round(self) -> int:
        """The number of the round whose model is kept; 0 for none.

        It is the last of those not undone that is no worse than the best of them by more than a standard error
        (Breiman et al., 1984): images that are held out are few. Where suspects were found after some rounds, rounds
        before that do not compare: they did nothing about those, and closing them costs accuracy.
        """
        good = [done for done in self.rounds if not done.undone]
        kept = [done for done in good if done.number > self.searched_after] or good
        standings = [done.standing for done in kept if done.standing]
        if not standings:
            return kept[-1].number if kept else 0
        best = max(standings, key=lambda standing: standing.score)
        enough = best.score - best.standard_error
        return [done for done in kept if done.standing and done.standing.score >= enough][-1].number

    @property
    def kept(self) -> nnx.Module:
        """The model after that round."""
        return self.best or self.model


@dataclass(frozen=True)
class Result:
    """What `unlearn` gives.

    Attributes:
        model: the cleaned model, after `kept_round`.
        rounds: the good rounds.
        kept_round: see `State.kept_round`; 0 where none is kept, and the model is as it came.
        status: `completed`, or `diverged` where a loss or logit became NaN or infinite.
        compile_seconds: time taken by compilation; of models that share the compiled steps, the first one's only.
        unlearn_seconds: time taken by the rounds, this process's only.
    """

    model: nnx.Module
    rounds: tuple[Round, ...]
    kept_round: int
    status: Status
    compile_seconds: float
    unlearn_seconds: float

    def after(self, earlier: "Result") -> "Result":
        """This one, with the seconds of an earlier one that it goes on from."""
        compiling = earlier.compile_seconds + self.compile_seconds
        return replace(self, compile_seconds=compiling, unlearn_seconds=earlier.unlearn_seconds + self.unlearn_seconds)
