"""The outer minimisation: θ against the perturbation, along the implicit hypergradient."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float, Int

from ibau_jax.aims import Aims
from ibau_jax.augmentation import Mixture
from ibau_jax.batches import AnyArray, Batches, to_unit
from ibau_jax.config import UnlearnConfig
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Apply, Forward, Params, Rest
from ibau_jax.hypergradient import SOLVERS, hypergradient
from ibau_jax.optimizers import make_optimizer
from ibau_jax.perturb import inner_loss, mean_over, of_images, space_of
from ibau_jax.perturbations import Perturbation, apply_each


class OuterConstants(NamedTuple):
    """What every outer step of a round sees.

    Attributes:
        delta: δ, one or several.
        first: the clean batch that Φ is defined on.
        rest: what the model holds beside θ.
        lr: the outer optimiser's learning rate.
        aims: of targeted δ.
        before: θ of the model as it came, where the outer loss holds on to it.
    """

    delta: Perturbation
    first: Batches
    rest: Rest
    lr: Float[AnyArray, ""]
    aims: Aims | None = None
    before: Params | None = None


class OuterBatch(NamedTuple):
    """One clean batch and what goes with it.

    Attributes:
        batch: the images.
        patched: the mask m_b of those of them that are perturbed.
        which: by which of several δ.
        mixture: what is mixed into them, where anything is.
        said: what the model as it came says of them, probabilities, where the outer loss holds on to it.
    """

    batch: Batches
    patched: Float[AnyArray, "*b n"]
    which: Int[AnyArray, "*b n"] | None = None
    mixture: Mixture | None = None
    said: Float[AnyArray, "*b n classes"] | None = None


def outer_loss(
    forward: Forward,
    config: UnlearnConfig,
    delta: Perturbation,
    params: Params,
    outer: OuterBatch,
    execution: Execution = DEFAULT_EXECUTION,
) -> Float[Array, ""]:
    """L_out(δ, θ) = mean CE(f_θ(clip(x_b + m_b ⊙ δ)), y_b) on one batch.

    With distillation λ it is + λ mean (1 − m_b) KL(softmax f_before(x_b) ‖ softmax f_θ(x_b)) (Hinton et al., 2015, at
    temperature 1): images that are not perturbed are to be classified as they were. Of images
    with a share of another in them, the other's label counts in that share (mixup, Zhang et al., 2018).
    """

    def losses(delta: Perturbation, params: Params, part: OuterBatch) -> Float[Array, " m"]:
        mask = part.patched[:, None, None, None]
        each = mask * of_images(delta, part.which, len(part.patched))
        logits = forward(params, apply_each(space_of(config), each, to_unit(part.batch.images)))
        wrong = optax.softmax_cross_entropy_with_integer_labels(logits, part.batch.labels)
        if part.mixture is not None:
            others = optax.softmax_cross_entropy_with_integer_labels(logits, part.mixture.labels)
            wrong += part.mixture.shares * (others - wrong)
        if part.said is None:
            return wrong
        divergence = optax.losses.kl_divergence(jax.nn.log_softmax(logits), part.said)
        return wrong + config.distillation * (1 - part.patched) * divergence

    return mean_over(delta, params, outer, outer.batch.weights, losses, execution)


def outer_step(
    apply: Apply, config: UnlearnConfig, execution: Execution = DEFAULT_EXECUTION
) -> Callable[[Any, OuterBatch, OuterConstants], Any]:
    """One optimiser step of θ along the hypergradient on one batch.

    Returns:
        `step((params, optimizer_state), outer_batch, constants)`, which gives the next `(params, optimizer_state)`
        and the outer loss before the step.
    """
    solve = SOLVERS[config.solver](config.K)

    def step(carry: tuple[Params, Any], outer: OuterBatch, constants: OuterConstants) -> Any:
        params, state = carry
        forward = partial(apply, constants.rest)
        if constants.before is not None:
            said = jax.nn.softmax(forward(constants.before, to_unit(outer.batch.images)))
            outer = outer._replace(said=said)
        loss, gradient = hypergradient(
            partial(outer_loss, forward, config, outer=outer, execution=execution),
            partial(inner_loss, forward, config, batch=constants.first, aims=constants.aims, execution=execution),
            constants.delta,
            params,
            step_size=config.fixed_point_step,
            solve=solve,
            recompute=execution.recompute,
        )
        optimizer = make_optimizer(config.optim, constants.lr)
        updates, state = optimizer.update(gradient, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    return step
