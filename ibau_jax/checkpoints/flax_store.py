"""The Flax checkpoint: a directory with the leaves (Orbax), what they mean (JSON) and the envelope (a PyTorch file).

DIR/leaves/         an Orbax PyTree of the leaves, nested by module name, in the source's dtypes
DIR/checkpoint.json architecture, number of classes, where the state dict lay in its file
DIR/envelope.pth    the file's content around the weights, whose tensors are empty here
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ibau_jax.checkpoints.conversion import Leaves
from ibau_jax.errors import CheckpointError
from ibau_jax.files import check_space

MANIFEST = "checkpoint.json"
LEAVES = "leaves"
ENVELOPE = "envelope.pth"
VERSION = 2


def is_flax_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory that this module wrote."""
    return (path / MANIFEST).is_file()


def write_leaves(leaves: Leaves, directory: Path) -> None:
    """Writes the leaves with Orbax. `directory` must not exist.

    Raises:
        OSError: the disk is full, say.
    """
    import orbax.checkpoint as ocp

    check_space(directory.absolute().parent, sum(leaf.nbytes for leaf in leaves.values()))
    # Trained weights hardly compress, and Orbax would hold a second copy of all of them for it.
    alone = _this_process_alone()
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        try:
            checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(_nested(leaves)))
        except ValueError as error:  # what TensorStore raises for everything
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(directory)) from error


def read_leaves(directory: Path, paths: Mapping[Any, tuple[int, ...]]) -> Leaves:
    """Reads the leaves at `paths`, as NumPy arrays in their stored dtypes.

    Raises:
        CheckpointError: the directory is damaged, or lacks one of `paths`, or holds it in another shape.
    """
    import jax
    import orbax.checkpoint as ocp

    try:
        alone = _this_process_alone()
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            stored = checkpointer.metadata(directory.absolute()).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
            tree = checkpointer.restore(directory.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # Orbax and TensorStore have no common error for damaged files
        raise CheckpointError(f"can't read the Orbax checkpoint {directory}: {str(error)[:200]}") from error
    leaves = {path: _leaf(tree, path) for path in paths}
    wrong = [".".join(map(str, path)) for path, shape in paths.items() if getattr(leaves[path], "shape", None) != shape]
    if wrong:
        raise CheckpointError(f"{directory} lacks these leaves or holds them in other shapes: {', '.join(wrong)}")
    return leaves


def _this_process_alone() -> Any:
    """Orbax's options for a process that reads or writes while others, if there are any, do something else."""
    import jax
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


def write_manifest(manifest: Mapping[str, Any], directory: Path) -> None:
    """Writes the JSON that says what the leaves mean."""
    text = json.dumps({"format": "ibau_jax", "version": VERSION, **manifest}, indent=2)
    (directory / MANIFEST).write_text(text + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads it back.

    Raises:
        CheckpointError: it is damaged or of a later version.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"can't read {directory / MANIFEST}: {error}") from error
    if version != VERSION:
        raise CheckpointError(f"{directory} has the version {version!r}; this program reads version {VERSION}")
    return manifest


def _nested(leaves: Leaves) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *modules, name = map(str, path)
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = np.ascontiguousarray(leaf)
    return tree


def _leaf(tree: Any, path: tuple[str | int, ...]) -> Any:
    for part in map(str, path):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
