"""I-BAU (Zeng et al., ICLR 2022, arXiv 2110.03735): the minimax step and the round loop.

    min over θ of  max over ‖δ‖ ≤ C  of  (1/n) Σ L(f_θ(x_i + δ), y_i)                           (equation 1)

A round finds δ by the inner maximisation (`ibau_jax.perturb`), then takes one optimiser step along the implicit
hypergradient (`ibau_jax.hypergradient`) for every clean batch. The model always runs in inference mode.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.batches import AnyArray, Batches, make_batches, patched_images, to_unit
from ibau_jax.compilation import BatchLoop, LoopForm, compile_loop, default_loop_form
from ibau_jax.config import UnlearnConfig, make_optimizer
from ibau_jax.data.dataset import Dataset
from ibau_jax.hypergradient import SOLVERS, Params, Perturbation, hypergradient
from ibau_jax.models.inference import count_classes
from ibau_jax.perturb import Forward, cross_entropy, inner_loss, inner_step, perturbed, project

Status = Literal["completed", "diverged"]
Phase = Literal["inner", "outer"]


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        number: counted from 1.
        perturbation: δ, float32 (1, height, width, channels), in units of the image range.
        perturbation_norm: its ℓ2 norm.
        inner_loss: mean of L_in over the batches.
        outer_loss: mean of L_out over the batches.
        seconds: wall time without compilation and evaluation.
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
    """

    model: nnx.Module
    optimizer_state: Any = field(repr=False)
    rounds: tuple[Round, ...] = ()


@dataclass(frozen=True)
class Result:
    """What `unlearn` gives.

    Attributes:
        model: the cleaned model: after the last round, or after the last good one where a loss was not finite.
        rounds: the good rounds.
        status: `completed`, or `diverged` where a loss became NaN or infinite.
        compile_seconds: time taken by compilation.
        unlearn_seconds: time taken by the rounds, this process's only.
    """

    model: nnx.Module
    rounds: tuple[Round, ...]
    status: Status
    compile_seconds: float
    unlearn_seconds: float


class OuterConstants(NamedTuple):
    """What every outer step of a round sees: δ, and the clean batch that Φ is defined on."""

    delta: Perturbation
    first: Batches


class OuterBatch(NamedTuple):
    """One clean batch and the mask m_b of those of its images that are perturbed."""

    batch: Batches
    patched: Float[AnyArray, "*b n"]


def outer_loss(
    forward: Forward, config: UnlearnConfig, delta: Perturbation, params: Params, outer: OuterBatch
) -> Float[Array, ""]:
    """L_out(δ, θ) = mean CE(f_θ(clip(x_b + m_b ⊙ δ)), y_b) on one batch."""
    mask = outer.patched[:, None, None, None]
    logits = forward(params, perturbed(to_unit(outer.batch.images), mask * delta, config.clip))
    return cross_entropy(logits, outer.batch.labels, outer.batch.weights)


def outer_step(
    forward: Forward, config: UnlearnConfig, optimizer: optax.GradientTransformationExtraArgs
) -> Callable[[Any, OuterBatch, OuterConstants], Any]:
    """One optimiser step of θ along the hypergradient on one batch.

    Returns:
        `step((params, optimizer_state), outer_batch, constants)`, which gives the next `(params, optimizer_state)`
        and the outer loss before the step.
    """
    solve = SOLVERS[config.solver](config.K)

    def step(carry: tuple[Params, Any], outer: OuterBatch, constants: OuterConstants) -> Any:
        params, state = carry
        loss, gradient = hypergradient(
            partial(outer_loss, forward, config, outer=outer),
            partial(inner_loss, forward, config, batch=constants.first),
            constants.delta,
            params,
            step_size=config.fixed_point_step,
            solve=solve,
        )
        updates, state = optimizer.update(gradient, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    return step


def unlearn(
    model: nnx.Module,
    clean_set: Dataset,
    config: UnlearnConfig | None = None,
    *,
    state: State | None = None,
    loop: LoopForm | None = None,
    on_round: Callable[[State], None] | None = None,
    on_batch: Callable[[Phase, int, int], None] | None = None,
) -> Result:
    """Unlearns whatever backdoor `model` has.

    Args:
        model: a Flax NNX module that maps images, float32 (n, h, w, c) in [0, 1], to logits, float32 (n, classes).
            Its `nnx.Param`s are θ; all other state, such as BatchNorm's statistics, stays as it is. Not changed.
        clean_set: clean images with their true labels.
        config: the algorithm's constants; the preset `cifar10` by default.
        state: where to go on, as `on_round` got it; `model` is then ignored.
        loop: "python" or "scan" over batches; the backend's faster one by default.
        on_round: called after every good round.
        on_batch: called with the phase, the batches done and their number, for a progress bar.

    Returns:
        The cleaned model and what happened.

    Raises:
        DataError: the clean set is empty, or has a label that is no class of the model.
    """
    config = config or UnlearnConfig()
    image_shape = clean_set.images.shape[1:]
    clean_set.check_fits(image_shape, count_classes(model, image_shape))
    optimizer = make_optimizer(config.optim, config.lr)
    state = state or initial_state(model, config)
    graph, params, rest = nnx.split(state.model, nnx.Param, ...)  # type: ignore[misc]

    def forward(params: Params, images: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        return nnx.merge(graph, params, rest)(images)

    batches = make_batches(clean_set, config.batch_size)
    rounds = _Rounds(forward, config, optimizer, batches, loop or default_loop_form(), on_batch)
    rounds.compile(params, state.optimizer_state)
    while len(state.rounds) < config.n_rounds:
        params, optimizer_state, done = rounds.run(len(state.rounds) + 1, params, state.optimizer_state)
        if not np.isfinite([done.inner_loss, done.outer_loss, done.perturbation_norm, _norm(params)]).all():
            return rounds.result(state, "diverged")
        state = State(nnx.merge(graph, params, rest), optimizer_state, (*state.rounds, done))
        if on_round:
            on_round(state)
    return rounds.result(state, "completed")


def initial_state(model: nnx.Module, config: UnlearnConfig) -> State:
    """The state before the first round."""
    return State(model, make_optimizer(config.optim, config.lr).init(nnx.state(model, nnx.Param)))


def _norm(params: Params) -> float:
    return float(optax.tree.norm(params))


class _Rounds:
    """The compiled steps of a run, and its clocks."""

    def __init__(
        self,
        forward: Forward,
        config: UnlearnConfig,
        optimizer: optax.GradientTransformationExtraArgs,
        batches: Batches,
        form: LoopForm,
        on_batch: Callable[[Phase, int, int], None] | None,
    ) -> None:
        self.forward, self.config, self.optimizer, self.form = forward, config, optimizer, form
        self.on_batch = on_batch or (lambda phase, done, count: None)
        # Scanned batches live on the device; driven from Python they go there one at a time.
        self.batches = jax.device_put(batches) if form == "scan" else batches
        self.first = Batches(*(jnp.asarray(array[0]) for array in batches))
        self.inner_optimizer = make_optimizer(config.inner_optim, config.inner_lr)
        self.compile_seconds = self.unlearn_seconds = 0.0
        self.inner: BatchLoop
        self.outer: BatchLoop

    def compile(self, params: Params, optimizer_state: Any) -> None:
        delta = self.zero()
        inner = inner_step(self.forward, self.config, self.inner_optimizer)
        self.inner = compile_loop(inner, (delta, self.inner_optimizer.init(delta)), self.batches, params, self.form)
        outer = outer_step(self.forward, self.config, self.optimizer)
        outer_batches = OuterBatch(self.batches, jnp.asarray(self.batches.weights))
        constants = OuterConstants(delta, self.first)
        self.outer = compile_loop(outer, (params, optimizer_state), outer_batches, constants, self.form)
        self.compile_seconds = self.inner.compile_seconds + self.outer.compile_seconds

    def zero(self) -> Perturbation:
        return jnp.zeros((1, *self.batches.images.shape[2:]), jnp.float32)

    def run(self, number: int, params: Params, optimizer_state: Any) -> tuple[Params, Any, Round]:
        start, count = time.perf_counter(), len(self.batches.labels)
        delta = self.zero()
        carry = (delta, self.inner_optimizer.init(delta))
        report = partial(self.on_batch, "inner")
        (delta, _), inner_losses = self.inner.run(carry, self.batches, params, lambda done: report(done, count))
        delta = project(delta, self.config.norm_bound)

        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        patched = patched_images(key, np.asarray(self.batches.weights), self.config.portion)
        report = partial(self.on_batch, "outer")
        (params, optimizer_state), outer_losses = self.outer.run(
            (params, optimizer_state),
            OuterBatch(self.batches, np.asarray(patched)),
            OuterConstants(delta, self.first),
            lambda done: report(done, count),
        )
        seconds = time.perf_counter() - start
        self.unlearn_seconds += seconds
        norm, perturbation = float(jnp.linalg.norm(delta)), np.asarray(delta)
        losses = float(np.mean(inner_losses)), float(np.mean(outer_losses))
        return params, optimizer_state, Round(number, perturbation, norm, *losses, seconds)

    def result(self, state: State, status: Status) -> Result:
        return Result(state.model, state.rounds, status, self.compile_seconds, self.unlearn_seconds)
