"""Where an interrupted job waits to go on: its state after each of the last steps, in a hidden folder.

.NAME.partial/round-00003/leaves/     arrays (Orbax)
.NAME.partial/round-00003/state.json  all else, whose job it is, digests of all files

A step's folder appears complete, by one renaming, and only then those before the last two go: a process that is killed
at any moment, or a disk that is full, leaves the last good one.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.checkpoints.conversion import Leaves
from ibau_jax.checkpoints.flax_store import read_leaves, write_leaves
from ibau_jax.cli.console import warn
from ibau_jax.errors import CheckpointError, ConfigError
from ibau_jax.files import put_in_place, staging_folder
from ibau_jax.interruption import deferred_signals

STATE, LEAVES, KEPT = "state.json", "leaves", 2
Restored = TypeVar("Restored")
Content = dict[str, Any]


class StoredSteps:
    """An interrupted job's states.

    `identity` tells whether a later command is the same job: digests and all options that matter. `unit` is what its
    steps are called.
    """

    def __init__(self, results: Path, identity: Content, unit: str) -> None:
        self.folder, self.unit = results.with_name(f".{results.name}.partial"), unit
        self.identity = json.loads(json.dumps(identity))  # as it comes back from the file: tuples are lists there

    def exists(self) -> bool:
        """Whether there is an interrupted job."""
        return bool(self._steps())

    def store(self, number: int, leaves: Leaves, content: Content) -> None:
        """Stores the state after step `number`: arrays, and what JSON can hold.

        Raises:
            ConfigError: it can't be written; the last step's state is left.
        """
        target = self.folder / f"{self.unit}-{number:05d}"
        try:
            with deferred_signals(), staging_folder(target) as staging:
                prepared = staging / target.name
                prepared.mkdir()
                write_leaves(leaves, prepared / LEAVES)
                shapes = [[list(path), list(leaf.shape)] for path, leaf in leaves.items()]
                whole = {"identity": self.identity, "leaves": shapes, **content, "digests": _digests(prepared)}
                (prepared / STATE).write_text(json.dumps(whole))
                put_in_place(prepared, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # unless a state is in it
            raise ConfigError(
                f"can't store the state after {self.unit} {number} in {self.folder}: {error.strerror or error}. "
                "Mend that; the same command with --resume then goes on from the last state stored, if any"
            ) from error
        self._forget_all_but(self._steps()[-KEPT:])

    def restore(self, made_of: Callable[[Leaves, Content], Restored]) -> Restored:
        """What `made_of` makes of the last stored state that is whole.

        Raises:
            ConfigError: there is none, or it is another job's, or all are damaged. Nothing is deleted.
        """
        if not self.exists():
            raise ConfigError(f"there is no interrupted run to resume in {self.folder}; leave out --resume")
        for folder in reversed(self._steps()):
            try:
                content = _checked(folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                warn(f"{folder} is damaged ({error}); trying the {self.unit} before")
                continue
            self._check_same(content["identity"])
            try:
                shapes = {tuple(path): tuple(shape) for path, shape in content["leaves"]}
                return made_of(read_leaves(folder / LEAVES, shapes), content)
            except (CheckpointError, ValueError, KeyError, TypeError) as error:
                warn(f"{folder} is damaged ({error}); trying the {self.unit} before")
        raise ConfigError(f"the interrupted run in {self.folder} is damaged; leave out --resume to begin anew")

    def remove(self) -> None:
        """Forgets the interrupted job."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.unit}-*"))

    def _forget_all_but(self, kept: list[Path]) -> None:
        for entry in self.folder.iterdir():  # also what a process that was killed had begun
            if entry not in kept:
                shutil.rmtree(entry, ignore_errors=True)

    def _check_same(self, identity: Content) -> None:
        changed = [key for key, value in self.identity.items() if identity.get(key) != value]
        if changed:
            raise ConfigError(f"the interrupted run in {self.folder} had other options: {', '.join(changed)} changed")


def leaves_of_tree(name: str, tree: Any) -> Leaves:
    """The arrays of a pytree under `name`; those without axes get one, since Orbax has none such."""
    return {(name, index): np.atleast_1d(np.asarray(leaf)) for index, leaf in enumerate(jax.tree.leaves(tree))}


def tree_of_leaves(name: str, like: Any, leaves: Leaves) -> Any:
    """The pytree whose arrays `leaves_of_tree` gave; `like` is one of its structure and shapes."""
    old, structure = jax.tree.flatten(like)
    new = [jnp.asarray(leaves[name, index]).reshape(np.shape(leaf)) for index, leaf in enumerate(old)]
    return jax.tree.unflatten(structure, new)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != STATE)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _checked(folder: Path) -> Content:
    """What state.json holds; ValueError unless all files are as they were written."""
    content: Content = json.loads((folder / STATE).read_text())
    found = _digests(folder)
    changed = [name for name, digest in content["digests"].items() if found.get(name) != digest]
    if changed:
        raise ValueError(f"{changed[0]} is missing or has changed")
    return content
