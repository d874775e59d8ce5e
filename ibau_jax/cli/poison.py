"""Making a poisoned model: read, train, evaluate, write."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from ibau_jax.batches import to_unit
from ibau_jax.checkpoints import fresh_checkpoint, save
from ibau_jax.checkpoints.hints import KEY
from ibau_jax.cli import console
from ibau_jax.cli.device import device_name, start
from ibau_jax.cli.poison_options import PoisonOptions
from ibau_jax.cli.run_folder import RESULT, versions
from ibau_jax.cli.stored import Content, StoredSteps, leaves_of_tree, tree_of_leaves
from ibau_jax.config import TrainConfig
from ibau_jax.data import Dataset, load_dataset
from ibau_jax.data.sources import EMBEDDED
from ibau_jax.errors import ConfigError
from ibau_jax.execution import Execution
from ibau_jax.files import check_writable, put_in_place, staging_folder
from ibau_jax.interruption import deferred_signals
from ibau_jax.metrics import Metrics, evaluate
from ibau_jax.models import NORMALIZATIONS, Architecture, Normalized, find_architecture
from ibau_jax.poisoning import Poison
from ibau_jax.training import TrainState, train, untrained
from ibau_jax.training import start as start_training
from ibau_jax.triggers import TRIGGERS, Attack, Canvas, load_attacks, planted, together, write_triggers

MODEL, PICTURE = "model.pth", "triggers.png"
NONE = "none"
TEST_SHARE = 10  # a tenth
SHOWN = 8  # images in the picture


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
    attacks: list[Attack]
    poison: Poison | None

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self.training.images.shape[1]

    @property
    def attack(self) -> Attack | None:
        """All attacks as one."""
        return together(self.attacks) if self.attacks else None

    def evaluate(self, model: nnx.Module) -> Metrics:
        """On the test images."""
        return evaluate(model, self.test, self.attack)


def run(options: PoisonOptions) -> int:
    """Runs `scripts/poison.py` and returns its exit code.

    Raises:
        IbauError: the input is to blame; nothing was written.
    """
    begin = time.perf_counter()
    check_folder(options.out, options.overwrite)
    start(options.device)
    plan = prepare(options)
    progress = StoredSteps(options.out, identity(options, plan), "epoch")
    console.describe(description(options, plan))
    with _resumable(progress):
        model = trained(plan, options, progress)
    metrics = plan.evaluate(model)
    console.console.print(console.metrics_table(metrics))
    write(options, plan, model, metrics, time.perf_counter() - begin)
    progress.remove()
    console.console.print(f"{options.out / MODEL} written", soft_wrap=True)
    return 0


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ConfigError, and writes nothing, if results can't be written to `folder` or are there already."""
    there = [name for name in (MODEL, TRIGGERS, PICTURE, RESULT) if (folder / name).exists()]
    if there and not overwrite:
        raise ConfigError(f"{folder} already holds {', '.join(there)}; add --overwrite or choose another --out")
    check_writable(folder / RESULT)


def prepare(options: PoisonOptions) -> Plan:
    """Reads and checks everything.

    Raises:
        IbauError: the input is to blame.
    """
    architecture, config = find_architecture(options.model), options.config()
    size = options.image_size or architecture.image_sizes[0]
    shape = (size, size, architecture.channels)
    training, test = images(options, shape)
    num_classes = int(max(training.labels.max(), test.labels.max())) + 1
    attacks = chosen_attacks(options, shape)
    poison = Poison(tuple(attacks), options.ratio, options.clean_label, options.decoys) if attacks else None
    if poison:
        together(attacks).parts(None, num_classes)
        poison.chosen(training.labels, num_classes, config.seed)
    test.check_fits(shape, num_classes)
    return Plan(normalized(architecture, options.normalize), num_classes, training, test, config, attacks, poison)


def images(options: PoisonOptions, shape: tuple[int, int, int]) -> tuple[Dataset, Dataset]:
    """The images to train on and those to evaluate on."""
    dataset = load_dataset(options.dataset, shape)
    dataset.check_fits(shape, int(dataset.labels.max(initial=0)) + 1)
    if options.test is not None:
        return dataset, load_dataset(options.test, shape)
    order = np.random.default_rng(options.seed).permutation(len(dataset))
    count = len(dataset) // TEST_SHARE
    if not count:
        raise ConfigError(f"{dataset.name} has {len(dataset)} images, too few to keep some for evaluation")
    return dataset.take(np.sort(order[count:])), dataset.take(np.sort(order[:count]))


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


def normalized(architecture: Architecture, name: str) -> Architecture:
    """The architecture behind a normalisation, if any."""
    normalization = NORMALIZATIONS[name]
    if normalization is None:
        return architecture
    build = architecture.build
    return replace(architecture, build=lambda *arguments: Normalized(build(*arguments), normalization))


def identity(options: PoisonOptions, plan: Plan) -> Content:
    """What tells an interrupted training from another, and result.json's `config`."""
    return {
        "model": plan.architecture.name,
        "num_classes": plan.num_classes,
        "image_size": plan.image_size,
        "dataset": plan.training.name,
        "n_training": len(plan.training),
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
    aims = [
        f"{attack.name} ({'all to all' if attack.all_to_all else f'to class {attack.target_label}'})"
        for attack in plan.attacks
    ]
    kept = ", which keep their label" if options.clean_label else ""
    return {
        "model": f"{plan.architecture.name}, {plan.num_classes} classes",
        "training": f"{len(plan.training)} images of {plan.training.name}",
        "evaluation": f"{len(plan.test)} images of {plan.test.name}",
        "attack": f"{', '.join(aims)}, on {100 * options.ratio:g} % of the images{kept}" if aims else "none",
        "schedule": f"{plan.config.epochs} epochs, batches of {plan.config.batch_size}, on {device_name()}",
    }


def trained(plan: Plan, options: PoisonOptions, progress: StoredSteps) -> nnx.Module:
    """Trains, or goes on, and stores every epoch."""
    state = None
    if options.resume:
        model = untrained(plan.architecture, plan.num_classes, plan.training, plan.config)
        fresh = start_training(model, len(plan.training), plan.config)
        state = progress.restore(lambda leaves, content: _state(fresh, leaves, content))
    with console.make_bar(disable=not console.console.is_terminal) as bar:
        task = bar.add_task("compiling", total=None)

        def on_epoch(done: TrainState) -> None:
            leaves = leaves_of_tree("state", (done.weights, done.optimizer_state, done.key_data))
            progress.store(len(done.losses), leaves, {"losses": done.losses})
            console.console.print(f"epoch {len(done.losses)}/{plan.config.epochs}  loss {done.losses[-1]:.4f}")

        return train(
            plan.architecture,
            plan.num_classes,
            plan.training,
            plan.config,
            poison=plan.poison,
            execution=Execution(precision=options.precision),
            state=state,
            on_epoch=on_epoch,
            on_batch=lambda epoch, done, count: bar.update(
                task, description=f"epoch {epoch}/{plan.config.epochs}", completed=done, total=count
            ),
        )


def _state(fresh: TrainState, leaves: Any, content: Content) -> TrainState:
    like = (fresh.weights, fresh.optimizer_state, fresh.key_data)
    weights, optimizer_state, key_data = tree_of_leaves("state", like, leaves)
    return TrainState(weights, optimizer_state, key_data, tuple(content["losses"]))


@contextmanager
def _resumable(progress: StoredSteps) -> Iterator[None]:
    """Says how to go on, where something interrupts training after an epoch."""
    try:
        yield
    except KeyboardInterrupt:
        if progress.exists():
            console.errors.print("interrupted; the same command with --resume goes on")
        raise


def write(options: PoisonOptions, plan: Plan, model: nnx.Module, metrics: Metrics, seconds: float) -> None:
    """Writes everything; result.json comes last, so a folder that has it is complete."""
    bare = model.model if isinstance(model, Normalized) else model
    hints: dict[str, Any] = {"normalize": options.normalize, "triggers": bool(plan.attacks)}
    if plan.test.name.partition(":")[0] in EMBEDDED:
        hints["dataset"] = plan.test.name
    metadata = {"acc": round(100 * metrics.acc, 3), "epoch": plan.config.epochs, KEY: hints}
    checkpoint = fresh_checkpoint(plan.architecture, plan.num_classes, plan.image_size, bare, metadata)
    with deferred_signals(), staging_folder(options.out) as staging:
        save(checkpoint, staging / MODEL)
        if plan.attacks:
            write_triggers(plan.attacks, staging / TRIGGERS)
            picture(plan).save(staging / PICTURE)
        digest = hashlib.sha256((staging / MODEL).read_bytes()).hexdigest()
        content = {
            "config": identity(options, plan),
            "device": device_name(),
            "versions": versions(),
            "metrics": asdict(metrics),
            "sha256": digest,
            "seconds": seconds,
        }
        (staging / RESULT).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        options.out.mkdir(parents=True, exist_ok=True)
        for name in (MODEL, TRIGGERS, PICTURE, RESULT):
            if (staging / name).exists():
                put_in_place(staging / name, options.out / name)


def picture(plan: Plan) -> Image.Image:
    """Test images, the same with triggers, and ten times the difference around grey, one above the other."""
    some = plan.test.take(np.arange(min(SHOWN, len(plan.test))))
    clean = np.asarray(to_unit(jnp.asarray(some.images)))
    stamped, _ = planted(clean, some.labels, plan.attacks, plan.num_classes)
    rows = [np.concatenate(list(row), axis=1) for row in (clean, stamped, 0.5 + 10 * (stamped - clean))]
    pixels = (255 * np.clip(np.concatenate(rows), 0, 1)).round().astype(np.uint8)
    enlarged = np.kron(pixels, np.ones((3, 3, 1), np.uint8))
    return Image.fromarray(enlarged.squeeze(-1) if enlarged.shape[-1] == 1 else enlarged)
