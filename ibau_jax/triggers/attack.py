"""An attack: a trigger, and what it makes a backdoored model say."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import ConfigError
from ibau_jax.triggers.stamps import Stamp


@dataclass(frozen=True, eq=False)
class Attack:
    """A trigger and what it makes a backdoored model say.

    Attributes:
        name: what results call it.
        stamp: puts the trigger on images, float (n, h, w, c) in [0, 1]; so are the results. None where only the
            triggered images themselves are known.
        all_to_all: whether class y becomes y + 1 (modulo the number of classes), not one target label.
        triggered: images that carry the trigger already, with their true classes.
        target_label: the class it aims at, where that is part of it.
        further: others in the same model, each with a target label.
    """

    name: str
    stamp: Stamp | None
    all_to_all: bool = False
    triggered: Dataset | None = None
    target_label: int | None = None
    further: tuple["Attack", ...] = ()

    def victims(self, dataset: Dataset) -> Dataset:
        """The images to measure the attack on, before `stamp`: those that carry the trigger, else `dataset`."""
        return dataset if self.triggered is None else self.triggered

    def parts(self, target_label: int | None, num_classes: int) -> tuple["Attack", ...]:
        """This attack and the further ones, each with its target; this one's is `target_label` where that is given.

        Raises:
            ConfigError: one has no target, or one that is no class.
        """
        own = self.target_label if target_label is None else target_label
        parts = (replace(self, target_label=own, further=()), *self.further)
        for part in parts:
            if not part.all_to_all:
                check_target_label(part.target_label, num_classes)
        return parts

    def targets(
        self, labels: Int[np.ndarray, " n"], num_classes: int, target_label: int | None = None
    ) -> Int[np.ndarray, " n"]:
        """The class that the attacker wants for images of these true classes."""
        if self.all_to_all:
            return (labels + 1) % num_classes
        return np.full_like(labels, self.target_label if target_label is None else target_label)


def check_target_label(target_label: int | None, num_classes: int) -> None:
    """Raises ConfigError unless `target_label` is one of the classes."""
    if target_label is None:
        raise ConfigError("the attack has one target class; name it by --target-label")
    if not 0 <= target_label < num_classes:
        raise ConfigError(f"the target label {target_label} is no class of the model; it has 0 to {num_classes - 1}")


def together(attacks: Sequence[Attack]) -> Attack:
    """Several attacks, each with a target label, as one."""
    return replace(attacks[0], further=tuple(attacks[1:])) if len(attacks) > 1 else attacks[0]


def planted(
    images: Float[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"], parts: Sequence[Attack], num_classes: int
) -> tuple[Float[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]:
    """The images with a trigger each, those of several attacks in turn, and the classes that the attacker wants."""
    stamped, targets = images.copy(), labels.copy()
    for index, part in enumerate(parts):
        assert part.stamp is not None
        chosen = slice(index, None, len(parts))
        stamped[chosen] = np.asarray(part.stamp(images[chosen]))
        targets[chosen] = part.targets(labels[chosen], num_classes)
    return stamped, targets
