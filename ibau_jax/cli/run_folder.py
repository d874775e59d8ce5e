"""The folder of a run: what it holds, how it is written, and where an interrupted run waits to go on."""

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ibau_jax.aims import Suspects
from ibau_jax.checkpoints import Checkpoint, save
from ibau_jax.errors import ConfigError
from ibau_jax.files import check_writable, put_in_place, staging_folder
from ibau_jax.metrics import Metrics
from ibau_jax.result import Round, State

RESULT, SUMMARY, FLAX, PERTURBATION = "result.json", "summary.json", "flax", "perturbation.png"
MODELS = {"zip": "model.pth", "legacy": "model.pth", "pickle": "model.pth", "safetensors": "model.safetensors"}
PACKAGES = ("ibau-jax", "jax", "jaxlib", "flax", "optax", "jaxopt", "numpy")


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ConfigError, and writes nothing, if results can't be written to `folder` or are there already."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file, not a folder")
    there = [name for name in (RESULT, FLAX, PERTURBATION, *MODELS.values()) if (folder / name).exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{folder} already holds {', '.join(sorted(set(there)))}; add --overwrite or choose another --out"
        )
    check_writable(folder / RESULT)


def write_results(folder: Path, result: dict[str, Any], checkpoint: Checkpoint, rounds: Sequence[Round]) -> Path:
    """Writes everything to `folder`; result.json comes last, so a folder that has it is complete.

    Returns:
        The cleaned model's file.
    """
    model = MODELS[checkpoint.envelope.format]
    with staging_folder(folder) as staging:
        save(checkpoint, staging / model)
        save(checkpoint, staging / FLAX)
        plot_perturbations(rounds, staging / PERTURBATION)
        (staging / RESULT).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        for name in (model, FLAX, PERTURBATION, RESULT):
            put_in_place(staging / name, folder / name)
    return folder / model


def write_summary(folder: Path, records: list[dict[str, Any]]) -> None:
    """Writes what came of several runs to `folder`/summary.json."""
    with staging_folder(folder) as staging:
        (staging / SUMMARY).write_text(json.dumps(records, indent=2, allow_nan=False) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        put_in_place(staging / SUMMARY, folder / SUMMARY)


def plot_perturbations(rounds: Sequence[Round], file: Path) -> None:
    """Draws δ of every round, scaled so that grey is 0 and the largest value of each is black or white."""
    from matplotlib.figure import Figure

    columns = min(len(rounds), 5)
    rows = -(-len(rounds) // columns)
    figure = Figure(figsize=(2.4 * columns, 3.05 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, done in zip(axes, rounds, strict=False):
        delta = done.perturbation[0]
        scale = np.abs(delta).max() or 1.0
        image = 0.5 + delta / (2 * scale)
        axis.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"round {done.number}\n‖δ‖ = {done.perturbation_norm:.3g}\nmax |δ| = {scale:.3g}", fontsize=9)
    figure.savefig(file, dpi=150)


def round_record(done: Round, metrics: Metrics) -> dict[str, Any]:
    """A round as result.json has it."""
    return {
        "round": done.number,
        **asdict(metrics),
        "perturbation_norm": done.perturbation_norm,
        "inner_loss": done.inner_loss,
        "outer_loss": done.outer_loss,
        "seconds": done.seconds,
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Progress:
    """An interrupted run's state, in a hidden folder beside its results.

    `identity` tells whether a later command is the same run: the checkpoint's digest and all options that matter.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder.with_name(f".{folder.name}.partial")
        self.identity = json.loads(json.dumps(identity))  # as it comes back from the file: tuples are lists there

    def exists(self) -> bool:
        """Whether there is an interrupted run."""
        return (self.folder / RESULT).is_file()

    def store(self, state: State, found: dict[str, Any]) -> None:
        """Stores the state after a round and what was `found` (`before`, `rounds`) in place of the last round's."""
        arrays = {f"state{index}": np.asarray(leaf) for index, leaf in enumerate(_leaves(state))}
        if state.suspects:
            arrays |= {"suspects": state.suspects.labels, "norms": state.suspects.norms}
        arrays |= {f"perturbation{done.number}": done.perturbation for done in state.rounds}
        with staging_folder(self.folder) as staging:
            prepared = staging / "progress"
            prepared.mkdir()
            np.savez(prepared / "state.npz", **arrays)  # type: ignore[arg-type]
            (prepared / RESULT).write_text(json.dumps({"identity": self.identity, **found}))
            put_in_place(prepared, self.folder)

    def restore(self, fresh: State) -> tuple[State, dict[str, Any]]:
        """The stored state and what was found; `fresh` is the state before the first round.

        Raises:
            ConfigError: there is none, or it is another run's, or it is damaged.
        """
        if not self.exists():
            raise ConfigError(f"there is no interrupted run to resume in {self.folder}; leave out --resume")
        try:
            stored = json.loads((self.folder / RESULT).read_text())
            found = {"before": stored["before"], "rounds": stored["rounds"]}
            with np.load(self.folder / "state.npz", allow_pickle=False) as arrays:
                loaded = dict(arrays)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"the interrupted run in {self.folder} is damaged: {error}") from error
        changed = [key for key, value in self.identity.items() if stored["identity"].get(key) != value]
        if changed:
            raise ConfigError(f"the interrupted run in {self.folder} had other options: {', '.join(changed)} changed")
        return _restored(fresh, loaded, found["rounds"]), found

    def remove(self) -> None:
        """Forgets the interrupted run."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _leaves(state: State) -> list[Any]:
    return jax.tree.leaves((nnx.state(state.model), state.optimizer_state))


def _restored(fresh: State, arrays: dict[str, np.ndarray], records: list[dict[str, Any]]) -> State:
    graph, _ = nnx.split(fresh.model)
    structure = jax.tree.structure((nnx.state(fresh.model), fresh.optimizer_state))
    leaves = [jnp.asarray(arrays[f"state{index}"]) for index in range(len(_leaves(fresh)))]
    weights, optimizer_state = jax.tree.unflatten(structure, leaves)
    names = ("perturbation_norm", "inner_loss", "outer_loss", "seconds")
    rounds = tuple(
        Round(record["round"], arrays[f"perturbation{record['round']}"], **{name: record[name] for name in names})
        for record in records
    )
    suspects = Suspects(arrays["suspects"], arrays["norms"]) if "suspects" in arrays else None
    return State(nnx.merge(graph, weights), optimizer_state, rounds, suspects)
