"""From options to what a run needs, checked before any long work."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from flax import nnx

from ibau_jax.checkpoints import Checkpoint, Hints, load, read_hints
from ibau_jax.cli.options import AttackOptions, DataOptions, ModelOptions
from ibau_jax.data import Dataset, Split, load_dataset, separate_clean_set, split_dataset
from ibau_jax.errors import ConfigError
from ibau_jax.metrics import Metrics, check_target_label, evaluate
from ibau_jax.models import Normalized
from ibau_jax.triggers import Attack, load_attack


@dataclass(frozen=True)
class Subject:
    """The classifier under suspicion."""

    path: Path
    checkpoint: Checkpoint
    model: nnx.Module = field(repr=False)
    hints: Hints

    @property
    def mean(self) -> list[float] | None:
        """Of the normalisation inside the model."""
        return list(self.model.mean) if isinstance(self.model, Normalized) else None

    @property
    def std(self) -> list[float] | None:
        """Of the normalisation inside the model."""
        return list(self.model.std) if isinstance(self.model, Normalized) else None

    def sha256(self) -> str | None:
        """Of the checkpoint file; None for a Flax folder."""
        return None if self.path.is_dir() else hashlib.sha256(self.path.read_bytes()).hexdigest()


def load_subject(options: ModelOptions) -> Subject:
    """Reads the checkpoint and puts the normalisation inside the model.

    Raises:
        CheckpointError: see `ibau_jax.load`.
        ConfigError: the normalisation does not fit.
    """
    if options.num_classes is not None and options.num_classes < 1:
        raise ConfigError(f"--num-classes is {options.num_classes}; it must be at least 1")
    checkpoint = load(options.ckpt, model=options.model, num_classes=options.num_classes)
    model = normalized(checkpoint.model(), options, checkpoint.input_shape[2])
    return Subject(options.ckpt, checkpoint, model, read_hints(checkpoint.metadata()))


def normalized(model: nnx.Module, options: ModelOptions, channels: int) -> nnx.Module:
    """The model behind `--mean` and `--std`, where they are given."""
    if options.mean is None and options.std is None:
        return model
    mean, std = options.mean or (0.0,) * channels, options.std or (1.0,) * channels
    if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
        raise ConfigError(f"--mean and --std take {channels} numbers each, the deviations positive")
    return Normalized(model, mean, std)


def load_images(options: DataOptions, subject: Subject) -> Dataset:
    """The images of `--dataset`, or of the data that the checkpoint names.

    Raises:
        ConfigError: neither names any.
        DataError: they can't be read, or do not fit the model.
    """
    spec = options.dataset or subject.hints.dataset
    if spec is None:
        raise ConfigError("the checkpoint names no data; name clean images by --dataset")
    return _fitting(spec, subject.checkpoint)


def load_split(options: DataOptions, subject: Subject, seed: int) -> Split:
    """The images to unlearn with and those to evaluate on.

    Raises:
        ConfigError, DataError: see `load_images`; or one of the two would be empty.
    """
    images = load_images(options, subject)
    if options.clean_set is None:
        return split_dataset(images, options.n_clean, seed)
    return separate_clean_set(_fitting(options.clean_set, subject.checkpoint), images, options.n_clean, seed)


def _fitting(spec: str, checkpoint: Checkpoint) -> Dataset:
    dataset = load_dataset(spec, checkpoint.input_shape)
    dataset.check_fits(checkpoint.input_shape, checkpoint.num_classes)
    return dataset


@dataclass(frozen=True)
class Threat:
    """The attack to measure, if any."""

    attack: Attack | None
    target_label: int | None

    def evaluate(self, model: nnx.Module, dataset: Dataset) -> Metrics:
        """ACC, and the attack's success."""
        return evaluate(model, dataset, self.attack, self.target_label)


def load_threat(options: AttackOptions, subject: Subject) -> Threat:
    """The attack of `--attack`, or the one that the checkpoint names.

    Raises:
        ConfigError: there is no such attack, its files are missing, or the target label is no class.
    """
    spec = options.attack or subject.hints.attack
    target = options.target_label if options.target_label is not None else subject.hints.target_label
    if target is not None:
        check_target_label(target, subject.checkpoint.num_classes)
    if spec is None:
        if options.target_label is not None or options.trigger_mask is not None:
            raise ConfigError("a target label or a mask says nothing without --attack")
        return Threat(None, None)
    folders = [options.trigger_dir] if options.trigger_dir else trigger_folders(subject.path)
    attack = load_attack(spec, subject.checkpoint.input_shape, folders, options.trigger_mask)
    if attack.all_to_all:
        return Threat(attack, None)
    check_target_label(target, subject.checkpoint.num_classes)
    return Threat(attack, target)


def trigger_folders(checkpoint: Path) -> list[Path]:
    """Where the published trigger files may lie: here, and beside the checkpoint's folder, as they are published."""
    shared = os.environ.get("IBAU_SHARED")
    here = [Path("triggers"), checkpoint.absolute().parent.parent / "triggers"]
    return here + ([Path(shared) / "triggers"] if shared else [])
