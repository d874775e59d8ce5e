"""Players: universal perturbations that lead to a class, or to any other than an image's own, and their sizes.

As in DDN (Rony et al., CVPR 2019) direction and size are decoupled. Each step moves the perturbation along the gradient
of the loss and projects it onto the size allowed; that shrinks after a step in which enough
images followed, and grows after one in which they did not. So it settles where about as many follow as are asked for,
and no weight between success and size has to be chosen.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ibau_jax.batches import AnyArray, Batches, to_unit
from ibau_jax.functional import Forward
from ibau_jax.models.inference import NO_CLASS, classes_of
from ibau_jax.perturbations.space import Perturbation, PerturbationSpace, Shape

SMALLEST = 1e-6  # of the largest size: what is smaller changes no image, and its ratio to another no longer is a number
FIRST = 0.05  # of the largest size, where a player begins (benchmarks/NOTEBOOK.md, "The search, as a race")


class Player(NamedTuple):
    """What a step updates. With a leading axis everywhere it is one player a class, and last one for any other class.

    Attributes:
        perturbation: φ, of the player's space.
        optimizer_state: of φ.
        size: the size allowed.
        steps: how many are done.
    """

    perturbation: Perturbation
    optimizer_state: Any
    size: Float[Array, "*aims"]
    steps: Int[Array, "*aims"]


class Seen(NamedTuple):
    """Clean images that players see.

    Attributes:
        batch: the images.
        own: the classes that the model itself gives them.
    """

    batch: Batches
    own: Int[AnyArray, "*b n"]


class Follow(NamedTuple):
    """How many images follow a perturbation to its aim.

    Attributes:
        follow: of images of other classes, those that do.
        others: how many of those there are. For any other class all images can follow, but what leads the others to one
            class does not move that class's own: so the n images count as n (1 - 1 / classes).
        broken: of all images, those whose logits are not finite.
    """

    follow: Float[Array, ""]
    others: Float[Array, ""]
    broken: Float[Array, ""]


def begin(space: PerturbationSpace, key: Array, shape: Shape, schedule: optax.Schedule) -> Player:
    """Makes a player that has done no step; the first one projects its perturbation onto the size allowed."""
    perturbation = space.init(key, shape)
    state = space.ascent(schedule).init(perturbation)
    return Player(perturbation, state, jnp.float32(FIRST * space.max_size(shape)), jnp.int32(0))


def see(forward: Forward, params: Any, batch: Batches) -> Seen:
    """Shows players a batch."""
    logits = forward(jax.lax.stop_gradient(params), to_unit(batch.images))
    return Seen(batch, jnp.argmax(logits, axis=-1))


def towards(
    forward: Forward,
    space: PerturbationSpace,
    perturbation: Perturbation,
    params: Any,
    seen: Seen,
    target: Int[Array, ""],
) -> tuple[Float[Array, ""], Follow]:
    """Computes −log of the probability of the aim, the mean over images of other classes, and how many of them follow.

    The aim `target` is a class, or the number of classes: then it is any other class than an image's own, as an
    all-to-all backdoor's is, and the mean is over all images.
    """
    batch, own = seen
    logits = forward(params, space.apply(perturbation, to_unit(batch.images)))
    count = logits.shape[-1]
    classes, to_class = jnp.arange(count)[None], target < count
    aim = jnp.where(to_class, classes == target, classes != own[:, None])
    losses = jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(jnp.where(aim, logits, -jnp.inf), axis=-1)
    others = batch.weights * jnp.where(to_class, batch.labels != target, 1 - 1 / count)
    predicted = classes_of(logits)
    reached = jnp.any(aim & (classes == predicted[:, None]), axis=-1)
    follow = jnp.sum(jnp.where(to_class, others, batch.weights) * reached)
    total, broken = jnp.sum(others), jnp.sum(batch.weights * (predicted == NO_CLASS))
    return jnp.sum(losses * others) / jnp.maximum(total, 1), Follow(follow, total, broken)


def make_step(
    space: PerturbationSpace, shape: Shape, schedule: optax.Schedule, rate: float, success: float, halve: bool = False
) -> Callable[[Forward, Player, Any, Seen, Int[Array, ""]], Player]:
    """Makes a player's step: `step(forward, player, params, seen, target)` gives the player after it.

    Args:
        space: of the player.
        shape: of images.
        schedule: maps the number of steps done to what they are multiplied by, steps of φ and of its size.
        rate: the share by which the size changes in a full step.
        success: the share of images of other classes that are to follow.
        halve: whether the size becomes half as large at once where half is enough too. What changed the model may have
            changed the sizes by factors.
    """
    ascent, largest = space.ascent(schedule), space.max_size(shape)

    def step(forward: Forward, player: Player, params: Any, seen: Seen, target: Int[Array, ""]) -> Player:
        gradient, found = jax.grad(partial(towards, forward, space), has_aux=True)(
            player.perturbation, params, seen, target
        )
        change = rate * schedule(player.steps)
        factor = jnp.where(found.follow >= success * found.others, 1 - change, 1 + change)
        if halve:
            _, at_half = towards(forward, space, space.enlarge(player.perturbation, 0.5), params, seen, target)
            factor = jnp.where(at_half.follow >= success * at_half.others, 0.5, factor)
        factor = jnp.where(found.others > 0, factor, 1)  # images of the class itself say nothing of the way there
        size = jnp.clip(player.size * factor, SMALLEST * largest, largest)
        updates, state = ascent.update(gradient, player.optimizer_state, size=size)
        moved = optax.apply_updates(player.perturbation, updates)
        return Player(space.project(moved, size), state, size, player.steps + 1)

    return step
