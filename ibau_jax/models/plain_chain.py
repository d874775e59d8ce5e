"""Plain chains that nobody registered: convolutions, BatchNorms and linear layers, one behind the other.

A state dict holds the layers with weights. What lies between them leaves no trace: padding, strides, pooling, where
ReLU stands. But the first linear layer's inputs say how many places the last maps have, and what people write is
regular, so that a few candidates are left, which clean images tell apart (`ibau_jax.checkpoints.variants`). Where a
layer of a Sequential is called by its number, the numbers also say how many layers without weights stand between two
of them.

Where the size of the images is not known, they are taken for squares of usual sizes.

Of several candidates the most usual one comes first (`ibau_jax.models.chain_candidates`); a chain's name is all of it
(`ibau_jax.models.chain_steps`).
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.chain_candidates import OTHER_SIZES, USUAL_SIZES, Skeleton, Weighted, candidates, ranked
from ibau_jax.models.chain_steps import LAYER, LONGEST_NAME, NAME, PlainChain, Step, are_names, parsed, places_after
from ibau_jax.models.registry import Architecture, Family, Shapes, register_family

MOST_LAYERS, MOST_TENSORS = 40, 400  # of a chain
LARGEST_KERNEL = 11
UNKNOWN = ImageSize(0, 0)
IMAGES, FLATTENED = "", "-flat"  # what no layer is called
STATISTICS = {"weight", "bias", "running_mean", "running_var"}


def _make(match: re.Match[str]) -> Architecture | None:
    steps = parsed(match) if len(match[0]) <= LONGEST_NAME else None
    if steps is None:
        return None
    channels, size = _image_of(match)
    if size.shortest() != match["size"]:
        return None
    last = next(step for step in reversed(steps) if step.name and step.kind != "norm")
    base, *others = candidates(_skeleton_of(channels, size, steps)) or (match[0],)
    convolutions = [step for step in steps if step.kind == "conv" and step.features]
    before = [channels, *(step.features for step in convolutions)]
    return Architecture(
        name=match[0],
        build=functools.partial(PlainChain, channels, steps),
        classifier=f"{last.name}.weight",
        image_sizes=(size,),
        landmarks={
            f"{step.name}.weight": (step.features, inputs, step.kernel, step.kernel)
            for step, inputs in zip(convolutions, before, strict=False)
        },
        channels=channels,
        variant_of=base if match[0] in others else None,
        is_guessed=True,
    )


def _image_of(match: re.Match[str]) -> tuple[int, ImageSize]:
    """The channels and the size of the images that a chain's name tells."""
    sides = tuple(map(int, match["size"].split("x")))
    return int(match["channels"]), ImageSize(sides[0], sides[-1])


def _skeleton_of(channels: int, size: ImageSize, steps: Sequence[Step]) -> Skeleton:
    """What a state dict of the chain shows; BatchNorms in front of which stands no layer with weights stand first."""
    layers, first_norm, flat_norm, behind_flat = list[Weighted](), "", "", False
    for step in steps:
        if step.kind == "flat":
            behind_flat = True
        elif step.kind == "norm" and not layers and not behind_flat:
            first_norm = step.name
        elif step.kind == "norm" and behind_flat and (not layers or layers[-1].step.kind == "conv"):
            flat_norm = step.name
        elif step.kind == "norm":
            layers[-1] = replace(layers[-1], norm=step.name)
        elif step.name:
            layers.append(Weighted(replace(step, stride=1, padding=0)))
    return Skeleton(channels, size, tuple(layers), places_after(steps, size), first_norm, flat_norm)


def _propose(shapes: Shapes) -> Iterator[str]:
    found = _read(shapes, None)
    if found is None:
        return
    sizes = (*USUAL_SIZES[found.channels], *OTHER_SIZES)
    if found.convolutions and found.places == 1:  # averaged: images of any size fit
        sizes = sizes[:1]
    bases = [of_size[0] for size in squares(*sizes) if (of_size := ranked(replace(found, size=size)))]
    yield from (name for _, name in sorted(bases, key=lambda one: one[0]))


def _propose_at(shapes: Shapes, size: ImageSize) -> Iterator[str]:
    found = _read(shapes, size)
    yield from (name for _, name in (ranked(found)[:1] if found else ()))


Modules = Mapping[str, Mapping[str, tuple[int, ...]]]  # the shapes of a layer's tensors, by the layer's name


def _read(shapes: Shapes, size: ImageSize | None) -> Skeleton | None:
    """What a state dict's names and shapes show, if they are all of a chain for images of this size, or of a square."""
    modules = _modules(shapes)
    kinds = {name: _kind(leaves) for name, leaves in modules.items()}
    weighted = {name: modules[name]["weight"] for name, kind in kinds.items() if kind in ("conv", "linear")}
    if None in kinds.values() or not 0 < len(weighted) <= MOST_LAYERS:
        return None
    ordered = dict(sorted(weighted.items(), key=lambda one: -len(one[1])))  # convolutions first
    place = _place_of(ordered, size)
    norms = _norms(modules, ordered, place[0]) if place else None
    if place is None or norms is None or not _may_classify(ordered, norms):
        return None
    last = next(reversed(ordered))
    layers = [Weighted(_without_place(name, modules[name], name == last), norms.get(name, "")) for name in ordered]
    return Skeleton(place[0], size or UNKNOWN, tuple(layers), place[1], norms.get(IMAGES, ""), norms.get(FLATTENED, ""))


def _modules(shapes: Shapes) -> Modules:
    """The layers of a state dict; none where it has too many tensors, or names that layers of a chain can't have.

    Nor where all names have one first part: what lies below that is looked at by itself.
    """
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items() if len(shapes) <= MOST_TENSORS else ():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = shape
    nested = len({name.partition(".")[0] for name in modules}) == 1 and any("." in name for name in modules)
    possible = all(re.fullmatch(LAYER, name) for name in modules) and are_names(list(modules))
    return modules if possible and not nested else {}


def _without_place(name: str, leaves: Mapping[str, tuple[int, ...]], classifies: bool) -> Step:
    """A layer as its tensors show it, without padding and stride."""
    features, _, *kernel = leaves["weight"]
    kind = "conv" if kernel else "linear"
    return Step(kind, name, 0 if classifies else features, kernel[0] if kernel else 0, bias="bias" in leaves)


def _kind(leaves: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which layer has these tensors; None where no chain has it."""
    weight = leaves.get("weight", ())
    if set(leaves) == STATISTICS:
        return "norm" if len(weight) == 1 and set(leaves.values()) == {weight} else None
    if not set(leaves) <= {"weight", "bias"} or leaves.get("bias", weight[:1]) != weight[:1] or 0 in weight:
        return None
    if len(weight) == 4:
        return "conv" if weight[2] == weight[3] <= LARGEST_KERNEL else None
    return "linear" if len(weight) == 2 else None


def _place_of(weighted: Shapes, size: ImageSize | None) -> tuple[int, int] | None:
    """The channels of the images and the places of the maps that the first linear layer reads, if each layer takes what
    the one before gives; the images' places where there is no convolution.
    """
    shapes = list(weighted.values())
    convolutions = [shape for shape in shapes if len(shape) == 4]
    linears = shapes[len(convolutions) :]
    joined = all(later[1] == before[0] for part in (convolutions, linears) for before, later in pairwise(part))
    if not joined or (convolutions and convolutions[0][1] not in USUAL_SIZES):
        return None
    possible = (
        [(convolutions[0][1], convolutions[-1][0])]
        if convolutions
        else [(channels, channels) for channels in USUAL_SIZES]
    )
    inputs = linears[0][1] if linears else convolutions[-1][0]
    for channels, maps in possible:
        places, rest = divmod(inputs, maps)
        square = math.isqrt(places) ** 2 == places
        if not rest and (square if size is None else convolutions or places == math.prod(size)):
            return channels, places
    return None


def _may_classify(weighted: Shapes, norms: Mapping[str, str]) -> bool:
    """Whether the last layer may be a classifier, as a convolution may that makes many features few."""
    *before, (last, shape) = weighted.items()
    return len(shape) == 2 or (bool(before) and last not in norms and 1 < shape[0] < shape[1])


def _norms(modules: Modules, weighted: Shapes, channels: int) -> dict[str, str] | None:
    """The BatchNorm of each layer's output by the layer's name; None where it can't be told.

    That of the images stands under `IMAGES`, that of what the first linear layer reads under `FLATTENED`.
    """
    width = {name: leaves["weight"][0] for name, leaves in modules.items() if name not in weighted}
    outputs = {name: shape[0] for name, shape in weighted.items()}
    linears = [name for name, shape in weighted.items() if len(shape) == 2]
    convolutions = [name for name in weighted if name not in linears]
    flat = {convolutions[-1]: weighted[linears[0]][1]} if linears and convolutions else {}

    def behind(names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, str] | None:
        """Each with the last layer before it."""
        found, last = dict[str, str](), IMAGES
        for name in names:
            if name in outputs:
                last = name
            elif sizes.get(last) == width[name] and last not in found:
                found[last] = name
            elif flat.get(last) == width[name] and FLATTENED not in found:
                found[FLATTENED] = name
            else:
                return None
        return found

    def together(layers: Sequence[str]) -> dict[str, str] | None:
        """Each with the layer of the same place among layers."""
        fits = [outputs[name] for name in layers] == list(width.values())
        return dict(zip(layers, width, strict=True)) if fits else None

    names = list(modules)
    ways = (
        behind(names, {**outputs, IMAGES: channels}),
        behind(names[::-1], outputs),  # in front of their layers
        together(convolutions),
        together(list(weighted)[:-1]),
        together(linears[:-1]),
    )
    return next((one for one in ways if one is not None), None)


def _relatives(name: str) -> tuple[str, ...]:
    """The candidates for a state dict of a chain's names and shapes, at the size of its images."""
    match = NAME.fullmatch(name)
    steps = parsed(match) if match else None
    return candidates(_skeleton_of(*_image_of(match), steps)) if match and steps else ()


EXAMPLE = "chain3x32-conv1=6_k5-relu-max2-flat-fc1=classes"
register_family(Family(NAME, EXAMPLE, _make, _propose, relatives=_relatives, propose_at=_propose_at))
