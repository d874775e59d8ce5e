"""A classifier's checkpoint: its weights in Flax's layout, and all it takes to give the PyTorch file back."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ibau_jax.checkpoints import flax_store
from ibau_jax.checkpoints.conversion import Leaves, leaves_from_torch, leaves_to_torch, torch_name
from ibau_jax.checkpoints.envelope import Envelope, open_envelope, prefixes
from ibau_jax.checkpoints.hints import Hints, read_hints
from ibau_jax.checkpoints.reader import read_torch_file
from ibau_jax.checkpoints.recognition import Request, abstract_model, abstract_shapes, recognise, stripped
from ibau_jax.checkpoints.writer import write_safetensors, write_torch_file
from ibau_jax.errors import CheckpointError
from ibau_jax.files import put_in_place, staging_folder
from ibau_jax.models import Architecture, Normalized, find_architecture

TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".pkl", ".bin", ".ckpt")  # `.pth.tar` is among them
SAFETENSORS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What `load` gives and `save` takes.

    Attributes:
        architecture: what the state dict was recognised as.
        num_classes: of the classifier.
        image_size: height and width of the model's images.
        leaves: every leaf of the Flax model by path, in Flax's layout and the file's dtype.
        envelope: the file around the weights.
    """

    architecture: Architecture
    num_classes: int
    image_size: int
    leaves: Leaves = field(repr=False)
    envelope: Envelope = field(repr=False)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the model's images."""
        return (self.image_size, self.image_size, self.architecture.channels)

    def summary(self) -> str:
        """Architecture, classes and image size in a few words."""
        size = f"{self.image_size}x{self.image_size}"
        return f"{self.architecture.name}, {self.num_classes} classes, {size} images"

    @property
    def hints(self) -> Hints:
        """What the file says of itself beside the weights."""
        return read_hints(self.metadata())

    def model(self) -> nnx.Module:
        """The Flax NNX model, in inference mode, its weights in float32.

        It takes images, float32 (n, height, width, channels) in [0, 1], and gives logits, float32 (n, num_classes).
        """
        graph, state = nnx.split(abstract_model(self.architecture, self.num_classes, self.image_size))
        flat = {
            path: variable.replace(jnp.asarray(self.leaves[path], jnp.float32))
            for path, variable in nnx.to_flat_state(state)
        }
        return nnx.merge(graph, nnx.from_flat_state(flat))

    def with_weights(self, model: nnx.Module) -> "Checkpoint":
        """The same checkpoint with the weights of `model`; those that are unchanged keep the file's bits.

        Raises:
            CheckpointError: `model` is another architecture.
        """
        model = model.model if isinstance(model, Normalized) else model
        flat = {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}
        if set(flat) != set(self.leaves):
            raise CheckpointError(f"the model is no {self.architecture.name}: its leaves have other names")
        leaves = {path: _kept_if_equal(self.leaves[path], flat[path]) for path in self.leaves}
        return replace(self, leaves=leaves)

    def metadata(self) -> Mapping[str, Any]:
        """Plain values beside the state dict at the top of the file (`acc`, `epoch`, ...)."""
        return self.envelope.metadata()


def _kept_if_equal(stored: np.ndarray, new: np.ndarray) -> np.ndarray:
    return stored if np.array_equal(stored.astype(np.float32), new) else new.astype(stored.dtype)


def load(
    path: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    key: str | None = None,
) -> Checkpoint:
    """Reads a checkpoint, without torch and without executing anything in it.

    Args:
        path: a PyTorch file, a pickle of tensors, a safetensors file, or a Flax directory that `save` wrote. What it
            is called does not matter.
        model: an architecture's name or FILE.py:CLASS, where it shall not be recognised from the names and shapes.
        num_classes: likewise.
        image_size: height and width of the images, where the weights fit more than one.
        key: where in the file the state dict lies, if there are several (`model_ema`).

    Raises:
        CheckpointError: the file is missing, damaged or dangerous, holds no state dict, or none of a known model.
    """
    path = Path(path)
    if path.is_dir():
        return _load_flax(path, model)
    file = read_torch_file(path)
    try:
        envelope = replace(open_envelope(file.tree, file.format, key), dialect=file.dialect)
        return _opened(envelope, Request(model, num_classes, image_size, read_hints(envelope.metadata())))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _opened(envelope: Envelope, request: Request) -> Checkpoint:
    tensors = envelope.tensors()
    found = recognise(tensors, prefixes(tensors), request)
    place = (found.architecture, found.num_classes, found.image_size)
    leaves = leaves_from_torch(abstract_shapes(*place), stripped(tensors, found.prefix))
    rest = replace(envelope, prefix=found.prefix).emptied(set(map(torch_name, leaves)))
    return Checkpoint(*place, leaves, rest)


def save(checkpoint: Checkpoint, path: str | Path) -> None:
    """Writes a checkpoint; it appears complete or not at all, and replaces what was there.

    Args:
        checkpoint: its weights and the file they came from.
        path: one of `TORCH_SUFFIXES` for a PyTorch file in the original's format (zip where that was safetensors),
            wrapper and key order, `.safetensors` for the bare state dict, anything else for a Flax directory.
    """
    path = Path(path)
    with staging_folder(path) as folder:
        prepared = folder / path.name
        if path.suffix in TORCH_SUFFIXES:
            envelope = checkpoint.envelope
            write_torch_file(_filled(checkpoint), prepared, envelope.format, envelope.dialect)
        elif path.suffix == SAFETENSORS_SUFFIX:
            _write_safetensors(checkpoint, prepared)
        else:
            _write_flax(checkpoint, prepared)
        put_in_place(prepared, path)


def _filled(checkpoint: Checkpoint) -> Any:
    return checkpoint.envelope.filled(leaves_to_torch(checkpoint.leaves))


def _write_safetensors(checkpoint: Checkpoint, path: Path) -> None:
    envelope = checkpoint.envelope
    kept = {name: value.numpy() for name, value in envelope.tensors().items()}
    weights = {envelope.prefix + name: array for name, array in leaves_to_torch(checkpoint.leaves).items()}
    tensors = {**kept, **weights}  # in the file's order
    metadata = checkpoint.metadata().get("metadata") if envelope.format == "safetensors" else None
    write_safetensors(tensors, metadata or {"format": "pt"}, path)


def _write_flax(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir()
    flax_store.write_leaves(checkpoint.leaves, folder / flax_store.LEAVES)
    write_torch_file(checkpoint.envelope.tree, folder / flax_store.ENVELOPE, "zip", checkpoint.envelope.dialect)
    manifest = {
        "model": checkpoint.architecture.name,
        "num_classes": checkpoint.num_classes,
        "image_size": checkpoint.image_size,
        "state_dict": {"path": list(checkpoint.envelope.path), "prefix": checkpoint.envelope.prefix},
        "source_format": checkpoint.envelope.format,
    }
    flax_store.write_manifest(manifest, folder)


def _load_flax(folder: Path, model: str | None) -> Checkpoint:
    if not flax_store.is_flax_checkpoint(folder):
        raise CheckpointError(
            f"{folder} is a folder but no Flax checkpoint of this program (it has no checkpoint.json)"
        )
    manifest = flax_store.read_manifest(folder)
    try:
        architecture = _stored_architecture(folder, str(manifest["model"]), model)
        num_classes, image_size = int(manifest["num_classes"]), int(manifest["image_size"])
        place, source = manifest["state_dict"], manifest["source_format"]
        file = read_torch_file(folder / flax_store.ENVELOPE)
        envelope = Envelope(file.tree, tuple(place["path"]), str(place["prefix"]), source, file.dialect)
        Request(None, num_classes, image_size).check()
        shapes = abstract_shapes(architecture, num_classes, image_size)
        missing = {torch_name(path) for path in shapes} - {
            name.removeprefix(envelope.prefix) for name in envelope.state_dict()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / flax_store.MANIFEST} is damaged: {error!r}") from error
    if missing:
        raise CheckpointError(f"{folder / flax_store.ENVELOPE} lacks {', '.join(sorted(missing))}")
    leaves = flax_store.read_leaves(folder / flax_store.LEAVES, shapes)
    return Checkpoint(architecture, num_classes, image_size, leaves, envelope)


def _stored_architecture(folder: Path, stored: str, model: str | None) -> Architecture:
    """The architecture that a Flax folder names; code that it names is run only if the user names it too."""
    if ":" in stored and model is None:
        raise CheckpointError(f"{folder} is of your own model; name it again by --model {stored}")
    return find_architecture(model or stored)
