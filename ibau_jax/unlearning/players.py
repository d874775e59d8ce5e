"""Persistent players: in every space, one perturbation a class that looks for the smallest way to that class, and one
that looks for the smallest way to any other class than an image's own.

They begin where a search of the original model ends. Before each outer step some take a step of their own against the
weights as they are: half of them drawn, the more a class stands out now the likelier, half those that have waited
longest. So what stands out is asked of the model while it unlearns, and no class is suspected in advance. The rest
wait, so that the time of a step does not grow with the classes; memory does, by one φ an aim and space.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ibau_jax.auditing.judgement import Suspect, find_suspects, median_size, ratios
from ibau_jax.auditing.search import SmallestTriggers
from ibau_jax.batches import Batches
from ibau_jax.config import AuditConfig, UnlearnConfig
from ibau_jax.functional import Forward, Params
from ibau_jax.perturbations import SPACES, Perturbation, Shape
from ibau_jax.perturbations.player import Player, make_step, see, towards

# Chosen in benchmarks/NOTEBOOK.md, "What chose its constants".
AT_REST = AuditConfig()  # the search that players begin with
RATE = 0.1  # share by which a player's size changes in each of its steps
STANDS_OUT = 2.0  # ratio of a player whose images count in full
CONSTANT = optax.constant_schedule(1.0)


class Players(NamedTuple):
    """All players of a model.

    Attributes:
        of_space: by the name of their space; every array has a leading axis of classes, and last the one that leads to
            any other class than an image's own.
        medians: by space, the smallest size so far of the median class. While a model is hardened its classes' sizes
            grow, which makes none suspicious; where a backdoor attracts whatever is perturbed, the other classes' sizes
            are far too large until it is gone.
    """

    of_space: dict[str, Player]
    medians: dict[str, Float[Array, ""]]

    def prominence(self, name: str) -> Float[Array, " aims"]:
        """Computes how far each stands out: see `ibau_jax.auditing.judgement.ratios`."""
        return ratios(self.of_space[name].size, self.medians[name])


class Drawn(NamedTuple):
    """The players of one space that move in a step.

    Attributes:
        target: what they aim at, as `towards` takes it.
        perturbation: φ, with a leading axis of players.
        prominence: how far they stand out.
    """

    target: Int[Array, " m"]
    perturbation: Perturbation
    prominence: Float[Array, " m"]


class Stamps(NamedTuple):
    """What the images of a batch get of drawn players.

    Attributes:
        aimed: the mask of those that get any.
        which: by space, the player of each image, counted among those drawn.
        factor: by space, how many times as large its perturbation is made; 0 where another space's player was drawn,
            or none.
        untargeted: how many times as large an untargeted perturbation is made.
        weight: of the image's loss, in [0, 1].
    """

    aimed: Float[Array, " n"]
    which: dict[str, Int[Array, " n"]]
    factor: dict[str, Float[Array, " n"]]
    untargeted: Float[Array, " n"]
    weight: Float[Array, " n"]


def begin_players(smallest: Mapping[str, SmallestTriggers]) -> Players:
    """Makes the players that begin with the smallest triggers of the original model, by space."""
    of_space = {name: _begun(name, of_space) for name, of_space in smallest.items()}
    return Players(of_space, {name: median_size(player.size) for name, player in of_space.items()})


def _begun(name: str, smallest: SmallestTriggers) -> Player:
    perturbation = jax.tree.map(jnp.asarray, smallest.triggers)
    sizes = jnp.asarray(smallest.sizes, jnp.float32)
    state = jax.vmap(SPACES[name].ascent(CONSTANT).init)(perturbation)
    return Player(perturbation, state, sizes, jnp.zeros(len(sizes), jnp.int32))


def like_players(config: UnlearnConfig, classes: int, shape: Shape) -> Players:
    """Makes players of the right structure, shapes and dtypes, to restore stored ones into."""

    keys = jax.random.split(jax.random.key(0), classes + 1)
    of_space = {name: jax.vmap(lambda key, name=name: SPACES[name].init(key, shape))(keys) for name in config.spaces}
    return begin_players(
        {
            name: SmallestTriggers(perturbation, np.ones(len(keys)), np.ones(len(keys), bool))
            for name, perturbation in of_space.items()
        }
    )


def outliers(players: Players) -> tuple[Suspect, ...]:
    """Finds what stands out now: the most prominent class first, any other class than an image's own last."""
    sizes = {name: np.asarray(player.size, np.float64) for name, player in players.of_space.items()}
    return find_suspects(sizes, {name: float(median) for name, median in players.medians.items()})


def take_turn(
    forward: Forward, config: UnlearnConfig, players: Players, params: Params, batch: Batches, key: Array, shape: Shape
) -> tuple[Players, dict[str, Drawn]]:
    """Lets some players take a step against the weights, and returns all and those that did.

    Half are drawn by how far they stand out; the others have taken the fewest steps. So no size is older than half as
    many steps as there are aims, where four move; of more than 120 classes and few images some are not asked again.

    Args:
        forward: the model as a function of its parameters and images.
        config: the constants.
        players: all of them.
        params: θ as it is.
        batch: clean images that the players see.
        key: decides which are drawn.
        shape: of images.
    """
    after, drawn, medians, seen = {}, {}, {}, see(forward, params, batch)
    for index, (name, player) in enumerate(players.of_space.items()):
        prominence = players.prominence(name)
        noise = jax.random.gumbel(jax.random.fold_in(key, index), prominence.shape)
        count = min(config.perturbations, len(prominence))
        _, by_prominence = jax.lax.top_k(config.sharpness * jnp.log(prominence) + noise, -(-count // 2))
        _, by_turn = jax.lax.top_k(-player.steps.at[by_prominence].set(jnp.iinfo(jnp.int32).max), count // 2)
        target = jnp.concatenate([by_prominence, by_turn])
        step = make_step(SPACES[name], shape, CONSTANT, RATE, AT_REST.success, halve=True)
        moving = jax.tree.map(lambda leaf, target=target: leaf[target], player)
        moved = jax.vmap(lambda one, label, step=step: step(forward, one, params, seen, label))(moving, target)
        after[name] = jax.tree.map(lambda leaf, new, target=target: leaf.at[target].set(new), player, moved)
        medians[name] = jnp.minimum(players.medians[name], median_size(after[name].size))
        drawn[name] = Drawn(target, moved.perturbation, ratios(after[name].size, medians[name])[target])
    return Players(after, medians), drawn


def weight_of_untargeted(config: UnlearnConfig, standing_out: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Computes how much an image counts that an untargeted perturbation changes.

    The median class's perturbation was made to lead to its class. One that leads to some class without having been made
    for it, and needs no more, has found a shortcut.
    """
    return jnp.clip(standing_out, 0, 1) ** config.sharpness


def weight_of(config: UnlearnConfig, standing_out: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Computes how much an image counts that a player of this prominence perturbs.

    Every model has a smallest perturbation to each class; only where it is much smaller than the median class's is it
    worth accuracy to take it away.
    """
    return jnp.clip(jnp.log(standing_out) / jnp.log(STANDS_OUT), 0, 1) ** config.sharpness


def deal(
    config: UnlearnConfig,
    drawn: dict[str, Drawn],
    aimed: Float[Array, " n"],
    patched: Float[Array, " n"],
    standing_out: Float[Array, " n"],
    key: Array,
) -> Stamps:
    """Gives each image that players perturb one of those drawn, the likelier the more its class stands out.

    All perturbations are made larger at random: what an attacker stamps is no optimum.

    Args:
        config: the constants.
        drawn: the players.
        aimed: 1 for images that players perturb, else 0.
        patched: 1 for images that an untargeted perturbation changes, else 0.
        standing_out: how many times smaller than the median class's size that perturbation's is.
        key: decides.
    """
    draw_key, size_key = jax.random.split(key)
    prominence = jnp.concatenate([of_space.prominence for of_space in drawn.values()])
    player = jax.random.categorical(draw_key, config.sharpness * jnp.log(prominence), shape=aimed.shape)
    factor = config.enlarge ** jax.random.uniform(size_key, aimed.shape)
    which, factors, before = {}, {}, 0
    for name, of_space in drawn.items():
        count = len(of_space.target)
        mine = (player >= before) & (player < before + count)
        which[name] = jnp.where(mine, player - before, 0)
        factors[name] = jnp.where(mine, aimed * factor, 0)
        before += count
    weight = jnp.where(patched > 0, weight_of_untargeted(config, standing_out), 1.0)
    weight = jnp.where(aimed > 0, weight_of(config, prominence[player]), weight)
    return Stamps(aimed, which, factors, factor, weight)


def aiming_loss(
    forward: Forward, drawn: dict[str, Drawn], perturbations: dict[str, Perturbation], params: Params, batch: Batches
) -> Float[Array, ""]:
    """Computes the inner loss: the sum of the losses (`towards`) of the first player of each space.

    Through all drawn players the implicit term takes twice as long as the rest of the step, and its effect could not be
    measured either.
    """
    loss, seen = jnp.zeros(()), see(forward, params, batch)
    for name, of_space in drawn.items():
        first = jax.tree.map(lambda leaf: leaf[0], perturbations[name])
        loss = loss + towards(forward, SPACES[name], first, params, seen, of_space.target[0])[0]
    return loss
