"""Making a poisoned model: read, train, evaluate, write."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
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
from ibau_jax.cli.poison_plan import Plan, description, identity, prepare
from ibau_jax.cli.progress import Bar
from ibau_jax.cli.run_folder import RESULT, check_folder, finished_result, versions
from ibau_jax.cli.stored import Content, StoredSteps, leaves_of_tree, tree_of_leaves
from ibau_jax.data.sources import EMBEDDED
from ibau_jax.errors import IbauError
from ibau_jax.execution import Execution
from ibau_jax.files import exclusive, put_all_in_place, remove_abandoned, staging_folder
from ibau_jax.interruption import deferred_signals
from ibau_jax.json_files import write_json
from ibau_jax.metrics import Metrics
from ibau_jax.models import Normalized
from ibau_jax.training import Trained, TrainState, fresh_state, train
from ibau_jax.triggers import TRIGGERS, planted, write_triggers

MODEL, PICTURE = "model.pth", "triggers.png"
RESULTS = (MODEL, TRIGGERS, PICTURE, RESULT)  # the last one says that all are there
SHOWN = 8  # images in the picture


def run(options: PoisonOptions) -> int:
    """Runs `scripts/poison.py` and returns its exit code.

    Raises:
        IbauError: the input is to blame; nothing was written.
    """
    with exclusive(options.out):
        return _run(options)


def _run(options: PoisonOptions) -> int:
    begin = time.perf_counter()
    check_folder(options.out, RESULTS, overwrite=options.overwrite or options.resume)
    start(options.device)
    plan = prepare(options)
    progress = StoredSteps(options.out, identity(options, plan), "epoch")
    if options.resume and is_finished(options, progress):
        progress.remove()
        remove_abandoned(options.out / RESULT)
        console.console.print(
            f"{console.escaped(str(options.out))} holds this training's results already", soft_wrap=True
        )
        return 0
    console.describe(description(options, plan))
    with _resumable(progress):
        model, attacks = trained(plan, options, progress)
    plan = replace(plan, attacks=attacks)
    metrics = plan.evaluate(model)
    console.console.print(console.metrics_table(metrics))
    console.warn_of_figures(metrics)
    write(options, plan, model, metrics, time.perf_counter() - begin)
    progress.remove()
    console.console.print(f"{options.out / MODEL} written", soft_wrap=True)
    return 0


def is_finished(options: PoisonOptions, progress: StoredSteps) -> bool:
    """Whether the results of the very training that is to be resumed are there.

    Raises:
        ConfigError: those of another one are, and not to be overwritten. What a process that was killed has put in
            place without result.json, which is the last, is replaced.
    """
    if not (progress.exists() and options.overwrite) and finished_result(options.out, progress.identity):
        return True
    half_placed = not (options.out / RESULT).exists()
    check_folder(options.out, RESULTS, overwrite=options.overwrite or half_placed)
    return False


def trained(plan: Plan, options: PoisonOptions, progress: StoredSteps) -> Trained:
    """Trains, or goes on, and stores every epoch."""
    state = None
    if options.resume:
        fresh = fresh_state(plan.architecture, plan.num_classes, plan.training, plan.config, plan.poison)
        state = progress.restore(lambda leaves, content: _state(fresh, leaves, content))
    with Bar() as bar:
        task = bar.add_task("compiling", total=None)

        def on_epoch(done: TrainState) -> None:
            leaves = leaves_of_tree("state", done.carry)
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
                task, description=_phase(epoch, plan.config.epochs), completed=done, total=count
            ),
        )


def _phase(epoch: int, epochs: int) -> str:
    return f"epoch {epoch}/{epochs}" if epoch else "masks of triggers"


def _state(fresh: TrainState, leaves: Any, content: Content) -> TrainState:
    return TrainState(tree_of_leaves("state", fresh.carry, leaves), tuple(content["losses"]))


@contextmanager
def _resumable(progress: StoredSteps) -> Iterator[None]:
    """Says how to go on, where something else than bad input interrupts training after an epoch."""
    try:
        yield
    except IbauError:
        raise
    except (Exception, KeyboardInterrupt):
        if progress.exists():
            console.errors.print("interrupted; the same command with --resume goes on")
        raise


def write(options: PoisonOptions, plan: Plan, model: nnx.Module, metrics: Metrics, seconds: float) -> None:
    """Writes everything; result.json comes last, so a folder that has it is complete."""
    bare = model.model if isinstance(model, Normalized) else model
    hints: dict[str, Any] = {
        "model": plan.architecture.name,
        "image_size": plan.image_size.plain(),
        "normalize": options.normalize,
        "triggers": bool(plan.attacks),
    }
    if plan.test.name.partition(":")[0] in EMBEDDED:
        hints["dataset"] = plan.test.name
    metadata = {"acc": round(100 * metrics.acc, 3), "epoch": plan.config.epochs, KEY: hints}
    checkpoint = fresh_checkpoint(plan.architecture, plan.num_classes, plan.image_size, bare, metadata)
    with deferred_signals(), staging_folder(options.out / RESULT) as staging:
        save(checkpoint, staging / MODEL)
        if plan.attacks:
            write_triggers(plan.attacks, staging / TRIGGERS)
            picture(plan).save(staging / PICTURE)
        digest = hashlib.sha256((staging / MODEL).read_bytes()).hexdigest()
        content = {
            "config": identity(options, plan),
            "device": device_name(),
            "versions": versions(),
            "status": "completed",
            "metrics": asdict(metrics),
            "intervals": metrics.intervals(),
            "sha256": digest,
            "seconds": seconds,
        }
        write_json(staging / RESULT, content)
        put_all_in_place(staging, options.out, RESULTS)


def picture(plan: Plan) -> Image.Image:
    """Test images, the same with triggers, and ten times the difference around grey, one above the other."""
    some = plan.test.first(SHOWN)
    clean = np.asarray(to_unit(jnp.asarray(some.images)))
    stamped, _ = planted(clean, some.labels, plan.attacks, plan.num_classes)
    rows = [np.concatenate(list(row), axis=1) for row in (clean, stamped, 0.5 + 10 * (stamped - clean))]
    pixels = (255 * np.clip(np.concatenate(rows), 0, 1)).round().astype(np.uint8)
    enlarged = np.kron(pixels, np.ones((3, 3, 1), np.uint8))
    return Image.fromarray(enlarged.squeeze(-1) if enlarged.shape[-1] == 1 else enlarged)
