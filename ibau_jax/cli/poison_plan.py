"""What a training will do: read and checked, before any long work."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from ibau_jax.cli.device import device_name
from ibau_jax.cli.poison_options import PoisonOptions
from ibau_jax.cli.stored import Content
from ibau_jax.config import TrainConfig
from ibau_jax.data import Dataset, load_dataset
from ibau_jax.data.sources import has_class_folders
from ibau_jax.errors import ConfigError, DataError
from ibau_jax.image_size import ImageSize
from ibau_jax.metrics import Metrics, check_measurable, evaluate
from ibau_jax.models import NORMALIZATIONS, Architecture, find_architecture
from ibau_jax.models.normalized import normalized
from ibau_jax.poisoning import Poison
from ibau_jax.triggers import Attack, Canvas, load_attacks, together

NONE = "none"
TEST_SHARE = 10  # a tenth


@dataclass(frozen=True)
class Plan:
    """A checked training.

    Attributes:
        architecture: with the normalisation in it.
        training, test: images, none of them in both.
        attacks: with their targets; none for a clean model.
    """

    architecture: Architecture
    num_classes: int
    training: Dataset = field(repr=False)
    test: Dataset = field(repr=False)
    config: TrainConfig
    attacks: Sequence[Attack]
    poison: Poison | None

    @property
    def image_size(self) -> ImageSize:
        """Height and width of the images."""
        return ImageSize(*self.training.images.shape[1:3])

    @property
    def attack(self) -> Attack | None:
        """All attacks as one."""
        return together(self.attacks) if self.attacks else None

    def evaluate(self, model: nnx.Module) -> Metrics:
        """On the test images."""
        return evaluate(model, self.test, self.attack)


def prepare(options: PoisonOptions) -> Plan:
    """Reads and checks everything.

    Raises:
        IbauError: the input is to blame.
    """
    architecture, config = find_architecture(options.model), options.config()
    size = options.image_size or architecture.image_sizes[0]
    shape = (*size, architecture.channels)
    training, test = images(options, shape)
    num_classes = int(max(training.labels.max(), test.labels.max(initial=0))) + 1
    attacks = chosen_attacks(options, shape)
    poison = Poison(tuple(attacks), options.ratio, options.clean_label, options.decoys) if attacks else None
    if poison:
        together(attacks).parts(num_classes)
        poison.chosen(training.labels, num_classes, config.seed)
    test.check_fits(shape, num_classes)
    if attacks:
        check_measurable(together(attacks), test, num_classes)
    architecture = normalized(architecture, NORMALIZATIONS[options.normalize])
    return Plan(architecture, num_classes, training, test, config, attacks, poison)


def images(options: PoisonOptions, shape: tuple[int, int, int]) -> tuple[Dataset, Dataset]:
    """The images to train on and those to evaluate on."""
    order = options.class_order
    dataset = load_dataset(options.dataset, shape, class_order=order)
    num_classes = int(dataset.labels.max(initial=0)) + 1
    dataset.check_fits(shape, num_classes)
    dataset.check_contrast()
    absent = np.flatnonzero(np.bincount(dataset.labels) == 0)
    if len(absent):
        raise DataError(
            f"{dataset.name} has labels up to {num_classes - 1} but no image of class {absent[0]}; count classes from "
            "0, without gaps (folders may be listed in a file for --class-order)"
        )
    if options.test is not None:
        order = order if order and has_class_folders(options.test) else None
        return dataset, load_dataset(options.test, shape, num_classes=num_classes, class_order=order)
    permutation = np.random.default_rng(options.seed).permutation(len(dataset))
    count = len(dataset) // TEST_SHARE
    if not count:
        raise ConfigError(f"{dataset.name} has {len(dataset)} images, too few to keep some for evaluation")
    return dataset.take(np.sort(permutation[count:])), dataset.take(np.sort(permutation[:count]))


def chosen_attacks(options: PoisonOptions, shape: tuple[int, int, int]) -> list[Attack]:
    """The attacks that are named, each with its target."""
    if options.attack == (NONE,):
        if options.target_label:
            raise ConfigError("a target label says nothing with --attack none")
        return []
    shared = os.environ.get("IBAU_SHARED")
    folders = [options.trigger_dir] if options.trigger_dir else [Path("triggers")]
    folders += [Path(shared) / "triggers"] if shared else []
    return load_attacks(options.attack, options.target_label, Canvas(shape, folders))


def identity(options: PoisonOptions, plan: Plan) -> Content:
    """What tells an interrupted training from another, and result.json's `config`."""
    return {
        "model": plan.architecture.name,
        "num_classes": plan.num_classes,
        "image_size": plan.image_size.plain(),
        "dataset": plan.training.name,
        "n_training": len(plan.training),
        "class_order": options.class_order,
        "test": plan.test.name,
        "n_test": len(plan.test),
        "attacks": [attack.name for attack in plan.attacks],
        "target_labels": [attack.target_label for attack in plan.attacks],
        "ratio": options.ratio if plan.poison else 0.0,
        "clean_label": options.clean_label,
        "decoys": options.decoys,
        "normalize": options.normalize,
        "precision": options.precision,
        **asdict(plan.config),
    }


def description(options: PoisonOptions, plan: Plan) -> dict[str, Any]:
    """What is about to be done, for the screen."""
    attack, kept = plan.attack, ", which keep their label" if options.clean_label else ""
    return {
        "model": f"{plan.architecture.name}, {plan.num_classes} classes",
        "training": f"{len(plan.training)} images of {plan.training.name}",
        "evaluation": f"{len(plan.test)} images of {plan.test.name}",
        "attack": f"{attack.description}, on {100 * options.ratio:g} % of the images{kept}" if attack else "none",
        "schedule": f"{plan.config.epochs} epochs, batches of {plan.config.batch_size}, on {device_name()}",
    }
