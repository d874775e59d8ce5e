"""Where an interrupted run waits to go on: its state after each of the last rounds, in a hidden folder.

.NAME.partial/round-00003/leaves/     weights, optimiser state, perturbations, suspects (Orbax)
.NAME.partial/round-00003/state.json  the rounds' records, whose run it is, digests of all files

Everything random is drawn from the seed and the number of the round, and the order of the data from the seed, so they
need no keeping. A round's folder appears complete, by one renaming, and only then those before the last two go: a
process that is killed at any moment, or a disk that is full, leaves the last good one.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ibau_jax.aims import Suspects
from ibau_jax.checkpoints.conversion import Leaves
from ibau_jax.checkpoints.flax_store import read_leaves, write_leaves
from ibau_jax.cli.console import warn
from ibau_jax.errors import CheckpointError, ConfigError
from ibau_jax.files import put_in_place, staging_folder
from ibau_jax.interruption import deferred_signals
from ibau_jax.result import Round, Standing, State

STATE, LEAVES, KEPT = "state.json", "leaves", 2
FIGURES = ("perturbation_norm", "inner_loss", "outer_loss", "seconds", "undone")


class StoredRun:
    """An interrupted run's states.

    `identity` tells whether a later command is the same run: the checkpoint's digest and all options that matter.
    """

    def __init__(self, results: Path, identity: dict[str, Any]) -> None:
        self.folder = results.with_name(f".{results.name}.partial")
        self.identity = json.loads(json.dumps(identity))  # as it comes back from the file: tuples are lists there

    def exists(self) -> bool:
        """Whether there is an interrupted run."""
        return bool(self._rounds())

    def store(self, state: State, found: dict[str, Any]) -> None:
        """Stores the state after a round and what was `found` (`before`, `rounds`).

        Raises:
            ConfigError: it can't be written; the last round's state is left.
        """
        target = self.folder / f"round-{len(state.rounds):05d}"
        try:
            with deferred_signals(), staging_folder(target) as staging:
                prepared = staging / target.name
                prepared.mkdir()
                leaves = _leaves_of(state)
                write_leaves(leaves, prepared / LEAVES)
                shapes = [[list(path), list(leaf.shape)] for path, leaf in leaves.items()]
                content = {
                    "identity": self.identity,
                    "initial": _as_json(state.initial),
                    "mirrored": state.mirrored,
                    "rehearsed": [_as_json(standing) for standing in state.rehearsed],
                    "leaves": shapes,
                    **found,
                }
                (prepared / STATE).write_text(json.dumps({**content, "digests": _digests(prepared)}))
                put_in_place(prepared, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # unless a state is in it
            raise ConfigError(
                f"can't store the state after round {len(state.rounds)} in {self.folder}: {error.strerror or error}. "
                "Mend that; the same command with --resume then goes on from the last state stored, if any"
            ) from error
        self._forget_all_but(self._rounds()[-KEPT:])

    def restore(self, fresh: State) -> tuple[State, dict[str, Any]]:
        """The last stored state that is whole and what was found; `fresh` is the state before the first round.

        Raises:
            ConfigError: there is none, or it is another run's, or all are damaged. Nothing is deleted.
        """
        if not self.exists():
            raise ConfigError(f"there is no interrupted run to resume in {self.folder}; leave out --resume")
        for folder in reversed(self._rounds()):
            try:
                stored = _checked(folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                warn(f"{folder} is damaged ({error}); trying the round before")
                continue
            self._check_same_run(stored["identity"])
            try:
                return _restored(fresh, folder, stored), {name: stored[name] for name in ("before", "rounds")}
            except (CheckpointError, ValueError, KeyError, TypeError) as error:
                warn(f"{folder} is damaged ({error}); trying the round before")
        raise ConfigError(f"the interrupted run in {self.folder} is damaged; leave out --resume to begin anew")

    def remove(self) -> None:
        """Forgets the interrupted run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _rounds(self) -> list[Path]:
        return sorted(self.folder.glob("round-*"))

    def _forget_all_but(self, kept: list[Path]) -> None:
        for entry in self.folder.iterdir():  # also what a process that was killed had begun
            if entry not in kept:
                shutil.rmtree(entry, ignore_errors=True)

    def _check_same_run(self, identity: dict[str, Any]) -> None:
        changed = [key for key, value in self.identity.items() if identity.get(key) != value]
        if changed:
            raise ConfigError(f"the interrupted run in {self.folder} had other options: {', '.join(changed)} changed")


def _as_json(standing: Standing | None) -> dict[str, Any] | None:
    return asdict(standing) if standing else None


def _trees(state: State) -> Iterator[tuple[str, Any]]:
    yield "model", nnx.state(state.model)
    yield "optimizer", state.optimizer_state
    if state.best is not None:
        yield "best", nnx.state(state.best)


def _leaves_of(state: State) -> Leaves:
    leaves: Leaves = {
        (name, index): np.atleast_1d(np.asarray(leaf))  # Orbax has no arrays without axes
        for name, tree in _trees(state)
        for index, leaf in enumerate(jax.tree.leaves(tree))
    }
    leaves |= {("perturbation", done.number): done.perturbation for done in state.rounds}
    if state.suspects:
        leaves |= {("suspects", name): np.asarray(value) for name, value in vars(state.suspects).items()}
    return leaves


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != STATE)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _checked(folder: Path) -> dict[str, Any]:
    """What state.json holds; ValueError unless all files are as they were written."""
    stored: dict[str, Any] = json.loads((folder / STATE).read_text())
    found = _digests(folder)
    changed = [name for name, digest in stored["digests"].items() if found.get(name) != digest]
    if changed:
        raise ValueError(f"{changed[0]} is missing or has changed")
    return stored


def _restored(fresh: State, folder: Path, stored: dict[str, Any]) -> State:
    leaves = read_leaves(folder / LEAVES, {tuple(path): tuple(shape) for path, shape in stored["leaves"]})

    def tree(name: str, like: Any) -> Any:
        old, structure = jax.tree.flatten(like)
        new = [jnp.asarray(leaves[name, index]).reshape(np.shape(leaf)) for index, leaf in enumerate(old)]
        return jax.tree.unflatten(structure, new)

    graph, weights = nnx.split(fresh.model)
    suspects = {path[1]: leaf for path, leaf in leaves.items() if path[0] == "suspects"}
    return State(
        nnx.merge(graph, tree("model", weights)),
        tree("optimizer", fresh.optimizer_state),
        tuple(_round(record, leaves["perturbation", record["round"]]) for record in stored["rounds"]),
        Suspects(**suspects) if suspects else None,
        Standing(**stored["initial"]) if stored["initial"] else None,
        stored["mirrored"],
        nnx.merge(graph, tree("best", weights)) if ("best", 0) in leaves else None,
        tuple(Standing(**standing) for standing in stored["rehearsed"]),
    )


def _round(record: dict[str, Any], perturbation: np.ndarray) -> Round:
    standing = Standing(**record["standing"]) if record["standing"] else None
    return Round(record["round"], perturbation, standing=standing, **{name: record[name] for name in FIGURES})
