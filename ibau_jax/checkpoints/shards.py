"""Checkpoints in several files, as Hugging Face's libraries write them: an index says which file has which tensor."""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ibau_jax.checkpoints.values import TorchTensor
from ibau_jax.errors import CheckpointError, quoted, shortened
from ibau_jax.files import open_regular

WEIGHT_MAP = "weight_map"
MOST_SHARDS, MAX_INDEX = 1000, 2**21  # bytes: parsed, JSON takes up to 24 times as much
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")  # of a file: it leads to no other folder


def index_in(file: IO[bytes]) -> bytes | None:
    """What the file holds where it is such an index, rather than other JSON or anything else; None where it is not."""
    file.seek(0)
    if not file.read(64).lstrip().startswith(b"{"):
        return None
    file.seek(0)
    content = file.read(MAX_INDEX)
    return content if f'"{WEIGHT_MAP}"'.encode() in content else None


def files_of(path: Path) -> list[Path]:
    """The files that a checkpoint lies in: one, or an index and all that it names; a Flax folder is one.

    Raises:
        OSError: it can't be read.
        CheckpointError: the index is damaged, or leads to another folder.
    """
    if path.is_dir():
        return [path]
    with open_regular(path) as file:
        content = index_in(file)
    return [path] if content is None else [path, *located(path.parent, shards_of(content))]


def shards_of(content: bytes) -> dict[str, set[str]]:
    """The names of the tensors that each file shall hold, by the files' names, in their order.

    Raises:
        CheckpointError: it is no JSON, or names a file by more than a plain name.
    """
    if len(content) == MAX_INDEX:
        raise CheckpointError(f"the index has more than {MAX_INDEX / 2**20:g} MiB: refused")
    try:
        places = json.loads(content.decode("utf-8"))[WEIGHT_MAP]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the index is damaged ({shortened(error)})") from error
    if not isinstance(places, dict) or not places:
        raise CheckpointError("the index says of no tensor where it is; it is damaged")
    shards: dict[str, set[str]] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or not PLAIN_NAME.fullmatch(shard):
            raise CheckpointError(f"the index names a file that can't lie beside it: {quoted(str(shard))}: refused")
        shards.setdefault(shard, set()).add(name)
    if len(shards) > MOST_SHARDS:
        raise CheckpointError(f"the index names more than {MOST_SHARDS} files: refused")
    return dict(sorted(shards.items()))


def located(folder: Path, names: Iterable[str]) -> list[Path]:
    """The files of an index, which lie in its folder.

    Raises:
        CheckpointError: one is a link that leads out of it.
    """
    files = [folder / name for name in names]
    for file in files:
        if os.path.dirname(os.path.realpath(file)) != os.path.realpath(folder):
            raise CheckpointError(f"{file.name} is a link to another folder; copy what it leads to")
    return files


def check_part(tree: Any, names: set[str]) -> None:
    """Raises CheckpointError unless a file of several holds the tensors that the index says, and nothing else."""
    state, _ = _split(tree)
    if not isinstance(state, dict) or not all(isinstance(value, TorchTensor) for value in state.values()):
        raise CheckpointError(
            "a part of a checkpoint in several files holds something other than tensors by their names"
        )
    if set(state) != names:
        odd = shortened(", ".join(sorted(map(str, set(state) ^ names))))
        raise CheckpointError(f"it does not hold the tensors that the index says: {odd}")


def merged(trees: Sequence[Any]) -> dict[str, Any]:
    """What one file would hold in the place of several, each of which `check_part` accepts."""
    together, metadata = OrderedDict[str, TorchTensor](), dict[str, str]()
    for tree in trees:
        state, said = _split(tree)
        together |= state
        metadata |= said
    return {"state_dict": together, "metadata": metadata} if metadata else together


def _split(tree: Any) -> tuple[Any, Mapping[str, str]]:
    """A file's tensors, and the metadata that safetensors has beside them."""
    is_pair = isinstance(tree, dict) and set(tree) == {"state_dict", "metadata"}
    return (tree["state_dict"], tree["metadata"]) if is_pair else (tree, {})
