"""Which rounds to keep, without the trigger: some clean images do not unlearn, but measure.

Two things are measured: accuracy, and how many images still follow the suspects' short cuts, the smallest
perturbations that led the model as it came to those classes, made somewhat larger.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from ibau_jax.aims import Suspects
from ibau_jax.batches import to_unit
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import Dataset, Split, split_dataset
from ibau_jax.errors import ConfigError
from ibau_jax.metrics import predict
from ibau_jax.perturbations import Pixel
from ibau_jax.result import Round, Standing, State

ENLARGED = 2.0  # in units of the smallest perturbation, which most but not all images follow
PROBES = 500  # images that may follow it, at most
CHANCE = 2.0  # standard errors


def hold_out(clean_set: Dataset, config: UnlearnConfig) -> tuple[Dataset, Dataset | None]:
    """The images that unlearn, and those that measure, where the configuration asks for any.

    Raises:
        ConfigError: the share is less than an image, or none would be left to unlearn.
    """
    if not config.held_out:
        return clean_set, None
    count = round(config.held_out * len(clean_set))
    if not 0 < count < len(clean_set):
        raise ConfigError(
            f"held_out is {config.held_out}, {count} of {len(clean_set)} clean images; choose a larger share, or 0"
        )
    split: Split = split_dataset(clean_set, len(clean_set) - count, config.seed)
    return split.clean_set, split.evaluation


def measure(model: nnx.Module, held_out: Dataset, clean_set: Dataset, suspects: Suspects) -> Standing:
    """How a model stands.

    Args:
        model: the model.
        held_out: images that did not unlearn; they alone tell accuracy.
        clean_set: those that did. Whether they follow a short cut can be asked of them as well: no label is needed.
        suspects: those of the model as it came.
    """
    count, more = len(held_out), max(0, PROBES - len(held_out))
    images = Dataset(
        np.concatenate([held_out.images, clean_set.images[:more]]),
        np.concatenate([held_out.labels, clean_set.labels[:more]]),
    )
    plain = predict(model, images)
    acc = float(np.mean(plain[:count] == held_out.labels))
    return Standing(acc, residual(model, images, plain, suspects), count)


def residual(model: nnx.Module, images: Dataset, plain: Int[np.ndarray, " n"], suspects: Suspects) -> float:
    """The share of the first images that follow a suspect's short cut; of several suspects, the largest.

    `plain` is what the model says of images as they are.
    """
    probes = images.first(PROBES)
    return max(
        follow(model, probes, plain[: len(probes)], int(label), perturbation)
        for label, perturbation in zip(suspects.labels, suspects.perturbations, strict=True)
    )


def follow(
    model: nnx.Module,
    images: Dataset,
    plain: Int[np.ndarray, " n"],
    label: int,
    perturbation: Float[np.ndarray, "h w c"],
) -> float:
    """The share of images that the enlarged perturbation takes to the class `label`, where they don't belong.

    Those that `plain`, what the model says of images as they are, puts there anyway do not count; 0 of none.
    """
    elsewhere = np.flatnonzero((images.labels != label) & (plain != label))
    if not len(elsewhere):
        return 0.0
    others = images.take(elsewhere)
    stamped = Pixel().apply(jnp.asarray(ENLARGED * perturbation), to_unit(jnp.asarray(others.images)))
    return float(np.mean(predict(model, Dataset(np.asarray(stamped), others.labels)) == label))


def judge(
    state: State, done: Round, model: nnx.Module, held_out: Dataset | None, clean_set: Dataset, config: UnlearnConfig
) -> Round:
    """The round with how its model stands, undone if that costs too much accuracy, and more than chance explains.

    Where no images are held out the rehearsals, if any, tell accuracy.
    """
    if state.reference is None or state.suspects is None:
        return done
    suspects = state.suspects.first  # what is found later need not be a short cut
    if held_out is not None:
        standing = measure(model, held_out, clean_set, suspects)
    elif len(state.rehearsed) >= done.number:
        left = residual(model, clean_set, predict(model, clean_set), suspects)
        standing = replace(state.rehearsed[done.number - 1], residual=left)
    else:
        return done
    return replace(done, standing=standing, undone=too_costly(state.reference, standing, config))


def too_costly(before: Standing, standing: Standing, config: UnlearnConfig) -> bool:
    """Whether a model lacks more of the accuracy it had than is allowed, and than chance explains."""
    return before.acc - standing.acc > max(config.max_acc_drop, CHANCE * standing.standard_error)


def is_over(state: State, config: UnlearnConfig) -> bool:
    """Whether the last round left nothing to do: short cuts closed, accuracy as at first but for a standard error.

    Or it was taken back, and rehearsals, which went on from it, say nothing of a next one.
    """
    if not state.rounds or state.rounds[-1].standing is None or state.initial is None:
        return False
    if state.rounds[-1].undone:
        return bool(state.rehearsed)
    if len(state.rounds) < config.min_rounds or state.searched_after == len(state.rounds):  # none aimed at those yet
        return False
    standing = state.rounds[-1].standing
    return standing.residual <= config.closed and standing.acc >= state.initial.acc - standing.standard_error


def may_go_deeper(state: State, config: UnlearnConfig) -> bool:
    """Whether a round may be done for classes that were behind the suspects. One that is taken back is the last."""
    if state.suspects is None or not state.rounds or state.rounds[-1].undone:
        return False
    done = len(state.rounds) - state.searched_after if state.searched_after else 0
    return done < config.hidden_rounds


def asks_for_more(state: State, config: UnlearnConfig) -> bool:
    """Whether the last round left the short cut of a suspect that stands out open, and one more may be done.

    A round that is taken back is the last, and so is one after which nothing was measured. After another search there
    are none: those rounds aim elsewhere.
    """
    count = len(state.rounds)
    if not config.n_rounds <= count < config.n_rounds + config.more_rounds:
        return False
    if state.suspects is None or state.searched_after:
        return False
    last, stands_out = state.rounds[-1], state.suspects.ratio > config.more_min_ratio
    return stands_out and not last.undone and last.standing is not None and last.standing.residual > config.left_open
