"""Which ResNet of `ibau_jax.models.resnet` a name means, and which a state dict is.

Names say the depth where it is one of `DEPTHS`, else the blocks of each stage: `resnet18_cifar_w16` has stages of 16,
32, 64 and 128 features, `resnet18_cifar_w16_32_48_64` has stages that do not double, `resnet_basic_1_2_2_1` six blocks,
`resnext50_32x4d` 32 groups of 4 features. timm's letters behind the depth say what the stem is and how projections
shrink (`DEEP_STEMS`).
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from ibau_jax.image_size import squares
from ibau_jax.models.blocks import RESNET_WIDTHS, stage_landmarks, stage_widths
from ibau_jax.models.registry import Architecture, Family, Shapes, from_torchvision, register, register_family
from ibau_jax.models.resnet import (
    CIFAR,
    CIFAR_64,
    TORCHVISION,
    TORCHVISION_SMALL,
    BasicBlock,
    Bottleneck,
    ResidualBlock,
    ResNet,
    Size,
    Style,
)
from ibau_jax.models.sizes import count_matching

KINDS: dict[str, type[ResidualBlock]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
DEPTHS: dict[int, tuple[str, tuple[int, ...]]] = {
    10: ("basic", (1, 1, 1, 1)),
    14: ("bottleneck", (1, 1, 1, 1)),
    18: ("basic", (2, 2, 2, 2)),
    26: ("bottleneck", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}
STYLES = {"": TORCHVISION, "_small_stem": TORCHVISION_SMALL, "_cifar": CIFAR, "_cifar_64": CIFAR_64}
# timm's letters behind the depth: features of the stem's convolutions, and whether projections pool.
DEEP_STEMS = {
    "c": ((32, 32, 64), False),
    "d": ((32, 32, 64), True),
    "s": ((64, 64, 128), False),
    "t": ((24, 32, 64), True),
}
# Of a style with max pooling and a stem of stride 2, of one without, of bottlenecks, and of the first against aliasing.
VARIANTS = (
    *("_no_pool", "_stride1", "_stride1_no_pool", "_max_pool", "_stride2", "_stride2_max_pool", "_v1"),
    *("_aa", "_blur"),
)
MOST_BLOCKS, WIDEST = 150, 8192
NAME = re.compile(
    r"(?P<wide>wide_)?(?P<squeezes>se)?resne(?P<grouped>x)?t"
    r"(?:(?P<depth>\d{2,3})|_(?P<kind>basic|bottleneck)(?P<blocks>(?:_\d{1,2}){4}))(?P<stem>[cdst])?"
    r"(?:_(?P<wider>\d{1,2})|_(?P<groups>\d{1,3})x(?P<of_group>\d{1,3})d)?"
    r"(?P<style>_small_stem|_cifar_64|_cifar)?(?:_w(?P<widths>\d{1,4}(?:(?:_\d{1,4}){3})?))?"
    rf"(?P<variant>{'|'.join(VARIANTS)})?"
)


def _size(match: re.Match[str]) -> Size | None:
    """The size that a name says; None where it says none, or too large a one."""
    kind, blocks = match["kind"], tuple(int(count) for count in (match["blocks"] or "").split("_")[1:])
    if match["depth"]:
        kind, blocks = DEPTHS.get(int(match["depth"]), ("", ()))
    size = Size(KINDS[kind], blocks, _widths(match["widths"])) if kind else None
    fits = size and all(size.blocks) and sum(size.blocks) <= MOST_BLOCKS and all(size.widths)
    return size if size and fits and max(size.widths) <= WIDEST else None


def _widths(said: str | None) -> tuple[int, ...]:
    """Features of the stages: as many as a name says, or what the first of them makes usual."""
    first, *others = map(int, said.split("_")) if said else RESNET_WIDTHS
    return (first, *others) if others else stage_widths(first)


def _style(match: re.Match[str], size: Size) -> Style | None:
    """The style that a name says, its bottlenecks' 3x3 convolutions as wide and in as many groups as it says."""
    groups = int(match["groups"] or 1)
    inner = groups * int(match["of_group"]) if match["groups"] else int(match["wider"] or 1) * size.width
    wider, remainder = divmod(inner, size.width)
    named = (bool(match["wide"]), bool(match["grouped"])) == (groups == 1 and wider > 1, groups > 1)
    if not named or remainder or not wider or (size.block is not Bottleneck and max(wider, groups) > 1):
        return None
    style = replace(STYLES[match["style"] or ""], wider=wider, groups=groups, squeezes=bool(match["squeezes"]))
    if not match["stem"]:
        return style
    deep_stem, pools_down = DEEP_STEMS[match["stem"]]
    return None if match["style"] else replace(style, deep_stem=deep_stem, pools_down=pools_down)


def _styles(style: Style, size: Size) -> dict[str, Style]:
    """The style, and what has its names: other strides and pooling in the stem, a bottleneck's stride as in v1, and
    timm's poolings against aliasing.
    """
    if style.grid_pool:
        return {"": style}
    other_stride, other_pool = 3 - style.stem_stride, not style.max_pool
    by_stride, by_pool = f"_stride{other_stride}", "_max_pool" if other_pool else "_no_pool"
    styles = {
        "": style,
        by_pool: replace(style, max_pool=other_pool),
        by_stride: replace(style, stem_stride=other_stride),
        by_stride + by_pool: replace(style, stem_stride=other_stride, max_pool=other_pool),
    }
    if size.block is Bottleneck:
        styles["_v1"] = replace(style, v1_stride=True)
    if style.max_pool:
        styles |= {"_aa": replace(style, halves_by="average"), "_blur": replace(style, halves_by="blur")}
    return styles


def _landmarks(style: Style, size: Size) -> dict[str, tuple[int, ...]]:
    inner, features = style.wider * size.width, style.stem_features(size.width)
    stem: dict[str, tuple[int, ...]] = (
        {"conv1.6.weight": (features, style.deep_stem[1], 3, 3)}
        if style.deep_stem
        else {"conv1.weight": (features, 3, style.kernel, style.kernel)}
    )
    return {
        **stem,
        "bn1.weight": (features,),
        **stage_landmarks(size.blocks, size.block.expansion, style.wider, size.widths, features),
        "layer1.0.conv2.weight": (inner, inner // style.groups, 3, 3),
    }


def _make(match: re.Match[str]) -> Architecture | None:
    size = _size(match)
    base = size and _style(match, size)
    variant = match["variant"] or ""
    style = _styles(base, size).get(variant) if size and base else None
    if not size or not style:
        return None
    return Architecture(
        name=match[0],
        build=partial(ResNet, style, size),
        classifier=f"{style.classifier}.weight",
        image_sizes=squares(224 if style.kernel == 7 else 64 if style.grid_pool else 32),
        landmarks=_landmarks(style, size),
        torch_module=from_torchvision(match[0]) if match[0] in IN_TORCHVISION else None,
        variant_of=match[0].removesuffix(variant) if variant else None,
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    blocks = tuple(count_matching(rf"layer{number}\.\d+\.conv2\.weight", shapes) for number in range(1, 5))
    kind = "bottleneck" if "layer1.0.conv3.weight" in shapes else "basic"
    last = "conv3" if kind == "bottleneck" else "conv2"
    ends = [shapes.get(f"layer{number}.0.{last}.weight", ()) for number in range(1, 5)]
    inner = shapes.get("layer1.0.conv2.weight", ())
    if not all(blocks) or not all(len(shape) == 4 and all(shape) for shape in (inner, *ends)):
        return
    widths = tuple(shape[0] // KINDS[kind].expansion for shape in ends)
    width = widths[0]
    network, within = _network_name(inner, width)
    squeezes = "se" if "layer1.0.se.fc1.weight" in shapes else ""
    layers = next((str(depth) for depth, known in DEPTHS.items() if known == (kind, blocks)), None)
    layers = layers or "_".join(("", kind, *map(str, blocks)))
    name = f"{squeezes}{network}{layers}{_stem_letter(shapes)}{within}{_style_suffix(shapes)}"
    name = f"wide_{name}" if within and network == "resnet" else name
    if widths != RESNET_WIDTHS:
        said = widths[:1] if widths == stage_widths(width) else widths
        name += "_w" + "_".join(map(str, said))
    yield name


def _network_name(inner: tuple[int, ...], width: int) -> tuple[str, str]:
    """What a name begins with, and what it says of a 3x3 convolution with a weight of this shape in the first stage."""
    features, groups = inner[0], inner[0] // inner[1]
    if groups > 1:
        return "resnext", f"_{groups}x{features // groups}d"
    return "resnet", f"_{features // width}" if features > width > 0 else ""


def _style_suffix(shapes: Shapes) -> str:
    """What a name says of the style that a state dict has."""
    if "layer2.0.shortcut.0.weight" in shapes:
        last = max(shapes.get("layer4.0.shortcut.1.weight", ()), default=0)
        return "_cifar_64" if max(shapes.get("linear.weight", ())[1:], default=0) > last > 0 else "_cifar"
    return "_small_stem" if shapes.get("conv1.weight", ())[2:] == (3, 3) else ""


def _stem_letter(shapes: Shapes) -> str:
    """The letter of the deep stem that a state dict has, if any."""
    features = tuple(max(shapes.get(f"{norm}.weight", ()), default=0) for norm in ("conv1.1", "conv1.4", "bn1"))
    stem = (features, "layer2.0.downsample.2.weight" in shapes)
    return next((letter for letter, known in DEEP_STEMS.items() if known == stem), "")


WIDER = ("wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")
PUBLISHED = tuple(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))
IN_TORCHVISION = (*WIDER, *PUBLISHED)
register_family(Family(NAME, "resnet18_cifar_w16", _make, _propose, VARIANTS))
for _name in (*WIDER, *(_depth + _suffix for _depth in PUBLISHED for _suffix in STYLES)):
    if (_match := NAME.fullmatch(_name)) and (_architecture := _make(_match)):
        register(_architecture)
