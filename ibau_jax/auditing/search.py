"""The smallest trigger for every class: players of all classes search at once, under `vmap`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from ibau_jax.batches import Batches, make_batches
from ibau_jax.compilation import compiler_options
from ibau_jax.config import AuditConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import NotFiniteError
from ibau_jax.execution import Execution
from ibau_jax.functional import Apply, Weights, make_apply, split_weights
from ibau_jax.loops import BatchLoop, compile_loop
from ibau_jax.perturbations import Perturbation, PerturbationSpace, Shape
from ibau_jax.perturbations.player import Follow, Player, make_step, towards
from ibau_jax.perturbations.player import begin as begin_player
from ibau_jax.placement import Placement

OnStep = Callable[[int, int], None]

PIXELS_AT_ONCE = 2**20  # of the images of all classes in a step; bounds memory
SETTLED = 4  # the size is averaged over the last quarter of the steps


class Constants(NamedTuple):
    """What every step sees: the model, and the class that each trigger aims at."""

    weights: Weights
    target: Int[Array, " classes"]


class Found(NamedTuple):
    """The smallest triggers of one space.

    Attributes:
        triggers: of every class, with a leading axis of classes.
        sizes: in the space's unit.
    """

    triggers: Perturbation
    sizes: Float[np.ndarray, " classes"]


@dataclass(frozen=True)
class Search:
    """A search of one space, compiled for an architecture and good for all its classes and weights.

    Attributes:
        classes: how many there are.
        at_once: how many of them go through a step together.
        begin: `begin(keys)`, what the first step gets.
        loop: over the steps.
        measure: `measure(triggers, batch, constants)`: how many images of other classes follow, how many there are, and
            how many images' logits are not finite.
    """

    space: PerturbationSpace
    config: AuditConfig
    classes: int
    at_once: int
    begin: Callable[[Array], Player]
    loop: BatchLoop
    measure: Callable[[Perturbation, Batches, Constants], Follow]


def search_step(apply: Apply, space: PerturbationSpace, config: AuditConfig, shape: Shape) -> Callable[..., Any]:
    """Makes a step of all classes: `step(players, batch, constants)` gives the next ones and the sizes, (classes,)."""
    one = make_step(space, shape, falling(config), config.rate, config.success)

    def step(players: Player, batch: Batches, constants: Constants) -> tuple[Player, Float[Array, " classes"]]:
        weights, forward = constants.weights, partial(apply, constants.weights.rest)
        following = jax.vmap(lambda player, target: one(forward, player, weights.params, batch, target))(
            players, constants.target
        )
        return following, following.size

    return step


def falling(config: AuditConfig) -> optax.Schedule:
    """What steps are multiplied by, those of the trigger and those of its size: from 1 to a tenth."""
    return optax.cosine_decay_schedule(1.0, config.steps, alpha=0.1)


def compile_search(
    model: nnx.Module,
    classes: int,
    images: Dataset,
    space: PerturbationSpace,
    config: AuditConfig,
    execution: Execution,
) -> Search:
    """Compiles the search for models like `model` and images like `images`."""
    shape = images.images.shape[1:]
    chunks = -(-classes * config.batch_size * shape[0] * shape[1] // PIXELS_AT_ONCE)
    at_once = -(-classes // min(chunks, classes))
    apply = make_apply(model, execution)

    def begin(keys: Array) -> Player:
        return jax.vmap(lambda key: begin_player(space, key, shape, falling(config)))(keys)

    def measure(triggers: Perturbation, batch: Batches, constants: Constants) -> Follow:
        weights, forward = constants.weights, partial(apply, constants.weights.rest)
        with execution.products():
            return jax.vmap(lambda trigger, target: towards(forward, space, trigger, weights.params, batch, target)[1])(
                triggers, constants.target
            )

    place = Placement.one_device()
    start = place.members(begin(jax.random.split(jax.random.key(0), at_once)))
    constants = place.members(Constants(split_weights(model), jnp.arange(at_once)))
    step = search_step(apply, space, config, shape)
    loop = compile_loop(step, start, step_batches(images, config), constants, execution=execution, placement=place)
    compiled = jax.jit(measure, compiler_options=compiler_options())
    return Search(space, config, classes, at_once, begin, loop, compiled)


def step_batches(images: Dataset, config: AuditConfig) -> Batches:
    """Random images for every step, (steps, batch_size, ...): one permutation of them after another."""
    rng = np.random.default_rng(config.seed)
    size = min(config.batch_size, len(images))
    rounds = -(-config.steps * size // len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(rounds)])[: config.steps * size]
    return make_batches(images.take(order), size)


def run_search(search: Search, model: nnx.Module, images: Dataset, on_step: OnStep | None = None) -> Found:
    """The smallest triggers of all classes of a model, found on clean images.

    Args:
        search: compiled for the model's architecture.
        model: see `ibau_jax.unlearn`.
        images: clean images with their true labels.
        on_step: called with the steps done, and how many there are for all classes.

    Raises:
        NotFiniteError: a trigger became NaN or infinite, as it does where a logit or its gradient is.
    """
    place, weights = Placement.one_device(), split_weights(model)
    keys = jax.random.split(jax.random.key(search.config.seed), search.classes)
    batches, parts = step_batches(images, search.config), class_parts(search)
    found: list[Found] = []
    for part, targets in enumerate(parts):

        def report(done: int, before: int = part * search.config.steps) -> None:
            if on_step:
                on_step(before + done, len(parts) * search.config.steps)

        constants = place.members(Constants(weights, jnp.asarray(targets)))
        last, sizes = search.loop.run(place.members(search.begin(keys[targets])), batches, constants, report)
        settled = np.exp(np.mean(np.log(sizes[-max(1, len(sizes) // SETTLED) :].astype(np.float64)), axis=0))
        found.append(Found(last.perturbation, settled))
    joined = _joined(search, found)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(joined)):
        raise NotFiniteError(
            "the search for small triggers met NaN or infinity: the model's logits or their gradients are not finite "
            f"for some of {len(images)} images of {images.name}, and no verdict can be had of it"
        )
    return joined


def class_parts(search: Search) -> list[np.ndarray]:
    """The classes that go through the steps together; the last part is filled up with classes that were there."""
    return list(np.resize(np.arange(search.classes), (-(-search.classes // search.at_once), search.at_once)))


def _joined(search: Search, found: list[Found]) -> Found:
    joined = jax.tree.map(lambda *arrays: np.concatenate([np.asarray(array) for array in arrays]), *found)
    return Found(*jax.tree.map(lambda array: array[: search.classes], tuple(joined)))


def measure(
    search: Search, model: nnx.Module, triggers: Perturbation, images: Dataset
) -> Float[np.ndarray, " classes"]:
    """The share of images of other classes that each class's trigger takes to it, in [0, 1]; 0 where there are none.

    Raises:
        NotFiniteError: logits of triggered images are NaN or infinite.
    """
    batches = make_batches(images, search.config.batch_size)
    weights, shares = split_weights(model), []
    for targets in class_parts(search):
        some = jax.tree.map(lambda array, targets=targets: array[targets], triggers)
        constants = Constants(weights, jnp.asarray(targets))
        counts = [
            search.measure(some, Batches(*(array[index] for array in batches)), constants)
            for index in range(len(batches.labels))
        ]
        follow, count, broken = np.sum(np.asarray(counts), axis=0)
        if broken.any():
            raise NotFiniteError(
                f"the logits of {broken.max():g} of {len(images)} images of {images.name} are not finite (NaN or "
                "infinity) with a trigger that the search found; no verdict can be had of the model"
            )
        shares.append(follow / np.maximum(count, 1))
    return np.concatenate(shares)[: search.classes]
