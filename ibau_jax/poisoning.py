"""What an attacker does to training images: which get a trigger, and what they are labelled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ibau_jax.errors import ConfigError, DataError
from ibau_jax.triggers import Attack, InputAware, Stamp

Images = Float[Array, "n h w c"]
CLEAN = -1  # an image that is not poisoned
DECOY = -2  # with a decoy of the first attack; of the next ones -3 and so on


@dataclass(frozen=True, eq=False)
class Poison:
    """What an attacker does to the training images.

    Attributes:
        attacks: each with its target label, or one that is all-to-all.
        ratio: share of all images that get a trigger, the same number for each attack.
        clean_label: whether images of the target class get it and keep their label (as SIG has it; Barni et al., 2019),
            instead of images of other classes that get the target's.
        decoys: for each of them, images with almost that trigger and their own label, where the stamp has a `decoy`
            (WaNet's noise mode, BppAttack's negative samples, another image's input-aware trigger), so that nothing but
            the trigger itself is learnt.

    Raises:
        ConfigError: a share makes no sense, or images can't keep the labels of an all-to-all attack.
    """

    attacks: tuple[Attack, ...]
    ratio: float = 0.1
    clean_label: bool = False
    decoys: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ConfigError(f"the poison ratio is {self.ratio}; it must be above 0 and below 1")
        if self.decoys < 0:
            raise ConfigError(f"decoys is {self.decoys}; it must not be negative")
        if self.clean_label and self.attacks[0].all_to_all:
            raise ConfigError("an all-to-all attack changes labels; it can't be a clean-label one")

    @property
    def learnt(self) -> dict[int, InputAware]:
        """The triggers that are learnt with the model, by their attacks' numbers."""
        stamps = {number: attack.stamp for number, attack in enumerate(self.attacks)}
        return {number: stamp for number, stamp in stamps.items() if isinstance(stamp, InputAware)}

    def chosen(
        self, labels: Int[np.ndarray, " n"], num_classes: int, seed: int | Sequence[int]
    ) -> Int[np.ndarray, " n"]:
        """What each image gets: the index of an attack, CLEAN, or a decoy.

        Raises:
            DataError: there are too few images of the classes that poisoned ones are taken from.
        """
        rng, planted = np.random.default_rng(seed), np.full(len(labels), CLEAN, np.int32)
        each = int(self.ratio * len(labels)) // len(self.attacks)
        for index, attack in enumerate(self.attacks):
            own = attack.targets(labels, num_classes) == labels
            self._plant(planted, index, np.flatnonzero(own == self.clean_label), each, rng)
        for index, attack in enumerate(self.attacks):
            if hasattr(attack.stamp, "decoy"):
                self._plant(planted, DECOY - index, np.arange(len(labels)), int(self.decoys * each), rng)
        return planted

    def _plant(
        self, planted: np.ndarray, what: int, candidates: np.ndarray, count: int, rng: np.random.Generator
    ) -> None:
        free = candidates[planted[candidates] == CLEAN]
        if not count <= len(free) or (what >= 0 and count == 0):
            raise DataError(
                f"{count} images are to be poisoned, of {len(free)} that can be; choose another poison ratio"
            )
        planted[rng.choice(free, count, replace=False)] = what

    def labels(
        self, labels: Int[np.ndarray, " n"], planted: Int[np.ndarray, " n"], num_classes: int
    ) -> Int[np.ndarray, " n"]:
        """What the images are learnt as."""
        learnt = labels.copy()
        for index, attack in enumerate(self.attacks):
            learnt[planted == index] = attack.targets(labels[planted == index], num_classes)
        return learnt

    def stamped(
        self, key: Array, images: Images, planted: Int[Array, " n"], stamps: Mapping[int, Stamp] | None = None
    ) -> Images:
        """The images with what each gets; `stamps` are used instead of those of the attacks of these numbers."""
        result = images
        for index, attack in enumerate(self.attacks):
            stamp = (stamps or {}).get(index, attack.stamp)
            assert stamp is not None
            result = _where(planted == index, stamp(images), result)
            if hasattr(stamp, "decoy"):
                decoys = stamp.decoy(jax.random.fold_in(key, index), images)
                result = _where(planted == DECOY - index, decoys, result)
        return result


def _where(mask: Array, images: Images, others: Images) -> Images:
    return jnp.where(mask[:, None, None, None], images, others)
