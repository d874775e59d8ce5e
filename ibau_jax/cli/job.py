"""From options to what a run needs, checked before any long work."""

import functools
import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

from ibau_jax.checkpoints import Checkpoint, Hints, load
from ibau_jax.checkpoints.conversion import described_not_finite
from ibau_jax.checkpoints.shards import files_of
from ibau_jax.checkpoints.variants import Evidence, check_evidence, weigh
from ibau_jax.cli import console
from ibau_jax.cli.options import AttackOptions, DataOptions, ModelChoices, ModelOptions
from ibau_jax.cli.progress import Bar
from ibau_jax.data import Dataset, Split, load_dataset, separate_clean_set, split_dataset
from ibau_jax.data.sources import has_class_folders
from ibau_jax.errors import CheckpointError, ConfigError, DataError, IbauError, NotFiniteError, and_more
from ibau_jax.files import digests
from ibau_jax.models import NORMALIZATIONS, Normalization
from ibau_jax.models.normalized import normalized_model
from ibau_jax.plausibility import doubt
from ibau_jax.triggers import TRIGGERS, Attack, load_attack

SHOWN = 3  # other networks that a line names, where they are made up from names and shapes
BACKDOORBENCH_TRIGGERED = "bd_test_dataset"


@dataclass(frozen=True)
class Subject:
    """The classifier under suspicion.

    Attributes:
        options: how it was asked for.
        checkpoint: what was read.
        normalization: of the model's images.
        evidence: what clean images say for each network that the checkpoint may be, once they were looked at.
    """

    options: ModelOptions
    checkpoint: Checkpoint
    normalization: Normalization | None
    evidence: tuple[Evidence, ...] = ()

    @functools.cached_property
    def model(self) -> nnx.Module:
        """The network with its normalisation inside."""
        return normalized_model(self.checkpoint.network(), self.normalization)

    @property
    def hints(self) -> Hints:
        """What the checkpoint says of itself."""
        return self.checkpoint.hints

    @property
    def path(self) -> Path:
        """The checkpoint's file or Flax folder."""
        return self.options.ckpt

    def sha256(self) -> str:
        """Of the checkpoint's file, or of its files one behind the other; of a folder, of its files' digests."""
        if self.path.is_dir():
            return hashlib.sha256(json.dumps(digests(self.path)).encode()).hexdigest()
        digest = hashlib.sha256()
        for file in files_of(self.path):
            digest.update(file.read_bytes())
        return digest.hexdigest()


def load_subject(options: ModelOptions) -> Subject:
    """Reads the checkpoint. Weights that are not finite, and tensors that are no part of the network, are told of.

    Raises:
        CheckpointError: see `ibau_jax.load`.
        ConfigError: the normalisation does not fit.
    """
    checkpoint = load(
        options.ckpt,
        model=options.model,
        num_classes=options.num_classes,
        image_size=options.image_size,
        key=options.key,
        leave_out=options.leave_out,
    )
    channels = checkpoint.input_shape[2]
    normalization = chosen_normalization(options, checkpoint.normalization, channels)
    if normalization and len(normalization.mean) != channels:
        raise ConfigError(f"--mean and --std take {channels} numbers each; the model's images have {channels} channels")
    if counts := checkpoint.not_finite():
        console.warn(f"{options.ckpt}: weights or statistics are not finite: {described_not_finite(counts)}")
    for note in filter(None, (checkpoint.beside_note(), checkpoint.others_note(), checkpoint.masks_note())):
        console.warn(f"{options.ckpt}: {note}")
    return Subject(options, checkpoint, normalization)


def chosen_normalization(options: ModelChoices, implied: Normalization | None, channels: int) -> Normalization | None:
    """What `--mean` and `--std` or `--normalize` say, else what the checkpoint implies.

    Raises:
        ConfigError: they contradict each other, or make no sense.
    """
    if options.mean is not None or options.std is not None:
        if options.normalize is not None:
            raise ConfigError("--normalize says the mean and the deviation; leave out --mean and --std, or it")
        return Normalization(options.mean or (0.0,) * channels, options.std or (1.0,) * channels)
    return NORMALIZATIONS[options.normalize] if options.normalize else implied


def settled(subject: Subject, images: Dataset, force: bool) -> Subject:
    """The checkpoint as the network that clean images agree with, checked before any long work.

    Args:
        subject: the classifier, perhaps one of several networks with the same names and shapes.
        images: clean images with their labels.
        force: only warn where network, labels or pixels can't be the right ones.

    Raises:
        CheckpointError: not even the likeliest network agrees with the images.
        DataError: the model does not classify them as a model of theirs would.
        NotFiniteError: the logits of an image are NaN or infinite.
    """
    subject = likeliest(subject, images)
    check_named(subject, force)
    check_plausible(subject, images, force)
    check_agreement(subject, force)
    return subject


def check_named(subject: Subject, force: bool) -> None:
    """Checks that clean images do not agree far better with another network than with the one that `--model` names.

    Raises:
        CheckpointError: they do, unless `force`: then a line says so.
    """
    best = subject.evidence[0]
    if best.architecture == subject.checkpoint.architecture or not best.is_plausible:
        return
    message = (
        f"{subject.path}: clean images agree far better with another network than with that of --model "
        f"({'; '.join(map(str, subject.evidence))}). --model {best.architecture.name} takes it so"
    )
    _stop(CheckpointError, message, force)


def _stop(error: type[IbauError], message: str, force: bool) -> None:
    """Raises the error, or where `force` only warns."""
    if not force:
        raise error(f"{message}. --force goes on as it is")
    console.warn(message)


def check_agreement(subject: Subject, force: bool) -> None:
    """Checks that the network agrees with clean images.

    Raises:
        CheckpointError: it does not, unless `force`: then a line says so.
    """
    named = subject.options.model is not None  # then no other network can be meant
    try:
        check_evidence(subject.evidence[:1] if named else subject.evidence)
    except CheckpointError as error:
        if not force:
            raise CheckpointError(
                f"{subject.path}: {error}. Check --normalize and --dataset; write the network as a Flax module and "
                "name it by --model FILE.py:CLASS; or go on by --force"
            ) from error
        console.warn(f"{subject.path}: {error}")


def likeliest(subject: Subject, images: Dataset) -> Subject:
    """The checkpoint as the network whose BatchNorm statistics agree best with clean images; of several, says which.

    One that --model names stays.
    """
    checkpoint = subject.checkpoint
    with Bar() as bar:
        bar.add_task("which network, by its BatchNorm statistics", total=None)
        evidence = weigh(checkpoint, images, subject.normalization)
    best, *others = evidence
    if not len(best.layers) and checkpoint.has_statistics():
        console.warn(
            f"{subject.path}: what its BatchNorm layers recorded is not compared with clean images, since "
            f"{best.architecture.name} calls no flax.nnx.BatchNorm in training mode"
        )
    if not subject.options.model:
        if others:
            by = "the labels of clean images alone" if others[0].accuracy is not None else "clean images"
            shown = others[:SHOWN] if best.architecture.is_guessed else others
            console.warn(
                f"{subject.path} is {best}, by {by}; not {', '.join(map(str, shown))}{and_more(others, len(shown))}"
            )
        checkpoint = checkpoint.as_variant(best.architecture)
    if best.is_changed:
        console.warn(
            f"{subject.path}: its BatchNorm layers recorded other statistics than clean images have now ({best}), as "
            f"in a model that was fine-tuned or unlearned, or in another network than {best.architecture.name}. It "
            "classifies them well, so that it is taken for that; --verify --torch-module compares it with its own code"
        )
    return replace(subject, checkpoint=checkpoint, evidence=tuple(evidence))


def check_plausible(subject: Subject, images: Dataset, force: bool) -> None:
    """Checks that the model classifies clean images as a model of theirs would.

    Raises:
        DataError: it does not, unless `force` or the images are too few to be sure: then a line says so.
        NotFiniteError: the logits of an image are NaN or infinite.
    """
    try:
        found = doubt(subject.model, images, subject.normalization)
    except NotFiniteError as error:
        raise NotFiniteError(f"{subject.path}: {error}") from error
    if found:
        _stop(DataError, f"{subject.path}: {found.message}", force or not found.is_sure)


def load_images(options: DataOptions, subject: Subject) -> Dataset:
    """The images of `--dataset`, or of the data that the checkpoint names.

    Raises:
        ConfigError: neither names any.
        DataError: they can't be read, or do not fit the model.
    """
    spec = options.dataset or subject.hints.dataset
    if spec is None:
        raise ConfigError("the checkpoint names no data; name clean images by --dataset")
    if options.class_order is not None and not any(map(has_class_folders, filter(None, (spec, options.clean_set)))):
        raise ConfigError(f"--class-order is for folders of class folders; {spec} is none")
    return _fitting(spec, subject.checkpoint, options.class_order)


def load_split(options: DataOptions, subject: Subject, seed: int) -> Split:
    """The images to unlearn with and those to evaluate on.

    Raises:
        ConfigError, DataError: see `load_images`; or one of the two would be empty.
    """
    images = load_images(options, subject)
    if options.clean_set is None:
        return split_dataset(images, options.n_clean, seed)
    clean_set = _fitting(options.clean_set, subject.checkpoint, options.class_order)
    return separate_clean_set(clean_set, images, options.n_clean, seed)


@functools.lru_cache(maxsize=4)
def _loaded(spec: str, input_shape: tuple[int, int, int], num_classes: int, class_order: str | None) -> Dataset:
    """Several checkpoints mostly have the same images."""
    return load_dataset(spec, input_shape, num_classes=num_classes, class_order=class_order)


def _fitting(spec: str, checkpoint: Checkpoint, class_order: str | None) -> Dataset:
    order = class_order if class_order and has_class_folders(spec) else None  # which lists the folder
    dataset = _loaded(spec, checkpoint.input_shape, checkpoint.num_classes, order)
    dataset.check_fits(checkpoint.input_shape, checkpoint.num_classes)
    dataset.check_contrast()
    names = checkpoint.hints.class_names or ()
    if dataset.class_names or len(names) != checkpoint.num_classes:
        return dataset
    return replace(dataset, class_names=names)


def attack_on(subject: Subject, options: AttackOptions, used: Collection[int] = ()) -> Attack | None:
    """The attack of `--attack`, or the one that the checkpoint names, with its target; None for none.

    Triggered images in a folder are left out where the clean image at their index, one of `used`, unlearns.

    Raises:
        ConfigError: there is no such attack, its files are missing, or the target label is no class.
    """
    spec = options.attack or subject.hints.attack or beside(subject)
    if spec is None:
        if options.target_label is not None or options.trigger_mask is not None:
            raise ConfigError("a target label or a mask says nothing without --attack")
        return None
    folders = [options.trigger_dir] if options.trigger_dir else trigger_folders(subject.path)
    attack = load_attack(spec, subject.checkpoint.input_shape, folders, options.trigger_mask, used)
    if attack.triggered is not None:
        attack.triggered.check_fits(subject.checkpoint.input_shape, subject.checkpoint.num_classes)
    named = (options.target_label, attack.target_label, subject.hints.target_label)
    target = next((label for label in named if label is not None), None)
    aimed = attack.aimed_at(target)
    aimed.parts(subject.checkpoint.num_classes)
    return aimed


def beside(subject: Subject) -> str | None:
    """What lies beside the checkpoint, where it says so: the triggers that scripts/poison.py writes, or the folder of
    triggered test images that BackdoorBench puts beside its `attack_result.pt`.
    """
    folder, hints = subject.path.absolute().parent, subject.hints
    if hints.triggers and (folder / TRIGGERS).is_file():
        return str(folder / TRIGGERS)
    triggered = folder / BACKDOORBENCH_TRIGGERED
    return f"folder:{triggered}" if hints.triggered_folder and triggered.is_dir() else None


def trigger_folders(checkpoint: Path) -> list[Path]:
    """Where the published trigger files may lie: here, and beside the checkpoint's folder, as they are published."""
    shared = os.environ.get("IBAU_SHARED")
    here = [Path("triggers"), checkpoint.absolute().parent.parent / "triggers"]
    return here + ([Path(shared) / "triggers"] if shared else [])
