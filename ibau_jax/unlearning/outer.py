"""The outer minimisation: θ against the perturbations, along the implicit hypergradient."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ibau_jax.augmentation import Mixture
from ibau_jax.batches import AnyArray, Batches, to_unit
from ibau_jax.config import UnlearnConfig
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Apply, Forward, Params, Rest, mean_over
from ibau_jax.optimizers import make_optimizer
from ibau_jax.perturbations import SPACES, Perturbation, Pixel, apply_each
from ibau_jax.unlearning.hypergradient import SOLVERS, hypergradient
from ibau_jax.unlearning.inner import inner_loss, of_images, space_of
from ibau_jax.unlearning.players import Drawn, Players, Stamps, aiming_loss, deal, take_turn


class OuterCarry(NamedTuple):
    """What an outer step updates."""

    params: Params
    optimizer_state: Any
    players: Players | None


class OuterConstants(NamedTuple):
    """What every outer step of a round sees.

    Attributes:
        delta: untargeted δ.
        first: the clean batch that Φ is defined on.
        rest: what the model holds beside θ.
        reference_params: θ of the original model, where the outer loss holds on to it.
    """

    delta: Float[AnyArray, "k h w c"]
    first: Batches
    rest: Rest
    reference_params: Params | None = None


class Turn(NamedTuple):
    """What players need in a step.

    Attributes:
        aimed: the mask of the images of the batch that they perturb.
        seed: decides which of them move and where they go.
        seen: clean images that they move on, drawn at random for each step.
    """

    aimed: Float[AnyArray, "*b n"]
    seed: Int[AnyArray, "*b"]
    seen: Batches


class OuterBatch(NamedTuple):
    """One clean batch and what goes with it.

    Attributes:
        batch: the images.
        lr: the optimiser's learning rate.
        patched: the mask m_b of those of them that an untargeted δ perturbs.
        which: by which of several δ.
        mixture: what is mixed into them, where anything is.
        teacher_probs: the original model's probabilities of clean images, where the outer loss holds on to it.
        turn: what players need, where there are any.
        stamps: what images get of the players, and how much each image counts.
    """

    batch: Batches
    lr: Float[AnyArray, "*b"]
    patched: Float[AnyArray, "*b n"]
    which: Int[AnyArray, "*b n"] | None = None
    mixture: Mixture | None = None
    teacher_probs: Float[AnyArray, "*b n classes"] | None = None
    turn: Turn | None = None
    stamps: Stamps | None = None


class Deltas(NamedTuple):
    """All perturbations of an outer step: untargeted ones, and those of drawn players by space."""

    untargeted: Float[AnyArray, "k h w c"]
    aiming: dict[str, Perturbation]


def outer_loss(
    forward: Forward,
    config: UnlearnConfig,
    deltas: Deltas,
    params: Params,
    outer: OuterBatch,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, ""]:
    """L_out(δ, θ) = mean w_b CE(f_θ(T(x_b; δ)), y_b) on one batch, w_b = 1 unless there are players.

    T adds m_b ⊙ δ, as the paper has it, or does to an image what a player does, never both; w_b is `Stamps.weight`
    then. With distillation an image's loss is
    + λ KL(softmax f_θ₀(x_b) ‖ softmax f_θ(T(x_b; δ))) (Hinton et al., 2015, at temperature 1); λ is `distillation`, or
    `consistency` where the image is perturbed. Of images with a share of another in them, the other's label counts in
    that share (mixup, Zhang et al., 2018).
    """

    def losses(deltas: Deltas, params: Params, part: OuterBatch) -> Float[Array, " m"]:
        images, stamps, clean = to_unit(part.batch.images), part.stamps, 1 - part.patched
        if stamps is not None:
            for name, perturbations in deltas.aiming.items():
                space = SPACES[name]
                each = jax.tree.map(lambda leaf, name=name: leaf[stamps.which[name]], perturbations)
                images = apply_each(space, jax.vmap(space.enlarge)(each, stamps.factor[name]), images)
        mask = part.patched[:, None, None, None]
        each = mask * of_images(deltas.untargeted, part.which, len(part.patched))
        if stamps is not None:
            each = stamps.untargeted[:, None, None, None] * each
        logits = forward(params, apply_each(space_of(config), each, images))
        wrong = optax.softmax_cross_entropy_with_integer_labels(logits, part.batch.labels)
        if part.mixture is not None:
            others = optax.softmax_cross_entropy_with_integer_labels(logits, part.mixture.labels)
            wrong += part.mixture.shares * (others - wrong)
        if part.teacher_probs is not None:
            clean = clean if stamps is None else clean - stamps.aimed
            held = jnp.where(clean > 0, config.distillation, config.consistency)
            wrong += held * optax.losses.kl_divergence(jax.nn.log_softmax(logits), part.teacher_probs)
        return wrong if stamps is None else stamps.weight * wrong

    of_images_only = outer._replace(lr=None, turn=None)  # what goes through the model in parts
    return mean_over(deltas, params, of_images_only, outer.batch.weights, losses, execution)


def outer_step(
    apply: Apply, config: UnlearnConfig, execution: Execution = DEFAULT_EXECUTION
) -> Callable[[OuterCarry, OuterBatch, OuterConstants], Any]:
    """Makes one step of θ on one batch: drawn players move, then the optimiser goes along the hypergradient.

    Returns:
        `step(carry, outer_batch, constants)`, which gives the next carry and the outer loss before the step.
    """

    def step(carry: OuterCarry, outer: OuterBatch, constants: OuterConstants) -> Any:
        params, state, players = carry
        forward, drawn, turn = partial(apply, constants.rest), dict[str, Drawn](), outer.turn
        if players is not None and turn is not None:
            players, drawn, outer = _players_turn(forward, config, players, params, outer, turn, constants.delta)
        if constants.reference_params is not None:
            logits = forward(constants.reference_params, to_unit(outer.batch.images))
            outer = outer._replace(teacher_probs=jax.nn.softmax(logits))
        deltas = Deltas(constants.delta, {name: of_space.perturbation for name, of_space in drawn.items()})
        outer_of = partial(outer_loss, forward, config, outer=outer, execution=execution)

        def inner_of(deltas: Deltas, params: Params) -> Float[Array, ""]:
            loss = aiming_loss(forward, drawn, deltas.aiming, params, turn.seen) if turn else jnp.zeros(())
            if not config.renew:  # δ answers the original model and does not depend on θ
                return loss
            return loss + inner_loss(forward, config, deltas.untargeted, params, constants.first, execution)

        if config.K:
            loss, gradient = hypergradient(
                outer_of,
                inner_of,
                deltas,
                params,
                step_size=config.fixed_point_step,
                solve=SOLVERS[config.solver](config.K),
                recompute=execution.recompute,
            )
        else:
            loss, gradient = jax.value_and_grad(partial(outer_of, deltas))(params)
        optimizer = make_optimizer(config.optim, outer.lr, config.b2)
        updates, state = optimizer.update(gradient, state, params, value=loss)
        return OuterCarry(optax.apply_updates(params, updates), state, players), loss

    return step


def _players_turn(
    forward: Forward,
    config: UnlearnConfig,
    players: Players,
    params: Params,
    outer: OuterBatch,
    turn: Turn,
    delta: Float[Array, "k h w c"],
) -> tuple[Players, dict[str, Drawn], OuterBatch]:
    """Moves players, deals them to the images that they perturb, and weighs these and those with an untargeted δ."""
    draw_key, deal_key = jax.random.split(jax.random.key(turn.seed))
    shape = outer.batch.images.shape[1:]
    players, drawn = take_turn(forward, config, players, params, turn.seen, draw_key, shape)
    sizes = jnp.linalg.norm(of_images(delta, outer.which, len(outer.patched)).reshape(len(outer.patched), -1), axis=1)
    standing_out = players.medians[Pixel().name] / jnp.maximum(sizes, jnp.finfo(sizes.dtype).tiny)
    return players, drawn, outer._replace(stamps=deal(config, drawn, turn.aimed, outer.patched, standing_out, deal_key))
