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

    def aimed_at(self, target_label: int | None) -> "Attack":
        """The attack with this target instead, where one is given and the attack has one."""
        return self if target_label is None or self.all_to_all else replace(self, target_label=target_label)

    @property
    def each(self) -> tuple["Attack", ...]:
        """This attack alone, and the further ones."""
        return (replace(self, further=()), *self.further)

    def parts(self, num_classes: int) -> tuple["Attack", ...]:
        """This attack alone and the further ones, for a model of so many classes.

        Raises:
            ConfigError: one has no target, or one that is no class.
        """
        for part in self.each:
            if not part.all_to_all:
                check_target_label(part.target_label, num_classes)
        return self.each

    @property
    def description(self) -> str:
        """The names of all, with their targets."""
        return ", ".join(
            f"{part.name} ({'all to all' if part.all_to_all else f'to class {part.target_label}'})"
            for part in self.each
        )

    def targets(self, labels: Int[np.ndarray, " n"], num_classes: int) -> Int[np.ndarray, " n"]:
        """The class that the attacker wants for images of these true classes."""
        return (labels + 1) % num_classes if self.all_to_all else np.full_like(labels, self.target_label)


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
