"""Tensors that a file holds in another form than the network here: several for one, or one twice.

Pruning keeps a weight beside its mask, weight norm its direction beside its length, transformers' attention queries,
keys and values apart. A fold makes the network's tensor of them, and writes a changed one back in the file's own form.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ibau_jax.checkpoints.conversion import WEIGHT_DTYPES
from ibau_jax.checkpoints.values import TorchTensor

Arrays = Sequence[np.ndarray]
ALIGNED = 0.5  # cosine of the left vector and the right one's image: 1 at the last iteration, near 0 of other axes
Tensors = Mapping[str, TorchTensor]


@dataclass(frozen=True)
class Form:
    """A way in which files hold a tensor.

    Attributes:
        parts: what the names of the file's tensors end with.
        name: what the tensor of the network ends with in their place.
        fits: whether arrays can be such parts.
        fold: the network's tensor, from the parts.
        unfold: `unfold(array, parts)`, the parts with another tensor of the network.
        stem: a pattern of what stands before the parts' endings.
        is_lossless: whether the parts are nothing but the network's tensor, so that they need not be kept beside it;
            `unfold` does not look at them then.
    """

    parts: tuple[str, ...]
    name: str
    fits: Callable[[Tensors, tuple[str, ...]], bool]
    fold: Callable[[Arrays], np.ndarray]
    unfold: Callable[[np.ndarray, Arrays], Arrays]
    stem: str = r"(?:.+\.)?"
    is_lossless: bool = False


@dataclass(frozen=True)
class Fold:
    """A tensor of the network and those of the file that it is made of.

    Attributes:
        name: what the tensor is called in the place of the parts.
        parts: the file's names.
        form: how the file holds it.
    """

    name: str
    parts: tuple[str, ...]
    form: Form = field(repr=False)

    @property
    def is_masked(self) -> bool:
        """Whether one of the parts is a mask."""
        return any(part.endswith("mask") for part in self.parts)

    def folded(self, tensors: Tensors) -> TorchTensor:
        """The network's tensor, in the dtype of the first part."""
        first = tensors[self.parts[0]]
        with np.errstate(all="ignore"):  # what is not finite is told of as in any other tensor
            array = self.form.fold([tensors[part].numpy() for part in self.parts])
        return TorchTensor.from_numpy(np.asarray(array).astype(first.dtype, copy=False))

    def unfolded(self, array: np.ndarray, tensors: Tensors) -> dict[str, TorchTensor]:
        """The file's tensors with another tensor of the network; those that need not change keep their bits."""
        if not self.form.is_lossless and np.array_equal(self.folded(tensors).numpy(), array):
            return {}
        parts = [tensors[part] for part in self.parts]
        new = self.form.unfold(array, [part.numpy() for part in parts])
        return {name: part.holding(one) for name, part, one in zip(self.parts, parts, new, strict=True)}


def find_folds(tensors: Tensors) -> list[Fold]:
    """All tensors of a state dict that are held in one of `FORMS` or twice; no part is of two."""
    folds, used = list[Fold](), set[str]()
    twins = list(_twins(tensors))
    if not all(_same(tensors, twin.parts) for twin in twins):
        twins = []  # two networks
    for fold in (*twins, *(fold for form in FORMS for fold in _of_form(form, tensors))):
        if used.isdisjoint(fold.parts) and fold.form.fits(tensors, fold.parts):
            folds.append(fold)
            used.update(fold.parts)
    return folds


def _of_form(form: Form, tensors: Tensors) -> Iterator[Fold]:
    first = form.parts[0]
    for name in tensors:
        stem = name.removesuffix(first)
        if not name.endswith(first) or not re.fullmatch(form.stem, stem):
            continue
        parts = tuple(stem + part for part in form.parts)
        made = stem + form.name
        if set(parts) <= tensors.keys() and (made in parts or made not in tensors):
            yield Fold(made, parts, form)


def _twins(tensors: Tensors) -> Iterator[Fold]:
    for name in tensors:
        for place, other in TWINS.items():
            twin = name.replace(place, other, 1)
            if twin != name and twin in tensors:
                yield Fold(twin, (twin, name), TWIN)


def with_folds(tensors: Tensors, folds: Iterable[Fold]) -> dict[str, TorchTensor]:
    """The state dict with each fold's tensor in the place of its first part, the other parts left out."""
    by_part = {part: fold for fold in folds for part in fold.parts}
    together = dict[str, TorchTensor]()
    for name, tensor in tensors.items():
        fold = by_part.get(name)
        if fold is None:
            together[name] = tensor
        elif name == fold.parts[0]:
            together[fold.name] = fold.folded(tensors)
    return together


def _alike(tensors: Tensors, parts: tuple[str, ...]) -> bool:
    """Whether all have one shape and dtype."""
    kinds = {(tensors[part].shape, tensors[part].dtype) for part in parts}
    return len(kinds) == 1 and len(tensors[parts[0]].shape) > 0


def _joined(what: tuple[str, ...], leaf: str) -> Form:
    """Queries, keys and values apart, which the network here has in one tensor."""
    return Form(
        tuple(f"{one}.{leaf}" for one in what), f"qkv.{leaf}", _alike, np.concatenate, _split_in_three, is_lossless=True
    )


def _split_in_three(array: np.ndarray, parts: Arrays) -> Arrays:
    return np.array_split(array, len(parts))


def _is_flat(tensors: Tensors, parts: tuple[str, ...]) -> bool:
    return len(tensors[parts[0]].shape) == 1


def _as_images(parts: Arrays) -> np.ndarray:
    """A value a channel, to be multiplied with images of PyTorch's layout."""
    return parts[0].reshape(-1, 1, 1)


def _as_vector(array: np.ndarray, parts: Arrays) -> Arrays:
    return (array.reshape(-1),)


def _is_row(tensors: Tensors, parts: tuple[str, ...]) -> bool:
    """Whether it is one value a channel, to be multiplied with images whose channels come last."""
    shape = tensors[parts[0]].shape
    return len(shape) == 4 and shape[:3] == (1, 1, 1)


def _flat(parts: Arrays) -> np.ndarray:
    return parts[0].reshape(-1)


def _as_row(array: np.ndarray, parts: Arrays) -> Arrays:
    return (array.reshape(1, 1, 1, -1),)


def _is_pointwise(tensors: Tensors, parts: tuple[str, ...]) -> bool:
    """Whether it is the weight of a 1x1 convolution."""
    shape = tensors[parts[0]].shape
    return len(shape) == 4 and shape[2:] == (1, 1)


def _as_matrix(parts: Arrays) -> np.ndarray:
    return parts[0].reshape(parts[0].shape[:2])


def _as_pointwise(array: np.ndarray, parts: Arrays) -> Arrays:
    return (array[(..., *(np.newaxis,) * (4 - array.ndim))],)  # an empty one too, where the values are held elsewhere


def _is_weight(tensor: TorchTensor) -> bool:
    return tensor.dtype in WEIGHT_DTYPES


def _maskable(tensors: Tensors, parts: tuple[str, ...]) -> bool:
    """Whether all have the weight's shape, and none is complex."""
    real = all(tensors[part].dtype.kind != "c" for part in parts)
    return real and _is_weight(tensors[parts[0]]) and len({tensors[part].shape for part in parts}) == 1


def _masked(parts: Arrays) -> np.ndarray:
    weight, mask, *_ = parts
    return weight.astype(np.float64) * mask.astype(np.float64)


def _unmasked(array: np.ndarray, parts: Arrays) -> Arrays:
    """The mask opens where the tensor no longer is zero: what is written computes what was measured."""
    weight, mask, *others = parts
    new_mask = np.where((mask == 0) & (array != 0), 1, mask).astype(mask.dtype)
    divisor = np.where(new_mask == 0, 1, new_mask).astype(np.float64)
    return np.where(new_mask == 0, weight, array / divisor).astype(weight.dtype), new_mask, *others


def _normed(tensors: Tensors, parts: tuple[str, ...]) -> bool:
    """Whether the first is a length for each of the second's outputs."""
    lengths, directions = (tensors[part].shape for part in parts)
    weights = all(_is_weight(tensors[part]) for part in parts)
    return weights and len(directions) > 1 and lengths == (directions[0], *(1 for _ in directions[1:]))


def _lengths(directions: np.ndarray) -> np.ndarray:
    wide = directions.astype(np.float64)
    return np.sqrt(np.sum(wide**2, tuple(range(1, wide.ndim)), keepdims=True))


def _weight_normed(parts: Arrays) -> np.ndarray:
    lengths, directions = parts
    return directions.astype(np.float64) * (lengths.astype(np.float64) / _lengths(directions))


def _un_weight_normed(array: np.ndarray, parts: Arrays) -> Arrays:
    """An output that became zero keeps its direction, which has to have a length."""
    lengths = _lengths(array)
    return lengths, np.where(lengths == 0, parts[1], array)


def _spectral(tensors: Tensors, parts: tuple[str, ...]) -> bool:
    """Whether the vectors are of the sides of the weight as a matrix, and near its first singular ones.

    They are not where another axis than the first makes the rows, which sizes need not show.
    """
    weight, rows, columns = (tensors[part].shape for part in parts)
    weights = all(_is_weight(tensors[part]) for part in parts)
    if not weights or len(weight) < 2 or (rows, columns) != ((weight[0],), (int(np.prod(weight[1:])),)):
        return False
    matrix, left, right = (tensors[part].numpy() for part in parts)
    image = _image(matrix, right)
    return float(left.astype(np.float64) @ image) > ALIGNED * float(np.linalg.norm(left) * np.linalg.norm(image))


def _image(weight: np.ndarray, right: np.ndarray) -> np.ndarray:
    """What the weight as a matrix makes of a vector."""
    return weight.reshape(len(weight), -1).astype(np.float64) @ right.astype(np.float64)


def _largest_singular_value(weight: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    return float(left.astype(np.float64) @ _image(weight, right))


def _spectral_normed(parts: Arrays) -> np.ndarray:
    weight, left, right = parts
    return weight.astype(np.float64) / _largest_singular_value(weight, left, right)


def _un_spectral_normed(array: np.ndarray, parts: Arrays) -> Arrays:
    """The left vector is scaled so that what is divided by stays as it was: inference takes it as it is stored."""
    weight, left, right = parts
    scale = _largest_singular_value(weight, left, right)
    return array * scale, left / _largest_singular_value(array, left, right), right


def _same(tensors: Tensors, parts: tuple[str, ...]) -> bool:
    one, other = (tensors[part] for part in parts)
    same_kind = (one.shape, one.dtype) == (other.shape, other.dtype)
    return same_kind and one.numpy().tobytes() == other.numpy().tobytes()


TWIN = Form((), "", _same, lambda parts: parts[0], lambda array, parts: (array, array), is_lossless=True)
# MadryLab's robustness saves the network once more inside its attacker.
TWINS = {"attacker.model.": "model.", "attacker.normalize.": "normalizer."}


# BatchNorm of ANP and RNP: a neuron's mask scales its weight; the noise is of training alone.
NEURON_MASK = ("weight", "neuron_mask", "neuron_noise", "neuron_noise_bias")
CONVNEXT_BLOCK = r"(?:.+\.)?stages\.\d+\.blocks\.\d+\."  # timm's
FORMS = (
    *(
        _joined(what, leaf)
        for what in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
        for leaf in ("weight", "bias")
    ),
    # ConvNeXt's, of transformers and of timm.
    Form(("layer_scale_parameter",), "layer_scale", _is_flat, _as_images, _as_vector, is_lossless=True),
    Form(("gamma",), "gamma", _is_flat, _as_images, _as_vector, CONVNEXT_BLOCK, is_lossless=True),
    # The second ConvNeXt's, of transformers; and linear layers of timm's small ones.
    *(Form((f"grn.{leaf}",), f"grn.{leaf}", _is_row, _flat, _as_row, is_lossless=True) for leaf in ("weight", "bias")),
    *(
        Form((name,), name, _is_pointwise, _as_matrix, _as_pointwise, CONVNEXT_BLOCK, is_lossless=True)
        for name in ("mlp.fc1.weight", "mlp.fc2.weight")
    ),
    *(
        Form((f"{leaf}_orig", f"{leaf}_mask"), leaf, _maskable, _masked, _unmasked) for leaf in ("weight", "bias")
    ),  # torch.nn.utils.prune
    Form(NEURON_MASK, "weight", _maskable, _masked, _unmasked),
    Form(NEURON_MASK[:2], "weight", _maskable, _masked, _unmasked),
    *(
        Form(parts, "weight", _normed, _weight_normed, _un_weight_normed)
        for parts in (("weight_g", "weight_v"), tuple(f"parametrizations.weight.original{place}" for place in (0, 1)))
    ),
    *(
        Form(parts, "weight", _spectral, _spectral_normed, _un_spectral_normed)
        for parts in (
            ("weight_orig", "weight_u", "weight_v"),
            ("parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v"),
        )
    ),
)
