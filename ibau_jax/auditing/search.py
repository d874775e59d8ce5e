"""The smallest trigger for every class, and for any other than an image's own, as a race.

All search through a first heat. What an audit compares is settled by few of them: the classes with the smallest
triggers, those that the median is among, and what leads to any other class. These go on; the sizes of the others are
estimated. Arrays of *aims* have a row a class, and last one for any other class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ibau_jax.batches import make_batches
from ibau_jax.compilation import compiler_options
from ibau_jax.config import AuditConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import NotFiniteError
from ibau_jax.execution import Execution
from ibau_jax.functional import Apply, Weights, make_apply, split_weights
from ibau_jax.loops import BatchLoop, compile_loop
from ibau_jax.metrics import predict
from ibau_jax.perturbations import Perturbation, PerturbationSpace, Shape
from ibau_jax.perturbations.player import Follow, Player, Seen, make_step, towards
from ibau_jax.perturbations.player import begin as begin_player
from ibau_jax.placement import Placement

OnStep = Callable[[int, int], None]

# Chosen in benchmarks/NOTEBOOK.md, "The search, as a race", but for the first, which bounds memory.
PIXELS_AT_ONCE = 2**20  # of the images of all classes in a step
HEATS = 3  # of equally many steps; all classes are in the first
FRONT, MIDDLE = 3, 2  # classes that go on after it: the smallest, and those around the median
SETTLED = 4  # a size is averaged over the last quarter of the heat


class Constants(NamedTuple):
    """What every step sees: the model, and what each trigger aims at: a class, or their number for any other class."""

    weights: Weights
    target: Int[Array, " aims"]


class SmallestTriggers(NamedTuple):
    """What a search of one space found.

    Attributes:
        triggers: with a leading axis of aims.
        sizes: their sizes, in the space's unit. That of a class that left the race is an estimate: the size that it had
            then, times what the classes around the median have shrunk by since, and no less than that of a class that
            was in front.
        finished: whether one went on to the end. The class with the smallest size did, and what leads to any other.
    """

    triggers: Perturbation
    sizes: Float[np.ndarray, " aims"]
    finished: Bool[np.ndarray, " aims"]

    def ranking(self) -> list[tuple[int, int | None]]:
        """Lists the rows that went on to the end and what they aim at, those with the smallest triggers first.

        None is any other class than an image's own, as in `Suspect.label`.
        """
        last = len(self.sizes) - 1
        order = [int(index) for index in np.argsort(self.sizes, kind="stable") if self.finished[index]]
        return [(index, index if index < last else None) for index in order]


@dataclass(frozen=True)
class Search:
    """A search of one space, compiled for an architecture and good for all its classes and weights.

    Attributes:
        classes: how many there are.
        at_once: how many aims go through a step together.
        begin: `begin(keys)`, what the first step gets.
        loop: over the steps of a heat.
        measure: `measure(triggers, seen, constants)`: how many images of other classes follow, how many there are, and
            how many images' logits are not finite.
    """

    space: PerturbationSpace
    config: AuditConfig
    classes: int
    at_once: int
    begin: Callable[[Array], Player]
    loop: BatchLoop
    measure: Callable[[Perturbation, Seen, Constants], Follow]


def search_step(apply: Apply, space: PerturbationSpace, config: AuditConfig, shape: Shape) -> Callable[..., Any]:
    """Makes a step of some aims: `step(players, seen, constants)` gives the next players and the sizes, (aims,)."""
    one = make_step(space, shape, falling(config), config.rate, config.success)

    def step(players: Player, seen: Seen, constants: Constants) -> tuple[Player, Float[Array, " aims"]]:
        weights, forward = constants.weights, partial(apply, constants.weights.rest)
        following = jax.vmap(lambda player, target: one(forward, player, weights.params, seen, target))(
            players, constants.target
        )
        return following, following.size

    return step


def falling(config: AuditConfig) -> optax.Schedule:
    """What steps of the trigger and of its size are multiplied by: 1 in the first heat, falling to a tenth after it."""
    first = heat_steps(config)
    rest = optax.cosine_decay_schedule(1.0, (HEATS - 1) * first, alpha=0.1)
    return optax.join_schedules([optax.constant_schedule(1.0), rest], [first])


def heat_steps(config: AuditConfig) -> int:
    """Counts the steps of a heat."""
    return -(-config.steps // HEATS)


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
    going_on = min(classes, FRONT + MIDDLE) + 1
    chunks = -(-going_on * config.batch_size * shape[0] * shape[1] // PIXELS_AT_ONCE)
    at_once = -(-going_on // min(chunks, going_on))
    apply = make_apply(model, execution)

    def begin(keys: Array) -> Player:
        return jax.vmap(lambda key: begin_player(space, key, shape, falling(config)))(keys)

    def measure(triggers: Perturbation, seen: Seen, constants: Constants) -> Follow:
        weights, forward = constants.weights, partial(apply, constants.weights.rest)
        with execution.products():
            return jax.vmap(lambda trigger, target: towards(forward, space, trigger, weights.params, seen, target)[1])(
                triggers, constants.target
            )

    place = Placement.one_device()
    start = place.members(begin(jax.random.split(jax.random.key(0), at_once)))
    constants = place.members(Constants(split_weights(model), jnp.arange(at_once)))
    step = search_step(apply, space, config, shape)
    first = heat_batches(images, images.labels, config)[0]  # for its shapes
    loop = compile_loop(step, start, first, constants, execution=execution, placement=place)
    compiled = jax.jit(measure, compiler_options=compiler_options())
    return Search(space, config, classes, at_once, begin, loop, compiled)


def heat_batches(images: Dataset, own: Int[np.ndarray, " n"], config: AuditConfig) -> list[Seen]:
    """Random images for every step of every heat, (steps, batch_size, ...): one permutation of them after another."""
    rng = np.random.default_rng(config.seed)
    size, steps = min(config.batch_size, len(images)), HEATS * heat_steps(config)
    rounds = -(-steps * size // len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(rounds)])[: steps * size]
    return [_seen(images.take(of_heat), own[of_heat], size) for of_heat in np.split(order, HEATS)]


def _seen(images: Dataset, own: Int[np.ndarray, " n"], size: int) -> Seen:
    """Batches of images, the last filled up, with the classes that the model itself gives them."""
    batches = make_batches(images, size)
    classes = np.zeros(batches.labels.size, np.int32)
    classes[: len(own)] = own
    return Seen(batches, classes.reshape(batches.labels.shape))


def run_search(
    search: Search,
    model: nnx.Module,
    images: Dataset,
    on_step: OnStep | None = None,
    own: Int[np.ndarray, " n"] | None = None,
) -> SmallestTriggers:
    """The smallest triggers for all aims of a model, found on clean images.

    Args:
        search: compiled for the model's architecture.
        model: see `ibau_jax.unlearn`.
        images: clean images with their true labels.
        on_step: called with the steps done, and how many there are for all aims.
        own: the classes that the model itself gives the images, where the caller has them.

    Raises:
        NotFiniteError: the model's logits are NaN or infinite, or a trigger became so, as it does where a gradient is.
    """
    weights, aims = split_weights(model), np.arange(search.classes + 1)
    players = _first_players(search)
    first, *heats = heat_batches(images, predict(model, images) if own is None else own, search.config)
    going_on = min(search.classes, FRONT + MIDDLE) + 1
    parts = [len(aim_parts(search, aims[:count])) for count in (len(aims), *[going_on] * len(heats))]
    steps = len(first.own) * np.cumsum([0, *parts])

    def report(heats_before: int, parts_before: int, done: int) -> None:
        if on_step:
            on_step(heats_before + parts_before + done, int(steps[-1]))

    players, begun = _heat(search, weights, players, aims, first, partial(report, 0))
    front, middle = in_the_race(begun[:-1])
    racing, ended = np.concatenate([front, middle, aims[-1:]]), begun
    for heat, before in zip(heats, steps[1:-1], strict=True):
        players, ended = _heat(search, weights, players, racing, heat, partial(report, int(before)))
    finished = np.isin(aims, racing)
    shrunk = np.exp(np.mean(np.log(ended[middle] / begun[middle]))) if len(middle) else 1.0
    estimates = np.clip(begun * shrunk, ended[front].max(), search.space.max_size(images.images.shape[1:]))
    sizes = np.where(finished, ended, estimates)
    triggers = jax.tree.map(np.asarray, jax.vmap(search.space.project)(players.perturbation, jnp.float32(sizes)))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(triggers)):
        raise NotFiniteError(
            "the search for small triggers met NaN or infinity: the model's logits or their gradients are not finite "
            f"for some of {len(images)} images of {images.name}, and no verdict can be had of it"
        )
    return SmallestTriggers(triggers, sizes, finished)


def _first_players(search: Search) -> Player:
    """Makes the players of all aims, in NumPy arrays: the device holds those that go through steps together."""
    keys = jax.random.split(jax.random.key(search.config.seed), search.classes + 1)
    parts = [search.begin(keys[targets]) for targets in aim_parts(search, np.arange(len(keys)))]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(keys)], *parts)


def _heat(
    search: Search,
    weights: Weights,
    players: Player,
    racing: Int[np.ndarray, " m"],
    seen: Seen,
    report: Callable[[int, int], None],
) -> tuple[Player, Float[np.ndarray, " aims"]]:
    """Takes the players `racing` through a heat: all players after it, and sizes, 1 of the others."""
    place, after, sizes = Placement.one_device(), jax.tree.map(np.copy, players), np.ones(search.classes + 1)
    steps = len(seen.own)
    for part, targets in enumerate(aim_parts(search, racing)):
        constants = place.members(Constants(weights, jnp.asarray(targets)))
        some = jax.tree.map(lambda leaf, targets=targets: leaf[targets], players)
        moved, sizes_of_steps = search.loop.run(place.members(some), seen, constants, partial(report, part * steps))
        for leaf, new in zip(jax.tree.leaves(after), jax.tree.leaves(moved), strict=True):
            leaf[targets] = new
        settled = sizes_of_steps[-max(1, steps // SETTLED) :].astype(np.float64)
        sizes[targets] = np.exp(np.mean(np.log(settled), axis=0))
    return after, sizes


def in_the_race(sizes: Float[np.ndarray, " classes"]) -> tuple[Int[np.ndarray, " front"], Int[np.ndarray, " middle"]]:
    """Finds the classes that go on: those with the smallest sizes, and those nearest to the median's rank."""
    order = np.argsort(sizes, kind="stable")
    from_median = np.abs(np.arange(len(order)) - (len(order) - 1) / 2)[FRONT:]
    return order[:FRONT], order[FRONT:][np.argsort(from_median, kind="stable")[:MIDDLE]]


def aim_parts(search: Search, aims: Int[np.ndarray, " m"]) -> list[Int[np.ndarray, " at_once"]]:
    """The aims that go through the steps together; the last part is filled up with some that were there."""
    return list(np.resize(aims, (-(-len(aims) // search.at_once), search.at_once)))


def measure(
    search: Search,
    model: nnx.Module,
    triggers: Perturbation,
    images: Dataset,
    which: Bool[np.ndarray, " aims"],
    own: Int[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, " aims"]:
    """The share of images of other classes that a trigger takes to its aim, in [0, 1]; 0 where there are none. To any
    other class all images can go, and all count.

    Of those that are not among `which` it is NaN. `own` are the classes that the model itself gives the images, where
    the caller has them.

    Raises:
        NotFiniteError: logits of triggered images are NaN or infinite.
    """
    seen = _seen(images, predict(model, images) if own is None else own, search.config.batch_size)
    weights, shares = split_weights(model), np.full(len(which), np.nan)
    for targets in aim_parts(search, np.flatnonzero(which)):
        some = jax.tree.map(lambda array, targets=targets: array[targets], triggers)
        constants = Constants(weights, jnp.asarray(targets))
        counts = [
            search.measure(some, jax.tree.map(lambda array, index=index: array[index], seen), constants)
            for index in range(len(seen.own))
        ]
        follow, count, broken = np.sum(np.asarray(counts), axis=0)
        if broken.any():
            raise NotFiniteError(
                f"the logits of {broken.max():g} of {len(images)} images of {images.name} are not finite (NaN or "
                "infinity) with a trigger that the search found; no verdict can be had of the model"
            )
        shares[targets] = follow / np.maximum(np.where(targets == search.classes, len(images), count), 1)
    return shares
