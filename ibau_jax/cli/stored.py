"""Where an interrupted job waits to go on: its state after each of the last steps, in a hidden folder.

.NAME.partial/round-00003/leaves/     arrays (Orbax)
.NAME.partial/round-00003/state.json  all else, whose job it is, digests of all files

A step's folder appears complete, by one renaming, and only then those before the last two go: a process that is killed
at any moment, or a disk that is full, leaves the last good one.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ibau_jax.checkpoints.conversion import Leaves
from ibau_jax.checkpoints.conversion import Path as LeafPath
from ibau_jax.checkpoints.flax_store import read_leaves, write_leaves
from ibau_jax.cli.console import warn
from ibau_jax.errors import CheckpointError, ConfigError
from ibau_jax.files import digests, put_in_place, staging_folder
from ibau_jax.interruption import deferred_signals
from ibau_jax.json_files import json_text, read_json, write_json

STATE, LEAVES, KEPT = "state.json", "leaves", 2
CHECKSUM, MESSAGE = "checksum", 200
# What reading a state that was damaged or tampered with raises.
DAMAGE = (CheckpointError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
Restored = TypeVar("Restored")
Content = dict[str, Any]


class StoredSteps:
    """An interrupted job's states.

    `identity` tells whether a later command is the same job: digests and all options that matter. `unit` is what its
    steps are called.
    """

    def __init__(self, results: Path, identity: Content, unit: str) -> None:
        whole = Path(os.path.abspath(results))
        self.folder, self.unit = whole.with_name(f".{whole.name}.partial"), unit
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
                whole = {"identity": self.identity, "leaves": shapes, **content, "digests": digests(prepared)}
                write_json(prepared / STATE, {**whole, CHECKSUM: _checksum(whole)}, indent=None)
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
            except DAMAGE as error:
                self._warn_of_damage(folder, error)
                continue
            self._check_same(content["identity"])
            try:
                return made_of(read_leaves(folder / LEAVES, _shapes(content["leaves"])), content)
            except DAMAGE as error:
                self._warn_of_damage(folder, error)
        raise ConfigError(f"the interrupted run in {self.folder} is damaged; leave out --resume to begin anew")

    def _warn_of_damage(self, folder: Path, error: Exception) -> None:
        what = f"{error!r}" if isinstance(error, (KeyError, AttributeError)) else f"{error}"
        warn(f"{folder} is damaged ({what[:MESSAGE]}); trying the {self.unit} before")

    def remove(self) -> None:
        """Forgets the interrupted job, the last steps last: a process that is killed meanwhile leaves whole ones."""
        self._forget_all_but([])
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        """The folders of steps, in order."""
        if not self.folder.is_dir():
            return []
        named = [entry for entry in self.folder.iterdir() if re.fullmatch(rf"{self.unit}-\d{{5,9}}", entry.name)]
        return sorted(
            (entry for entry in named if entry.is_dir()), key=lambda entry: int(entry.name.rpartition("-")[2])
        )

    def _forget_all_but(self, kept: list[Path]) -> None:
        for step in self._steps():
            if step not in kept:
                shutil.rmtree(step, ignore_errors=True)

    def _check_same(self, identity: Content) -> None:
        changed = [key for key, value in self.identity.items() if identity.get(key) != value]
        if changed:
            raise ConfigError(f"the interrupted run in {self.folder} had other options: {', '.join(changed)} changed")


def leaves_of_tree(name: str, tree: Any) -> Leaves:
    """The arrays of a pytree under `name`; those without axes get one, since Orbax has none such."""
    return {(name, index): np.atleast_1d(np.asarray(leaf)) for index, leaf in enumerate(jax.tree.leaves(tree))}


def tree_of_leaves(name: str, like: Any, leaves: Leaves) -> Any:
    """The pytree whose arrays `leaves_of_tree` gave; `like` is one of its structure, shapes and dtypes.

    Raises:
        KeyError, ValueError: an array is missing, or of another shape or dtype.
    """
    old, structure = jax.tree.flatten(like)
    new = [jnp.asarray(leaves[name, index]).reshape(np.shape(leaf)) for index, leaf in enumerate(old)]
    if [leaf.dtype for leaf in new] != [jnp.result_type(leaf) for leaf in old]:
        raise ValueError(f"an array of {name} has another dtype")
    return jax.tree.unflatten(structure, new)


def _checksum(content: Content) -> str:
    """Of all that state.json holds beside it."""
    text = json.dumps(json.loads(json_text(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(folder: Path) -> Content:
    """What state.json holds; one of `DAMAGE` unless it and all files are as they were written."""
    content = read_json(folder / STATE)
    if not isinstance(content, dict) or content.pop(CHECKSUM, None) != _checksum(content):
        raise ValueError(f"{STATE} has changed")
    there = {name: digest for name, digest in digests(folder).items() if name != STATE}
    changed = [
        name for name in sorted({*there, *content["digests"]}) if there.get(name) != content["digests"].get(name)
    ]
    if changed:
        raise ValueError(f"{changed[0]} is missing or has changed")
    if not isinstance(content["identity"], dict):
        raise TypeError("identity is no object")
    return content


def _shapes(stored: list[Any]) -> dict[LeafPath, tuple[int, ...]]:
    """The paths and shapes of arrays, as state.json has them; numbers and texts, and nothing else."""
    shapes = {tuple(path): tuple(shape) for path, shape in stored}
    if not all(type(part) in (str, int) for path in shapes for part in path):
        raise TypeError("a path holds something else than names and numbers")
    return shapes
