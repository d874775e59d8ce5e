"""What a file is, found without converting it and without refusing it: for a suspicious file, the first look."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ibau_jax.checkpoints.checkpoint import possible_networks
from ibau_jax.checkpoints.conversion import check_dtypes, is_buffer, is_counter, not_finite
from ibau_jax.checkpoints.envelope import Envelope, open_envelope, state_dicts
from ibau_jax.checkpoints.hints import read_hints
from ibau_jax.checkpoints.hugging_face import is_model_folder, read_description, weights_file
from ibau_jax.checkpoints.naming import STATISTICS, common_prefix
from ibau_jax.checkpoints.reader import TorchFile, read_torch_file
from ibau_jax.checkpoints.recognition import SHOWN, Candidate, Request, recognise, runners_up
from ibau_jax.checkpoints.shards import files_of
from ibau_jax.checkpoints.values import Record, TorchTensor, TorchValue
from ibau_jax.errors import CheckpointError
from ibau_jax.image_size import ImageSize
from ibau_jax.models import NORMALIZATIONS


@dataclass(frozen=True)
class Report:
    """What `inspect_file` found; None or empty where there is nothing to say.

    Attributes:
        file: its path.
        size: in bytes, with the files that it names where it is an index.
        format: zip, torchscript, legacy, pickle or safetensors.
        wrapper: where the state dict lies, keys joined by dots; "" where the file is the state dict.
        other_state_dicts: where there are others, for `--key`.
        is_whole_module: whether that is a module whose layers say what they do.
        entries: what else lies at the top of the file, by key, and of what kind it is.
        prefix: what most names of the network begin with before the model's own names.
        beside: tensors that are no part of the network, by their full names.
        keys: the state dict's tensors by their full names, with their shapes.
        parameters: how many trained values they hold: neither running statistics nor counters and buffers.
        dtypes: how many tensors have which.
        not_finite: how many values of which of the network's tensors are NaN or infinite, or variances below 0.
        model: the architecture recognised; the most common one where there are several.
        variants: all architectures that have these names and shapes and compute different things, if there are several.
        assumed: whether `model` is one of several without clean images that speak for it.
        evidence: what clean images say for each of them, the likeliest first, where there were any.
        num_classes, image_size: of it.
        runners_up: other architectures by name, best first, and what does not fit.
        source: who wrote the file, where it is of a known kind.
        data_name: what the file calls its data.
        normalization: mean and std that the file implies.
        refused_globals: what the pickle calls, or names of Python's own, that is not on the allow list.
        unknown_classes: classes of objects that are kept as data, and functions that are named beside them.
        problem: why the file can't be converted; None if it can.
    """

    file: str
    size: int
    format: str
    wrapper: str | None = None
    other_state_dicts: tuple[str, ...] = ()
    is_whole_module: bool = False
    entries: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    beside: tuple[str, ...] = ()
    keys: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    not_finite: Mapping[str, int] = field(default_factory=dict)
    model: str | None = None
    variants: tuple[str, ...] = ()
    assumed: bool = False
    evidence: Sequence[dict[str, Any]] = ()
    num_classes: int | None = None
    image_size: ImageSize | None = None
    runners_up: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None
    data_name: str | None = None
    normalization: Mapping[str, tuple[float, ...]] | None = None
    refused_globals: tuple[str, ...] = ()
    unknown_classes: tuple[str, ...] = ()
    problem: str | None = None


def inspect_file(path: Path, request: Request, key: str | None = None) -> Report:
    """Looks at a PyTorch file without converting or executing anything.

    Args:
        path: the file.
        request: what is known of the model.
        key: where the state dict lies, if there are several.

    Raises:
        CheckpointError: the file is missing, damaged, or of no known format.
    """
    if path.is_dir() and not is_model_folder(path):
        raise CheckpointError(f"{path} is a folder; --inspect looks at PyTorch files and transformers' folders")
    weights = weights_file(path)
    file = read_torch_file(weights, inspect=True)
    size = sum(part.stat().st_size for part in files_of(weights))
    facts: dict[str, Any] = {"file": str(weights), "size": size, "format": _format(file)}
    refused = tuple(map(str, file.refused))
    known = [str(name) for name in file.unknown if name not in file.refused]
    unknown = tuple(sorted(known, key=lambda name: name.startswith("torch.")))  # the file's own first
    problem = f"the pickle names {', '.join(refused)}, outside the allow list" if refused else None
    try:
        description = read_description(path)
        envelope = replace(open_envelope(file.tree, file.format, key), description=description)
    except CheckpointError as error:
        return Report(
            **facts,
            entries=_kinds(file.tree),
            refused_globals=refused,
            unknown_classes=unknown,
            problem=problem or str(error),
        )
    hints = read_hints(envelope.metadata())
    request = replace(request, hints=hints)
    found, variants, is_assumed, others, not_recognised = _recognised(envelope, request)
    return Report(
        **facts,
        **_state_dict_facts(envelope),
        **_model_facts(found, variants, request),
        prefix=common_prefix(found.reading.names) if found else "",
        beside=found.reading.beside if found else (),
        variants=variants if len(variants) > 1 else (),
        assumed=is_assumed,
        not_finite=_not_finite(found, envelope) if found else {},
        runners_up={one.architecture.name: one.mismatch.described(SHOWN) for one in others},
        refused_globals=refused,
        unknown_classes=unknown,
        problem=problem or not_recognised,
    )


def _format(file: TorchFile) -> str:
    return file.format if file.dialect.script is None else "torchscript"


def _recognised(
    envelope: Envelope, request: Request
) -> tuple[Candidate | None, tuple[str, ...], bool, list[Candidate], str | None]:
    """The architecture, the names of all that it may be, whether it is assumed, the runners-up, and why it is none or
    can't be converted.
    """
    tensors = envelope.tensors()
    others: list[Candidate] = []
    found, variants, is_assumed = None, tuple[str, ...](), False
    try:
        others = runners_up(tensors, request)
        found = recognise(tensors, request)
        possible, normalization, is_settled = possible_networks(found, request, envelope)
        found, variants = replace(found, normalization=normalization), tuple(one.name for one in possible)
        is_assumed = len(variants) > 1 or (possible[0].is_guessed and not is_settled)
        check_dtypes({name: tensor.dtype for name, tensor in _weights(found, envelope).items()})
    except CheckpointError as error:
        return found, variants, is_assumed, others, str(error)
    return found, variants, is_assumed, others, None


def _not_finite(found: Candidate, envelope: Envelope) -> dict[str, int]:
    return not_finite({name: tensor.numpy() for name, tensor in _weights(found, envelope).items()})


def _weights(found: Candidate, envelope: Envelope) -> dict[str, TorchTensor]:
    """The network's tensors by its own names, without counters and buffers."""
    tensors = envelope.tensors()
    own = {name: tensors[full] for name, full in found.reading.names.items()}
    return {name: tensor for name, tensor in own.items() if not (is_counter(name, tensor) or is_buffer(name))}


def _state_dict_facts(envelope: Envelope) -> dict[str, Any]:
    tensors = envelope.stored()
    others = [".".join(path) for path in state_dicts(envelope.tree) if path and path != envelope.path]
    trained = [tensor for name, tensor in tensors.items() if _is_trained(name, tensor)]
    return {
        "wrapper": ".".join(envelope.path),
        "other_state_dicts": tuple(others),
        "is_whole_module": envelope.tells_layers(),
        "entries": _kinds(envelope.metadata()),
        "keys": {name: tensor.shape for name, tensor in tensors.items()},
        "parameters": sum(tensor.nbytes // tensor.dtype.itemsize for tensor in trained),
        "dtypes": dict(Counter(str(tensor.dtype) for tensor in tensors.values())),
    }


def _model_facts(found: Candidate | None, variants: tuple[str, ...], request: Request) -> dict[str, Any]:
    hints = request.hints
    normalization = (found and found.normalization) or hints.normalization
    return {
        "model": next(iter(variants), None),
        "num_classes": found.num_classes if found else None,
        "image_size": found.image_size if found else hints.image_size,
        "source": hints.source,
        "data_name": hints.data_name,
        "normalization": {"mean": normalization.mean, "std": normalization.std} if normalization else None,
    }


def _is_trained(name: str, tensor: TorchTensor) -> bool:
    return not (is_counter(name, tensor) or is_buffer(name)) and name.rpartition(".")[2] not in STATISTICS


def normalization_name(mean: Iterable[float], std: Iterable[float]) -> str | None:
    """What `--normalize` calls these numbers, if it has a name for them."""
    pair = (tuple(mean), tuple(std))
    return next((name for name, known in NORMALIZATIONS.items() if known and (known.mean, known.std) == pair), None)


def _kinds(tree: Any) -> dict[str, str]:
    """What lies under each key, in a word."""
    return {str(key): _kind(value) for key, value in tree.items()} if isinstance(tree, dict) else {"": _kind(tree)}


def _kind(value: Any) -> str:
    if isinstance(value, TorchTensor):
        return f"tensor {value.shape}"
    if isinstance(value, TorchValue):
        return f"{value.function} object"
    if isinstance(value, Record):
        return f"{value.kind} object"
    if isinstance(value, (dict, list, tuple, set)):
        return f"{type(value).__name__} of {len(value)}"
    shown = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else ""
    return shown if 0 < len(shown) <= 40 else type(value).__name__
