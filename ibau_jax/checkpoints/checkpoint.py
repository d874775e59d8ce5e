"""A classifier's checkpoint: its weights in Flax's layout, and all it takes to give the PyTorch file back."""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ibau_jax.checkpoints import flax_store, hugging_face
from ibau_jax.checkpoints.conversion import (
    Leaves,
    check_dtypes,
    leaves_from_torch,
    leaves_to_torch,
    not_finite,
    torch_name,
)
from ibau_jax.checkpoints.conversion import Path as LeafPath
from ibau_jax.checkpoints.envelope import Envelope, open_envelope, opened
from ibau_jax.checkpoints.hints import Hints, read_hints
from ibau_jax.checkpoints.module_evidence import Layers, told_by_module
from ibau_jax.checkpoints.naming import common_prefix
from ibau_jax.checkpoints.reader import SAFETENSORS_SUFFIX, TORCH_SUFFIXES, Format, read_torch_file
from ibau_jax.checkpoints.recognition import (
    Candidate,
    Request,
    abstract_model,
    abstract_shapes,
    check_logits,
    recognise,
    same_name,
)
from ibau_jax.checkpoints.unpickle import MAX_PROTOCOL
from ibau_jax.checkpoints.values import TorchTensor
from ibau_jax.checkpoints.writer import write_npz, write_safetensors, write_torch_file
from ibau_jax.errors import CheckpointError, ConfigError, and_more, shortened
from ibau_jax.files import put_in_place, regular_files, staging_folder
from ibau_jax.image_size import ImageSize
from ibau_jax.models import Architecture, Normalization, Normalized, find_architecture, get_architecture, variants
from ibau_jax.models.custom import is_own
from ibau_jax.models.normalized import normalized_model
from ibau_jax.models.registry import altered, unaltered

NPZ_SUFFIX = ".npz"
SHOWN = 3  # other networks of a guess that a message names
MAX_TEXT = 1000  # characters of a name in checkpoint.json
FLAX_SUFFIXES = (".flax", ".orbax")
Form = Literal["torch", "safetensors", "npz", "flax"]


@dataclass(frozen=True)
class Checkpoint:
    """What `load` gives and `save` takes.

    Attributes:
        architecture: what the state dict was recognised as.
        num_classes: of the classifier.
        image_size: height and width of the model's images.
        leaves: every leaf of the Flax model by path, in Flax's layout and the file's dtype.
        envelope: the file around the weights.
        alternatives: other architectures that have the same names and shapes and compute something else, where nothing
            but how common it is speaks for `architecture`; see `ibau_jax.checkpoints.variants`.
        stored_normalization: mean and deviation that a layer of the state dict before the network holds.
        is_settled: whether the user, clean images, or layers in a `torch.nn.Sequential` say that it is `architecture`.
    """

    architecture: Architecture
    num_classes: int
    image_size: ImageSize
    leaves: Leaves = field(repr=False)
    envelope: Envelope = field(repr=False)
    alternatives: tuple[Architecture, ...] = ()
    stored_normalization: Normalization | None = None
    is_settled: bool = False

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the model's images."""
        return (*self.image_size, self.architecture.channels)

    def summary(self) -> str:
        """Architecture, classes and image size in a few words."""
        return f"{self.architecture.name}, {self.num_classes} classes, {self.image_size} images"

    @property
    def hints(self) -> Hints:
        """What the file says of itself beside the weights."""
        return read_hints(self.metadata())

    @property
    def normalization(self) -> Normalization | None:
        """What the file says that the model's images are normalised with."""
        return self.stored_normalization or self.hints.normalization

    def assumption_note(self) -> str | None:
        """That the architecture is assumed, and what else it may be."""
        if self.architecture.is_guessed:
            return None if self.is_settled else self._guess_note()
        if not self.alternatives:
            return None
        others = ", ".join(one.name for one in self.alternatives)
        says = same_name(self.architecture.name, self.hints.model)
        why = "as the file says" if says else "the most common network of these names and shapes"
        return (
            f"taken as {self.architecture.name}, {why}; {others} have the same names and shapes and compute something "
            "else. --model NAME says which it is, clean images (--dataset) tell"
        )

    def _guess_note(self) -> str:
        """That the architecture is made up from names and shapes, and what else it may be."""
        others = ", ".join(one.name for one in self.alternatives[:SHOWN]) + and_more(self.alternatives, SHOWN)
        alike = f"; {others} have the same names and shapes" if others else ""
        return (
            f"taken as {self.architecture.name}, no published network: what is between the layers with weights is "
            f"assumed{alike}, and clean images (--dataset) tell. --image-size "
            f"HEIGHTxWIDTH says that images are not {self.image_size}, --model NAME what the network is, and --verify "
            "--torch-module proves it"
        )

    def beside_note(self) -> str | None:
        """Which tensors are no part of the network."""
        beside = self.envelope.beside()
        return f"kept as they are, no part of the network: {shortened(', '.join(beside), 1000)}" if beside else None

    def others_note(self) -> str | None:
        """Which other networks the file holds, whose weights stay as they are."""
        others = shortened(", ".join(self.envelope.others()), 1000)
        return f"kept as they are, other weights that --key would choose: {others}" if others else None

    def masks_note(self) -> str | None:
        """That masks open where weights behind them move."""
        masked = sum(fold.is_masked for fold in self.envelope.folds.values())
        if not masked:
            return None
        return f"{masked} weights have masks; a mask opens where its weight is no longer zero, so that sparsity may go"

    def as_variant(self, architecture: Architecture) -> "Checkpoint":
        """The same weights as those of another architecture with the same names and shapes, and no longer assumed."""
        return replace(self, architecture=architecture, alternatives=(), is_settled=True)

    def model(self) -> nnx.Module:
        """The Flax NNX model, in inference mode, its weights in float32.

        It takes images, float32 (n, height, width, channels) in [0, 1], and gives logits, float32 (n, num_classes);
        inside, images are normalised as the file says, if it does.
        """
        return normalized_model(self.network(), self.normalization)

    def network(self) -> nnx.Module:
        """The same without a normalisation: it takes images as the network's first layer does."""
        graph, state = nnx.split(abstract_model(self.architecture, self.num_classes, self.image_size))
        flat = {
            path: variable.replace(jnp.asarray(self.leaves[path], jnp.float32))
            for path, variable in nnx.to_flat_state(state)
        }
        return nnx.merge(graph, nnx.from_flat_state(flat))

    def with_weights(self, model: nnx.Module) -> "Checkpoint":
        """The same checkpoint with the weights of `model`; those that are unchanged keep the file's bits.

        Raises:
            CheckpointError: `model` is another architecture, or a weight is too large for the file's dtype.
        """
        model = model.model if isinstance(model, Normalized) else model
        flat = {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}
        if set(flat) != set(self.leaves):
            raise CheckpointError(f"the model is no {self.architecture.name}: its leaves have other names")
        leaves = {path: _as_stored(path, self.leaves[path], flat[path]) for path in self.leaves}
        return replace(self, leaves=leaves)

    def not_finite(self) -> dict[str, int]:
        """How many values of which of the model's tensors are NaN or infinite, or variances below 0."""
        return not_finite(leaves_to_torch(self.leaves))

    def has_statistics(self) -> bool:
        """Whether BatchNorm recorded any, by PyTorch's name of them."""
        return any(torch_name(path).endswith("running_mean") for path in self.leaves)

    def metadata(self) -> Mapping[str, Any]:
        """Plain values beside the state dict at the top of the file (`acc`, `epoch`, ...)."""
        return self.envelope.metadata()


def _as_stored(path: LeafPath, stored: np.ndarray, new: np.ndarray) -> np.ndarray:
    """A leaf in the dtype of the one that it replaces, rounded to nearest; that one itself where it is the same."""
    if np.array_equal(stored.astype(np.float32), new):
        return stored
    with np.errstate(over="ignore"):
        rounded = new.astype(stored.dtype)
    if np.isfinite(new).all() and not np.isfinite(rounded.astype(np.float32)).all():
        raise CheckpointError(
            f"{torch_name(path)} has grown too large for the file's {stored.dtype}; save the original model after "
            ".float(), or try a smaller learning rate"
        )
    return rounded


def load(
    path: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    key: str | None = None,
    leave_out: tuple[str, ...] = (),
) -> Checkpoint:
    """Reads a checkpoint, without torch and without executing anything in it.

    Args:
        path: a PyTorch file, a pickle of tensors, a safetensors file, the index of several of these beside it, a folder
            of Hugging Face's transformers, or a Flax directory that `save` wrote. What it is called does not matter.
        model: an architecture's name or FILE.py:CLASS, where it shall not be recognised from the names and shapes.
        num_classes: likewise.
        image_size: height and width of the images, or one number for both, where the weights fit more than one size.
        key: where in the file the state dict lies, if there are several (`model_ema`).
        leave_out: tensors of the state dict that take no part in what the network computes: their names, or what those
            begin with.

    Raises:
        CheckpointError: the file is missing, damaged or dangerous, holds no state dict, or none of a known model.
    """
    path, size = Path(path), _asked_size(image_size)
    if path.is_dir() and not hugging_face.is_model_folder(path):
        return _asked_for(_load_flax(path, model), num_classes, size, key, leave_out)
    file = read_torch_file(hugging_face.weights_file(path))
    description = hugging_face.read_description(path)
    try:
        envelope = replace(open_envelope(file.tree, file.format, key), dialect=file.dialect, description=description)
        hints = read_hints(envelope.metadata())
        return _opened(envelope, Request(model, num_classes, size, hints, leave_out))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _asked_size(image_size: int | tuple[int, int] | None) -> ImageSize | None:
    """The size that a caller names; CheckpointError where no image has it."""
    try:
        return None if image_size is None else ImageSize.of(image_size)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _asked_for(
    checkpoint: Checkpoint,
    num_classes: int | None,
    image_size: ImageSize | None,
    key: str | None,
    leave_out: Sequence[str],
) -> Checkpoint:
    """A Flax folder's checkpoint, which holds one network of known sizes; CheckpointError if another was asked for."""
    asked = {"classes": (num_classes, checkpoint.num_classes), "image size": (image_size, checkpoint.image_size)}
    for what, (wanted, stored) in asked.items():
        if wanted not in (None, stored):
            raise CheckpointError(f"the Flax folder was converted for the {what} {stored}, not {wanted}; convert anew")
    if key is not None or leave_out:
        raise CheckpointError("a Flax folder holds one network: a key and tensors to leave out are for PyTorch files")
    return checkpoint


def _opened(envelope: Envelope, request: Request) -> Checkpoint:
    tensors = envelope.tensors()
    candidate = recognise(tensors, request)
    place = (candidate.num_classes, candidate.image_size)
    own = {name: tensors[full] for name, full in candidate.reading.names.items()}
    possible, normalization, is_settled = possible_networks(candidate, request, envelope)
    leaves = leaves_from_torch(abstract_shapes(candidate.architecture, *place), own)
    rest = replace(envelope, names=candidate.reading.names).emptied(set(map(torch_name, leaves)))
    return Checkpoint(possible[0], *place, leaves, rest, tuple(possible[1:]), normalization, is_settled)


def _check_apart(tensors: Mapping[str, TorchTensor]) -> None:
    """Raises CheckpointError where a module has one tensor in two places; the network here would have two of them."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        if id(tensor) in names:
            raise CheckpointError(
                f"{names[id(tensor)]} and {name} are one tensor in the file: the module has a layer in two places, and "
                "no network here has. Save its state_dict() to take them for two"
            )
        names[id(tensor)] = name


class Networks(NamedTuple):
    """What a state dict may be of.

    Attributes:
        possible: the architectures, the likeliest first.
        normalization: what a layer normalises images with.
        is_settled: whether it is the first of them, by the user's word or by layers in a `torch.nn.Sequential`.
    """

    possible: list[Architecture]
    normalization: Normalization | None
    is_settled: bool


def possible_networks(candidate: Candidate, request: Request, envelope: Envelope) -> Networks:
    """What a state dict may be of.

    Where the file holds the whole module, it is what its layers do not contradict. They do not say in what order code
    calls them.

    Raises:
        CheckpointError: they contradict all of them, none takes images of this size, or the module has a layer in two
            places.
    """
    place = (candidate.num_classes, candidate.image_size)
    possible, module = possible_variants(candidate.architecture, request), envelope.module()
    if envelope.description:
        possible = hugging_face.told_by_description(possible, envelope.description, *place)
    if candidate.architecture.is_guessed:  # some may need larger images than these
        possible = [
            one for one in possible if abstract_shapes(one, *place) == abstract_shapes(candidate.architecture, *place)
        ]
    if module is None:
        return Networks(_taking_images(possible, *place), candidate.normalization, request.model is not None)
    tensors, names = envelope.tensors(), candidate.reading.names
    _check_apart({name: tensors[full] for name, full in names.items()})
    unused = [common_prefix(names) + part for part in candidate.architecture.unused]
    layers = Layers(module, names, (*request.leave_out, *unused))
    if not is_own(candidate.architecture.name):
        possible = told_by_module(possible, layers, candidate.num_classes, candidate.image_size)
    possible, normalization = _taking_images(possible, *place), candidate.normalization or layers.normalization()
    return Networks(possible, normalization, request.model is not None or (layers.are_in_order and len(possible) == 1))


def _taking_images(possible: list[Architecture], num_classes: int, image_size: ImageSize) -> list[Architecture]:
    """The architectures from the first one on that takes images of this size; CheckpointError where none does."""
    refusals = list[CheckpointError]()
    for number, architecture in enumerate(possible):
        try:
            check_logits(architecture, num_classes, image_size)
        except CheckpointError as error:
            refusals.append(error)
        else:
            return possible[number:]
    raise refusals[0]


def possible_variants(architecture: Architecture, request: Request) -> list[Architecture]:
    """The architectures with the names and shapes of this one that are not ruled out, the likeliest first."""
    if request.model:
        return [architecture]
    base, alterations = unaltered(architecture)
    known, named = tuple(altered(one, *alterations) for one in variants(base)), request.hints.model or ""
    if "+" in named:  # as scripts/poison.py writes it
        with contextlib.suppress(CheckpointError):
            hinted = get_architecture(named)
            known = (hinted, *known) if hinted.variant_of == known[0].name else known
    return sorted(known, key=lambda one: not same_name(one.name, named))


def form_of(path: Path) -> Form:
    """What `save` writes to a path, by its name.

    A suffix that begins with a digit is part of a folder's name, as in `runs/v1.2`.

    Raises:
        CheckpointError: the name has a suffix that is none of those known.
    """
    suffix = path.suffix.lower()
    if suffix in TORCH_SUFFIXES:
        return "torch"
    if suffix == SAFETENSORS_SUFFIX:
        return "safetensors"
    if suffix == NPZ_SUFFIX:
        return "npz"
    if suffix in (*FLAX_SUFFIXES, "", ".") or suffix[1].isdigit():
        return "flax"
    raise CheckpointError(
        f"{path.name[-60:]} does not say what to write: {', '.join(TORCH_SUFFIXES)} make a PyTorch file, "
        f"{SAFETENSORS_SUFFIX} makes a safetensors file, {NPZ_SUFFIX} NumPy's arrays, "
        f"no suffix or {' or '.join(FLAX_SUFFIXES)} a Flax folder"
    )


def save(checkpoint: Checkpoint, path: str | Path) -> None:
    """Writes a checkpoint; it appears complete or not at all, and replaces what was there.

    Args:
        checkpoint: its weights and the file they came from.
        path: one of `TORCH_SUFFIXES` for a PyTorch file in the original's format (zip where that was safetensors),
            wrapper and key order, `.safetensors` or `.npz` for the bare state dict; without a suffix, or with one of
            `FLAX_SUFFIXES`, a Flax directory.

    Raises:
        CheckpointError: the name has another suffix, or the file's content can't be written back.
    """
    path = Path(path)
    form = form_of(path)
    with staging_folder(path) as folder:
        prepared = folder / path.name
        if form == "torch":
            envelope = checkpoint.envelope
            write_torch_file(_filled(checkpoint), prepared, envelope.format, envelope.dialect)
        elif form == "safetensors":
            _write_safetensors(checkpoint, prepared)
        elif form == "npz":
            write_npz(_named_arrays(checkpoint), prepared)
        else:
            _write_flax(checkpoint, prepared)
        put_in_place(prepared, path)


def check_can_be_saved(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where `save` could not write the file back, before there is anything to lose.

    All is written to a temporary folder, but for the weights.
    """
    try:
        _filled(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            envelope = checkpoint.envelope
            write_torch_file(envelope.tree, Path(folder) / "envelope.pth", envelope.format, envelope.dialect)
            if checkpoint.envelope.format == "safetensors":
                none = {path: leaf[:0] for path, leaf in checkpoint.leaves.items()}
                _write_safetensors(replace(checkpoint, leaves=none), Path(folder) / "envelope.safetensors")
    except OSError:
        raise
    except Exception as error:  # whatever values raise that a hostile file put beside its weights
        cause = error.__cause__ or error
        raise CheckpointError(
            f"what lies beside the weights can't be written back: {type(cause).__name__}: {str(cause)[:200]}"
        ) from error


def _filled(checkpoint: Checkpoint) -> Any:
    return checkpoint.envelope.filled(leaves_to_torch(checkpoint.leaves))


def _write_safetensors(checkpoint: Checkpoint, path: Path) -> None:
    metadata = checkpoint.metadata().get("metadata") if checkpoint.envelope.format == "safetensors" else None
    write_safetensors(_named_arrays(checkpoint), metadata or {"format": "pt"}, path)


def _named_arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """All tensors of the state dict, in the file's order."""
    envelope = checkpoint.envelope
    state = replace(envelope, part="").state_dict().items()
    kept = {
        name: value.numpy() if isinstance(value, TorchTensor) else value
        for name, value in state
        if isinstance(value, TorchTensor | np.ndarray)
    }
    new = envelope.held(leaves_to_torch(checkpoint.leaves))
    return kept | {name: tensor.numpy() for name, tensor in new.items()}


def _write_flax(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir()
    flax_store.write_leaves(checkpoint.leaves, folder / flax_store.LEAVES)
    write_torch_file(checkpoint.envelope.tree, folder / flax_store.ENVELOPE, "zip", checkpoint.envelope.dialect)
    manifest = {
        "model": checkpoint.architecture.name,
        "num_classes": checkpoint.num_classes,
        "image_size": checkpoint.image_size.plain(),
        "normalization": asdict(stored) if (stored := checkpoint.stored_normalization) else None,
        "alternatives": [architecture.name for architecture in checkpoint.alternatives],
        "is_settled": checkpoint.is_settled,
        "state_dict": {"path": list(checkpoint.envelope.path), "names": dict(checkpoint.envelope.names)},
        "source_format": checkpoint.envelope.format,
        "description": dict(checkpoint.envelope.description),
        "source_protocol": checkpoint.envelope.dialect.protocol,  # which the envelope's zip format need not have
        "leaves_sha256": flax_store.digest(checkpoint.leaves),
    }
    flax_store.write_manifest(manifest, folder)


def _load_flax(folder: Path, model: str | None) -> Checkpoint:
    if not flax_store.is_flax_checkpoint(folder):
        raise CheckpointError(
            f"{folder} is a folder but no Flax checkpoint of this program (it has no checkpoint.json) and no model of "
            "transformers (no config.json); name a file in it, or several by a pattern such as 'FOLDER/*.pth'"
        )
    manifest = flax_store.read_manifest(folder)
    try:
        regular_files(folder)
        architecture = _stored_architecture(folder, _text(manifest["model"]), model)
        num_classes, image_size = _whole(manifest["num_classes"]), ImageSize.of(manifest["image_size"])
        Request(None, num_classes).check()
        source: Format = manifest["source_format"]
        if source not in get_args(Format):
            raise ValueError(f"the source format {str(source)[:40]!r} is none")
        protocol = manifest.get("source_protocol")  # earlier versions wrote none
        if protocol not in (None, *range(MAX_PROTOCOL + 1)):
            raise ValueError(f"the pickle protocol {str(protocol)[:40]!r} is none")
        path = tuple(map(_text, manifest["state_dict"]["path"]))
        alternatives = () if model else _stored_alternatives(architecture, manifest)
        is_settled = model is not None or manifest.get("is_settled", not alternatives) is True
        normalization = _stored_normalization(manifest, architecture.channels)
        description = dict(manifest.get("description", {}))
    except (LookupError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder / flax_store.MANIFEST} is damaged: {shortened(error)}") from error
    file = read_torch_file(folder / flax_store.ENVELOPE)
    dialect = file.dialect if protocol is None else replace(file.dialect, protocol=int(protocol))
    envelope = Envelope(opened(file.tree)[0], path, {}, source, dialect, description=description)
    envelope = replace(envelope, names=_stored_names(folder, manifest["state_dict"], envelope))
    shapes = abstract_shapes(architecture, num_classes, image_size)
    stored = _stored_dtypes(folder / flax_store.ENVELOPE, envelope, [torch_name(path) for path in shapes])
    check_dtypes(stored)
    dtypes = {path: stored[torch_name(path)] for path in shapes}
    leaves = flax_store.read_leaves(folder / flax_store.LEAVES, shapes, dtypes)
    if manifest.get("leaves_sha256") not in (None, flax_store.digest(leaves)):  # earlier versions wrote none
        raise CheckpointError(f"{folder / flax_store.LEAVES} is damaged: its weights are not those that were written")
    check_logits(architecture, num_classes, image_size)
    checkpoint = Checkpoint(
        architecture, num_classes, image_size, leaves, envelope, alternatives, normalization, is_settled
    )
    _check_names(checkpoint, folder)
    return checkpoint


def _check_names(checkpoint: Checkpoint, folder: Path) -> None:
    """Raises CheckpointError where a Flax folder's tensors, written back, would not be recognised as they are read."""
    written = replace(checkpoint.envelope, tree=_filled(checkpoint)).tensors()
    tensors = {full: written[full] for full in checkpoint.envelope.names.values()}
    request = Request(checkpoint.architecture.name, checkpoint.num_classes, checkpoint.image_size)
    try:
        same = dict(recognise(tensors, request).reading.names) == dict(checkpoint.envelope.names)
    except CheckpointError:
        same = False
    if not same:
        raise CheckpointError(f"{folder / flax_store.MANIFEST} is damaged: it gives tensors the names of others")


def _stored_alternatives(architecture: Architecture, manifest: Mapping[str, Any]) -> tuple[Architecture, ...]:
    """What else the network may be; folders of earlier versions do not say, and may be any variant."""
    others = [one for one in variants(architecture) if one != architecture]
    names = [_text(name) for name in manifest.get("alternatives", [one.name for one in others])]
    if not set(names) <= {one.name for one in others}:
        raise ValueError("the alternatives have other names and shapes than the model")
    return tuple(map(get_architecture, names))


def _stored_normalization(manifest: Mapping[str, Any], channels: int) -> Normalization | None:
    stored = manifest.get("normalization")
    if stored is None:
        return None
    mean, std = (tuple(float(value) for value in stored[name]) for name in ("mean", "std"))
    if len(mean) != channels:
        raise ValueError(f"the normalization has {len(mean)} numbers for {channels} channels")
    return Normalization(mean, std)


def _stored_names(folder: Path, place: Mapping[str, Any], envelope: Envelope) -> dict[str, str]:
    """The network's names of the tensors, and the envelope's; earlier folders have a prefix instead."""
    try:
        tensors = envelope.tensors()
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / flax_store.ENVELOPE} has no state dict where checkpoint.json says") from error
    try:
        if "names" in place:
            names = {own: full for own, full in place["names"].items() if _text(full) in tensors}
            if len(set(names.values())) != len(names):
                raise ValueError("two tensors of the network have one name")
            return names
        prefix = _text(place["prefix"])
        return {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / flax_store.MANIFEST} is damaged: {str(error)[:200]}") from error


def _stored_dtypes(file: Path, envelope: Envelope, names: Sequence[str]) -> dict[str, np.dtype]:
    """The dtypes that an envelope says its weights had."""
    tensors = envelope.tensors()
    missing = [name for name in names if name not in envelope.names]
    if missing:
        raise CheckpointError(f"{file} lacks the tensors {', '.join(sorted(missing)[:10])}")
    return {name: tensors[envelope.names[name]].dtype for name in names}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]} is no text")
    if len(value) > MAX_TEXT:
        raise ValueError(f"a text is longer than {MAX_TEXT} characters")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{str(value)[:40]} is no whole number")
    return value


def _stored_architecture(folder: Path, stored: str, model: str | None) -> Architecture:
    """The architecture that a Flax folder names; code that it names is run only if the user names it too."""
    if is_own(stored) and model is None:
        raise CheckpointError(f"{folder} is of your own model; name it again by --model {stored}")
    if model is not None:
        return find_architecture(model)
    try:
        return find_architecture(stored)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / flax_store.MANIFEST}: {error}") from error
