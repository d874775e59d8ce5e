"""The layers of a plain chain, and its name, which is all of it, layer by layer.

Anyone can write one, also for a network that is not among the candidates (`ibau_jax.models.plain_chain`):

    chain1x28-conv1=6_k5_p2-relu-max2-conv2=16_k5-relu-max2-flat-fc1=120-relu-fc2=classes

is of images with one channel, 28 pixels high and wide; `chain1x24x32-` begins the name of one for images 24 pixels high
and 32 wide. `NAME=FEATURES` is a layer with weights, called NAME in the state dict: a convolution where it has a kernel
(`_k`), with a stride (`_s`), padding (`_p`) and `_nobias` where these are not 1, 0 and a bias; else a linear layer.
`NAME=norm` is BatchNorm. Between them stand activations (`relu`, `tanh`, ...), `max2` or `max3_s2_p1` (size, stride,
padding), `avg2`, `mean1` (adaptive average pooling to 1x1), `flat`.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flax import nnx
from jax.nn import sigmoid
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.alterations import ACTIVATIONS
from ibau_jax.models.layers import (
    Activation,
    AdaptiveAvgPool,
    AvgPool,
    Flatten,
    Function,
    MaxPool,
    apply_in_order,
    batch_norm,
    conv,
    linear,
)

LONGEST_NAME = 1000  # characters
FUNCTIONS: dict[str, Function] = {**ACTIVATIONS, "sigmoid": sigmoid}
PART = r"[A-Za-z0-9_]{1,60}"
LAYER = rf"{PART}(\.{PART}){{0,8}}"  # what a layer with weights may be called
NAME = re.compile(
    r"chain(?P<channels>[13])x(?P<size>[1-9]\d{0,3}(x[1-9]\d{0,3})?)(?P<steps>(-[A-Za-z0-9_.=]{1,200}){2,200})"
)
WEIGHTS = re.compile(
    rf"(?P<name>{LAYER})="
    r"(norm|(?P<features>\d{1,5}|classes)(_k(?P<kernel>\d{1,2}))?(_s(?P<stride>\d))?(_p(?P<padding>\d))?(?P<nobias>_nobias)?)"
)
POOLING = re.compile(r"(?P<kind>max|avg|mean)(?P<kernel>[1-9]\d?)(_s(?P<stride>[1-9]))?(_p(?P<padding>\d))?")


@dataclass(frozen=True)
class Step:
    """A layer of a chain.

    Attributes:
        kind: conv, norm, linear, max, avg, mean, flat, or an activation's name.
        name: what the state dict calls it; empty without weights.
        features: of its output, 0 for the number of classes; of a layer with weights.
        kernel, stride, padding: of a convolution or a pooling; stride 0 is the pooling's size.
        bias: whether it has one.
    """

    kind: str
    name: str = ""
    features: int = 0
    kernel: int = 0
    stride: int = 1
    padding: int = 0
    bias: bool = True

    def __str__(self) -> str:
        padding = f"_p{self.padding}" if self.padding else ""
        if self.kind in ("max", "avg", "mean"):
            return f"{self.kind}{self.kernel}{f'_s{self.stride}' if self.stride else ''}{padding}"
        if not self.name:
            return self.kind
        if self.kind == "norm":
            return f"{self.name}=norm"
        kernel = f"_k{self.kernel}" if self.kernel else ""
        stride = f"_s{self.stride}" if self.stride > 1 else ""
        return f"{self.name}={self.features or 'classes'}{kernel}{stride}{padding}{'' if self.bias else '_nobias'}"

    def side_after(self, side: int) -> int:
        """The height and width of its output's maps, of which 0 says that the input's are too small."""
        if self.kind == "mean":
            return self.kernel if side else 0
        if not self.kernel or not side:
            return side
        return max(0, (side + 2 * self.padding - self.kernel) // (self.stride or self.kernel) + 1)


def places_after(steps: Sequence[Step], image_size: ImageSize) -> int:
    """How many places the maps have that the steps make of an image; 0 where it is too small."""
    return image_size.places(lambda side: functools.reduce(lambda before, step: step.side_after(before), steps, side))


RELU, FLAT, MAX2, MEAN = Step("relu"), Step("flat"), Step("max", kernel=2, stride=0), Step("mean", kernel=1, stride=0)


class Place(nnx.Module):
    """Holds layers under the names that a state dict has for them."""

    def put(self, path: Sequence[str], layer: nnx.Module) -> None:
        """Puts a layer where its name says."""
        place = self
        for part in path[:-1]:
            if not hasattr(place, part):
                setattr(place, part, Place())
            place = getattr(place, part)
        setattr(place, path[-1], layer)

    def get(self, path: Sequence[str]) -> nnx.Module:
        """The layer of a name."""
        layer: nnx.Module = functools.reduce(getattr, path, self)
        return layer


class PlainChain(Place):
    """Logits of images of the size that the chain is for."""

    def __init__(
        self, channels: int, steps: Sequence[Step], num_classes: int, image_size: ImageSize, rngs: nnx.Rngs
    ) -> None:
        self.steps = tuple(_paths(steps))
        places = places_after(steps, image_size)
        features = channels if places else 0  # the shapes of no state dict, where images are too small
        for path, step in zip(self.steps, steps, strict=True):
            self.put(path, _layer(step, features, num_classes, rngs))
            features = features * places if step.kind == "flat" else features
            if step.name and step.kind != "norm":
                features = step.features or num_classes

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        return apply_in_order([self.get(path) for path in self.steps], x)


RESERVED = {"steps", *dir(PlainChain)}  # what no layer can be called


def _paths(steps: Sequence[Step]) -> Iterator[tuple[str, ...]]:
    """Where each layer is. One without weights has a name that no layer of a state dict has."""
    behind, count = "", 0
    for step in steps:
        if step.name:
            behind, count = step.name, 0
            yield tuple(step.name.split("."))
            continue
        count += 1
        *parents, last = behind.split(".")
        yield (*parents, f"{last}-{count}{step.kind}")


def _layer(step: Step, features: int, num_classes: int, rngs: nnx.Rngs) -> nnx.Module:
    out = step.features or num_classes
    match step.kind:
        case "conv":
            sizes = {"stride": step.stride, "padding": step.padding}
            return conv(features, out, step.kernel, rngs, **sizes, bias=step.bias)
        case "linear":
            return linear(features, out, rngs, bias=step.bias)
        case "norm":
            return batch_norm(features, rngs)
        case "max":
            return MaxPool(step.kernel, step.stride or None, step.padding)
        case "avg":
            return AvgPool(step.kernel, step.stride or None, step.padding)
        case "mean":
            return AdaptiveAvgPool(step.kernel)
        case "flat":
            return Flatten()
    return Activation(FUNCTIONS[step.kind])


def chain_name(channels: int, size: ImageSize, steps: Sequence[Step]) -> str:
    """The name of a chain, which is all of it."""
    return "-".join((f"chain{channels}x{size.shortest()}", *map(str, steps)))


def parsed(match: re.Match[str]) -> tuple[Step, ...] | None:
    """The layers that a name tells; None where they make no chain."""
    steps = tuple(map(_step, match["steps"].removeprefix("-").split("-")))
    if not all(steps):
        return None
    chain = [step for step in steps if step]
    names = [step.name for step in chain if step.name]
    weighted = [step for step in chain if step.name and step.kind != "norm"]
    kinds = [step.kind for step in chain]
    if not weighted or not are_names(names) or kinds.count("flat") != 1:
        return None
    flat = kinds.index("flat")
    ordered = all((step.kind in ("conv", "max", "avg", "mean")) <= (place < flat) for place, step in enumerate(chain))
    ordered = ordered and all((step.kind == "linear") <= (place > flat) for place, step in enumerate(chain))
    classified = [step.features == 0 for step in weighted] == [False] * (len(weighted) - 1) + [True]
    return tuple(chain) if ordered and classified else None


def _step(token: str) -> Step | None:
    if token == "flat" or token in FUNCTIONS:
        return Step(token)
    if match := POOLING.fullmatch(token):
        stride, padding = int(match["stride"] or 0), int(match["padding"] or 0)
        plain = match["kind"] != "mean" or not (stride or padding)
        return Step(match["kind"], "", 0, int(match["kernel"]), stride, padding) if plain else None
    match = WEIGHTS.fullmatch(token)
    if match is None:
        return None
    if match["features"] is None:
        return Step("norm", match["name"])
    features = 0 if match["features"] == "classes" else int(match["features"])
    kernel, stride, padding = int(match["kernel"] or 0), int(match["stride"] or 1), int(match["padding"] or 0)
    possible = (features or match["features"] == "classes") and stride and (kernel or (stride, padding) == (1, 0))
    step = Step("conv" if kernel else "linear", match["name"], features, kernel, stride, padding, not match["nobias"])
    return step if possible else None


def are_names(names: Sequence[str]) -> bool:
    """Whether layers can have these names, all of them together."""
    parts = {part for name in names for part in name.split(".")}
    inside = {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}
    return len(set(names)) == len(names) and not inside & set(names) and not parts & RESERVED
