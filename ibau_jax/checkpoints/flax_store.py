"""The Flax checkpoint: a directory with the leaves (Orbax), what they mean (JSON) and the envelope (a PyTorch file).

DIR/leaves/         an Orbax PyTree of the leaves, nested by module name, in the source's dtypes
DIR/checkpoint.json architecture, number of classes, where the state dict lay in its file
DIR/envelope.pth    the file's content around the weights, whose tensors are empty here
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.conversion import Leaves
from ibau_jax.errors import CheckpointError
from ibau_jax.files import check_space, regular_files
from ibau_jax.json_files import read_json, write_json

MANIFEST = "checkpoint.json"
LEAVES = "leaves"
ENVELOPE = "envelope.pth"
VERSION = 2
MAX_MANIFEST = 2**20  # bytes


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
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, use_ocdbt=True, use_zarr3=False, multiprocessing_options=alone
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        try:
            checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(_nested(leaves)))
        except ValueError as error:  # what TensorStore raises for everything
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(directory)) from error


def read_leaves(
    directory: Path, shapes: Mapping[Any, tuple[int, ...]], dtypes: Mapping[Any, np.dtype] | None = None
) -> Leaves:
    """Reads the leaves at the paths of `shapes`, as NumPy arrays in their stored dtypes.

    By TensorStore, of which Orbax's form is made: it tells what is declared before it is read, and nothing of a damaged
    folder is printed by threads.

    Raises:
        CheckpointError: the directory is damaged, lacks a leaf, holds it in another shape or than `dtypes` says, or
            declares more memory than its size justifies.
    """
    try:
        budget = Budget(sum(file.stat().st_size for file in regular_files(directory)))
        stored = {path: _opened(directory, path) for path in shapes}
        for path, array in stored.items():
            _check_declared(array, path, shapes[path], dtypes[path] if dtypes else None)
            budget.take(math.prod(array.shape) * array.dtype.numpy_dtype.itemsize)
        reads = {path: array.read() for path, array in stored.items()}
        return {path: read.result() for path, read in reads.items()}
    except Exception as error:  # TensorStore has no error of its own for damaged files
        raise CheckpointError(f"can't read the Orbax checkpoint {directory}: {str(error)[:200]}") from error


def digest(leaves: Leaves) -> str:
    """SHA-256 of the leaves' values in the order of their paths: one changed bit is another."""
    found = hashlib.sha256()
    for path in sorted(leaves, key=lambda path: tuple(map(str, path))):
        found.update(np.ascontiguousarray(leaves[path]).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _opened(directory: Path, path: tuple[str | int, ...]) -> Any:
    """A leaf as TensorStore opens it, which reads what it declares and nothing else."""
    import tensorstore

    place = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory.absolute()}/"}}
    spec = {"driver": "zarr", "kvstore": place, "path": ".".join(map(str, path))}
    return tensorstore.open(spec, open=True, read=True).result()


def _check_declared(array: Any, path: tuple[str | int, ...], shape: tuple[int, ...], dtype: np.dtype | None) -> None:
    """Raises ValueError unless an array is of this shape and dtype, and stored in one piece as it is."""
    name, metadata = ".".join(map(str, path))[:100], array.spec().to_json()["metadata"]
    if array.shape != shape or (dtype is not None and array.dtype.numpy_dtype != dtype):
        raise ValueError(f"{name} is {array.dtype.numpy_dtype} {array.shape}, not {dtype or ''} {shape}")
    if metadata["compressor"] is not None or metadata["filters"] is not None:
        raise ValueError(f"{name} is compressed, which this program does not write and does not read")
    if tuple(metadata["chunks"]) != tuple(max(size, 1) for size in shape):
        raise ValueError(f"{name} is in pieces, which this program does not write and does not read")


def _this_process_alone() -> Any:
    """Orbax's options for a process that writes while others, if there are any, do something else."""
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
    write_json(directory / MANIFEST, {"format": "ibau_jax", "version": VERSION, **manifest})


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads it back.

    Raises:
        CheckpointError: it is damaged or of a later version.
    """
    try:
        manifest = read_json(directory / MANIFEST, MAX_MANIFEST)
        version = manifest["version"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"can't read {directory / MANIFEST}: {str(error)[:200]}") from error
    if version != VERSION:
        raise CheckpointError(f"{directory} has the version {str(version)[:20]}; this program reads version {VERSION}")
    return dict(manifest)


def _nested(leaves: Leaves) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *modules, name = map(str, path)
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = np.ascontiguousarray(leaf)
    return tree
