"""Which of a state dict's tensors are a network's, and what the network calls them.

People save more than a network: wrappers put parts into names, training code keeps a loss or a second network beside
it. The network is a sub-tree of the names; what lies beside it is kept for the way back.
"""

import functools
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ibau_jax.checkpoints.conversion import Mismatch, is_counter, mismatch
from ibau_jax.checkpoints.spellings import SPELLINGS
from ibau_jax.checkpoints.values import TorchTensor
from ibau_jax.errors import ConfigError
from ibau_jax.models import Normalization
from ibau_jax.models.registry import Shapes

# Parts of names that DataParallel, torch.compile, activation checkpoints and FSDP add, anywhere.
WRAPPER_PARTS = frozenset(("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))
# What layers call their mean and deviation, and what else tells that a layer normalises.
NORMALIZERS = (
    ("mean", "std"),
    ("new_mean", "new_std"),
    ("mu", "sigma"),
    ("image_mean", "image_std"),
    ("pixel_mean", "pixel_std"),
)
STATISTICS = ("running_mean", "running_var")
NORMALIZING = frozenset((*(name for pair in NORMALIZERS for name in pair), "var", "istd", *STATISTICS))
MAX_DEPTH = 32  # of a sub-tree: no network nests deeper, and a hostile name may have a million parts

Tensors = Mapping[str, TorchTensor]


class StateDict:
    """A state dict's tensors by their names without the parts that wrappers add, in the spelling of the networks here.

    Attributes:
        tensors: by the file's names.
        full: the file's names by those without wrappers' parts; as they are where two would become one.
    """

    def __init__(self, tensors: Tensors) -> None:
        plain = {".".join(part for part in name.split(".") if part not in WRAPPER_PARTS): name for name in tensors}
        plain = plain if len(plain) == len(tensors) else {name: name for name in tensors}
        spelled = ((one, names) for one in SPELLINGS if (names := one.translated(plain)))
        spelling, self.full = next(spelled, (None, plain))
        self.tensors = tensors
        self._alterations = {plain[name]: spelling.alteration for name in plain if spelling and spelling.marks(name)}
        self._by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in self.full:
            self._by_shape[self[name].shape].append(name)

    def __getitem__(self, name: str) -> TorchTensor:
        return self.tensors[self.full[name]]

    def alterations(self, names: Mapping[str, str]) -> tuple[str, ...]:
        """How the code in whose spelling the file has a network alters it.

        Args:
            names: the file's names of the network's tensors, by its own.
        """
        return tuple({one for name in names.values() if (one := self._alterations.get(name))})

    def prefixes_with(self, landmarks: Shapes) -> list[str]:
        """What stands before all of `landmarks`, wherever tensors of these names and shapes are found."""
        (first, shape), *others = landmarks.items()
        names = self._by_shape.get(shape, ())
        prefixes = [name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}")]
        return [prefix for prefix in prefixes if all(self.has(prefix + name, size) for name, size in others)]

    def has(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether there is a tensor of that name and shape."""
        return name in self.full and self[name].shape == shape

    def shapes_below(self, module: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a module's tensors by their names in it."""
        start = f"{module}." if module else ""
        return {name.removeprefix(start): self[name].shape for name in self.full if name.startswith(start)}

    @functools.cached_property
    def common_prefixes(self) -> list[str]:
        """The sub-trees that hold a quarter of the tensors and so may be the network, the whole first."""
        names = [name for name in self.full if not is_counter(name, self[name])]
        prefixes, waiting = list[str](), [""]
        while waiting and len(prefixes) < MAX_DEPTH:
            prefix = waiting.pop(0)
            prefixes.append(prefix)
            places = [name[len(prefix) :].partition(".") for name in names if name.startswith(prefix)]
            parts = Counter(part for part, dot, _ in places if dot)
            waiting += [f"{prefix}{part}." for part, held in parts.most_common() if 4 * held >= len(names)]
        return prefixes


@dataclass(frozen=True)
class Reading:
    """A state dict read as one network's.

    Attributes:
        prefix: what the names begin with, those of wrappers left out, beside the network's own.
        names: the file's names of all tensors in the sub-tree, counters included, by the network's own.
        beside: the file's names of all other tensors.
        idle: those of them that are of the network's layers which inference does not use.
        mismatch: what of the network's names and shapes does not fit.
    """

    prefix: str
    names: Mapping[str, str] = field(repr=False)
    beside: tuple[str, ...]
    idle: frozenset[str]
    mismatch: Mismatch = field(repr=False)


def common_prefix(names: Mapping[str, str]) -> str:
    """What most of the file's names begin with before the network's own: a classifier may lie elsewhere."""
    prefixes = Counter(full.removesuffix(own) for own, full in names.items() if full.endswith(own))
    return max(prefixes, key=prefixes.__getitem__, default="")


def is_below(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a tensor or a layer is one of those that `prefixes` name, or lies in one."""
    return f"{name}.".startswith(tuple(f"{prefix.rstrip('.')}." for prefix in prefixes))


def read_as(
    state: StateDict, prefix: str, shapes: Shapes, classifier: str | None, unused: Sequence[str] = ()
) -> Reading:
    """The state dict read as a network that lies below `prefix`.

    Args:
        state: the tensors.
        prefix: what the network's names begin with.
        shapes: of the network's tensors, by its own names.
        classifier: the name of its last weight. One that lies deeper or elsewhere is taken in its place, where it is
            the only matrix beside the network's body.
        unused: what the names of its layers begin with that inference does not use; their tensors lie beside it.
    """
    places = [prefix + part for part in unused]
    idle = {full for name, full in state.full.items() if is_below(name, places)} if places else set()
    inside = {
        name.removeprefix(prefix): full
        for name, full in state.full.items()
        if name.startswith(prefix) and full not in idle
    }
    modules = {name.partition(".")[0] for name in shapes}
    # What lies in a module of the network belongs to it; a module of another name at the top need not.
    own = {name: full for name, full in inside.items() if name in shapes or name.partition(".")[0] in modules}
    beside = set(state.full.values()) - set(own.values()) - idle
    if classifier is not None and classifier not in own:
        own = _with_classifier(state, own, beside, shapes, classifier)
    counters = {name: full for name, full in inside.items() if is_counter(name, state.tensors[full])}
    names = counters | own
    used = set(names.values())
    fit = mismatch(shapes, {name: state.tensors[full] for name, full in names.items()})
    if fit:  # then whatever else is there may be what is wrong
        fit = mismatch(shapes, {name: state.tensors[full] for name, full in (inside | names).items()})
    return Reading(prefix, names, tuple(name for name in state.tensors if name not in used), frozenset(idle), fit)


def _with_classifier(
    state: StateDict, own: dict[str, str], beside: set[str], shapes: Shapes, classifier: str
) -> dict[str, str]:
    """The network's names with those of a classifier, or of a head of several layers, that the file calls otherwise."""
    unused = {full for name, full in own.items() if name not in shapes} | beside
    there = {name: full for name, full in state.full.items() if full in unused}
    matrices = [name for name in there if len(state[name].shape) > 1]
    place, stem = module_of(matrices), classifier.rpartition(".")[0]
    if place is None:
        return own
    end = re.search(r"\.\d+$", place)
    if len(matrices) > 1:
        stem = _parent(stem)
    elif end and stem.endswith(end[0]):  # of a Sequential, whose other layers move with it
        place, stem = _parent(place), _parent(stem)
    names = {name: stem + name.removeprefix(place) for name in there if name.startswith(f"{place}.")}
    if not all(shapes.get(names[name], ())[1:] == state[name].shape[1:] for name in matrices):
        return own
    moved = {new: there[name] for name, new in names.items() if new in shapes}
    return {name: full for name, full in own.items() if full not in moved.values()} | moved


def module_of(names: Sequence[str]) -> str | None:
    """The module that holds these tensors: the layer of one, or what several layers lie in; None if there is none."""
    paths = [name.split(".")[:-1] for name in names]
    parts = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(part for part, *_ in parts) or None


def _parent(module: str) -> str:
    return module.rpartition(".")[0]


def doubtful(state: StateDict, reading: Reading, channels: int, num_classes: int) -> list[str]:
    """Those of the tensors beside a network that may take part in what it computes.

    Args:
        state: the tensors.
        reading: which of them are the network's.
        channels: of its images.
        num_classes: of its output.
    """
    plain = {full: name for name, full in state.full.items()}
    parent, _, place = reading.prefix.rstrip(".").rpartition(".")
    elsewhere = [plain[full] for full in reading.names.values() if not plain[full].startswith(reading.prefix)]
    head = _parent(module_of(elsewhere) or "")  # what a classifier that lies elsewhere lies in

    def may_take_part(name: str) -> bool:
        shape = state.tensors[name].shape
        if state.tensors[name].dtype.kind in "biu":  # counts, as a metric keeps them
            return False
        leaf = name.rpartition(".")[2]
        layer = sum(size > 1 for size in shape) > 1 or leaf in STATISTICS
        rest = plain[name].removeprefix(f"{parent}." if parent else "").partition(".")[0]
        return (
            (layer and plain[name].startswith(reading.prefix))  # of the same network, perhaps
            or (layer and head != "" and is_below(plain[name], (head,)))  # before or behind its classifier
            or (place.isdigit() and rest.isdigit())  # a layer before or behind it in a Sequential
            or (len(shape) > 1 and (shape[0] == channels or num_classes in shape[1:]))  # one that feeds or reads it
            or (leaf in NORMALIZING and max(shape, default=1) in (1, channels, num_classes))
        )

    return [name for name in reading.beside if name not in reading.idle and may_take_part(name)]


def find_normalization(
    state: StateDict, beside: tuple[str, ...], channels: int
) -> tuple[Normalization, set[str]] | None:
    """The mean and deviation that a layer before the network holds, and their names; None where there is no such layer.

    Values beyond 1 are of images in 0..255, and divided by 255.
    """
    there = set(beside)
    pairs = [
        (name, name.removesuffix(mean) + std)
        for name in beside
        for mean, std in NORMALIZERS
        if name.rpartition(".")[2] == mean and name.removesuffix(mean) + std in there
    ]
    if len(pairs) != 1:
        return None
    mean, std = (state.tensors[name].numpy().astype(float).reshape(-1) for name in pairs[0])
    if not {len(mean), len(std)} <= {1, channels} or not np.isfinite([*mean, *std]).all():
        return None
    mean, std = np.broadcast_to(mean, channels), np.broadcast_to(std, channels)
    scale = 255.0 if max(mean.max(), std.max()) > 1 else 1.0
    try:
        return Normalization(tuple(map(float, mean / scale)), tuple(map(float, std / scale))), set(pairs[0])
    except ConfigError:  # of no images: a metric's numbers, say
        return None
