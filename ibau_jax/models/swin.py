"""Swin transformers (Liu et al., 2021) of any width, depth, patch and window.

Layers are named as torchvision names them; timm's are a spelling (`checkpoints.spellings`) of them, but for the last
layer, `head.fc`, by which a network of timm's is known: where windows do not divide a grid, torchvision pads it
before it is shifted, timm behind. They are the same for images of 224x224.

Shapes tell all sizes. Grids smaller than the window have smaller windows in timm's networks.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import Features, mlp
from ibau_jax.models.layers import (
    Identity,
    NamedSequential,
    Sequential,
    conv,
    global_average,
    layer_norm,
    linear,
    parameter,
)
from ibau_jax.models.registry import Architecture, Family, Shapes, from_torchvision, register_family
from ibau_jax.models.windows import (
    LARGEST_WINDOW,
    in_place,
    in_windows,
    relative_position_index,
    shifted_mask,
    table_size,
    window_side,
)

EPSILON = 1e-5  # of all normalisations
HEAD, PATCH, WINDOW = 32, 4, 7  # features of a head, sides of a patch in pixels and of a window in patches: the paper's
WIDEST, DEEPEST, LARGEST_PATCH = 4096, 64, 64
SIDES = (224, 384, 448, 256, 192, 128, 112, 96, 64, 56, 48, 32)

Windows = Float[Array, "n windows tokens width"]


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a network's tensors say.

    Attributes:
        width: features of a token in the first stage; each stage has twice those of the one before.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        windows: the sides of each stage's windows, in tokens.
        patch: the side of a patch, in pixels.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    patch: int = PATCH

    def fits(self) -> bool:
        """Whether there is such a network, of a reasonable size."""
        stages = len(self.depths)
        return (
            stages == len(self.heads) == len(self.windows)
            and 0 < self.width * 2 ** (stages - 1) <= WIDEST
            and 0 < self.patch <= LARGEST_PATCH
            and all(0 < depth <= DEEPEST for depth in self.depths)
            and all(heads and self.width * 2**stage % heads == 0 for stage, heads in enumerate(self.heads))
            and all(0 < window <= LARGEST_WINDOW for window in self.windows)
        )

    def sides(self) -> tuple[int, ...]:
        """Sides of images in whose grids each stage's window is the largest that fits, if there are any; else all."""
        stages, largest = range(len(self.depths)), max(self.windows)
        fitting = [
            side
            for side in SIDES
            if tuple(min(largest, side // (self.patch * 2**stage)) for stage in stages) == self.windows
        ]
        return tuple(fitting) or SIDES


# Width and depths.
NAMED: dict[str, tuple[int, tuple[int, ...]]] = {
    "t": (96, (2, 2, 6, 2)),
    "s": (96, (2, 2, 18, 2)),
    "b": (128, (2, 2, 18, 2)),
    "l": (192, (2, 2, 18, 2)),
}
IN_TORCHVISION = ("swin_t", "swin_s", "swin_b")
NUMBERS = r"\d{1,3}(?:_\d{1,3}){0,5}"
NAME = re.compile(
    rf"swin_(?:(?P<size>[tsbl])|w(?P<width>\d{{1,4}})_d(?P<depths>{NUMBERS}))(?:_h(?P<heads>{NUMBERS}))?"
    rf"(?:_p(?P<patch>\d{{1,2}}))?(?:_window(?P<windows>{NUMBERS}))?(?P<timm>_timm)?"
)


class WindowAttention(nnx.Module):
    """Attention of the tokens in each window, with a bias for how two lie to each other."""

    def __init__(self, width: int, heads: int, window: int, rngs: nnx.Rngs) -> None:
        self.qkv, self.proj = linear(width, 3 * width, rngs), linear(width, width, rngs)
        self.relative_position_bias_table = parameter((table_size(window), heads), rngs)
        self.window = window

    def __call__(self, x: Windows, mask: Float[Array, "windows tokens tokens"] | None) -> Windows:
        count, windows, tokens, width = x.shape
        table = self.relative_position_bias_table[...]
        heads = self.qkv(x).reshape(count, windows, tokens, 3, table.shape[1], -1)
        query, key, value = (heads[:, :, :, part] for part in range(3))
        logits = jnp.einsum("nwqhd,nwkhd->nwhqk", query * query.shape[-1] ** -0.5, key)
        logits += table[relative_position_index(self.window)].transpose(2, 0, 1)[None, None]
        if mask is not None:
            logits += mask[None, :, None]
        attended = jnp.einsum("nwhqk,nwkhd->nwqhd", jax.nn.softmax(logits), value)
        return self.proj(attended.reshape(count, windows, tokens, width))


class SwinBlock(nnx.Module):
    """Attention in windows and an MLP, each behind its normalisation and added.

    Args:
        width: features of a token.
        heads: of the attention.
        window: the side of a window.
        shifts: whether windows lie half a window further than those of the block before.
        pads_first: whether a grid is padded to whole windows before it is shifted.
        rngs: for the weights.
    """

    def __init__(self, width: int, heads: int, window: int, shifts: bool, pads_first: bool, rngs: nnx.Rngs) -> None:
        self.norm1, self.attn = layer_norm(width, rngs, EPSILON), WindowAttention(width, heads, window, rngs)
        self.norm2, self.mlp = layer_norm(width, rngs, EPSILON), mlp(width, 4 * width, rngs)
        self.window, self.shifts, self.pads_first = window, shifts, pads_first

    def __call__(self, x: Features) -> Features:
        x = x + self.attended(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attended(self, x: Features) -> Features:
        """The attention's output for the tokens of a grid."""
        window, (rows, columns) = self.window, x.shape[1:3]
        if self.shifts and not self.pads_first and min(rows, columns) <= window < max(rows, columns):
            raise ValueError(
                f"a grid of {rows}x{columns} tokens is one window of {window} high or wide; along the other side some "
                "versions of timm shift windows and some do not"
            )
        down, right = shift = tuple(window // 2 if self.shifts and extent > window else 0 for extent in (rows, columns))
        pads = [(0, 0), *((0, -extent % window) for extent in (rows, columns)), (0, 0)]
        x = jnp.pad(x, pads) if self.pads_first else x
        x = jnp.roll(x, (-down, -right), (1, 2))
        x = x if self.pads_first else jnp.pad(x, pads)
        grid = x.shape[1:3]
        mask = jnp.asarray(shifted_mask(grid, window, shift)) if any(shift) else None
        x = in_place(self.attn(in_windows(x, window), mask), grid, window)
        x = x if self.pads_first else x[:, :rows, :columns]
        return jnp.roll(x, shift, (1, 2))[:, :rows, :columns]


class PatchMerging(nnx.Module):
    """Four neighbours become one token of twice the features."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.reduction, self.norm = linear(4 * width, 2 * width, rngs, bias=False), layer_norm(4 * width, rngs, EPSILON)

    def __call__(self, x: Features) -> Features:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        neighbours = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        return self.reduction(self.norm(jnp.concatenate(neighbours, axis=-1)))


class SwinTransformer(nnx.Module):
    """Logits of RGB images of any size from one patch on."""

    def __init__(self, sizes: Sizes, timm: bool, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        width, patch = sizes.width, sizes.patch
        stem = [conv(3, width, patch, rngs, stride=patch, padding=0, bias=True), Identity()]  # PyTorch goes to NHWC
        layers: list[nnx.Module] = [Sequential([*stem, layer_norm(width, rngs, EPSILON)])]
        for stage, (depth, heads, window) in enumerate(zip(sizes.depths, sizes.heads, sizes.windows, strict=True)):
            if stage:
                layers.append(PatchMerging(width, rngs))
                width *= 2
            blocks = [SwinBlock(width, heads, window, index % 2 == 1, not timm, rngs) for index in range(depth)]
            layers.append(Sequential(blocks))
        self.features, self.norm = Sequential(layers), layer_norm(width, rngs, EPSILON)
        head = linear(width, num_classes, rngs)
        self.head = NamedSequential({"fc": head}) if timm else head

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.head(global_average(self.norm(self.features(x))))


def _standard_heads(width: int, stages: int) -> tuple[int, ...]:
    return tuple(width * 2**stage // HEAD for stage in range(stages))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("_")))


def _make(match: re.Match[str]) -> Architecture | None:
    width, depths = NAMED[match["size"]] if match["size"] else (int(match["width"]), _numbers(match["depths"]))
    heads = _numbers(match["heads"]) if match["heads"] else _standard_heads(width, len(depths))
    windows = _numbers(match["windows"] or str(WINDOW))
    windows = windows * len(depths) if len(windows) == 1 else windows
    sizes = Sizes(width, depths, heads, windows, int(match["patch"] or PATCH))
    if not sizes.fits():
        return None
    last = 2 * len(depths) - 1
    return Architecture(
        name=match[0],
        build=partial(SwinTransformer, sizes, bool(match["timm"])),
        classifier="head.fc.weight" if match["timm"] else "head.weight",
        image_sizes=squares(*sizes.sides()),
        landmarks={
            f"features.{last}.{depths[-1] - 1}.attn.relative_position_bias_table": (table_size(windows[-1]), heads[-1]),
            "features.0.0.weight": (width, 3, sizes.patch, sizes.patch),
        },
        torch_module=from_torchvision(match[0]) if match[0] in IN_TORCHVISION else None,
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    tables: dict[int, list[tuple[int, ...]]] = defaultdict(list)  # of each stage's blocks
    for name, shape in shapes.items():
        if match := re.fullmatch(r"features\.(\d{1,2})\.\d+\.attn\.relative_position_bias_table", name):
            tables[int(match[1])].append(shape)
    first, stem = [tables[stage][0] for stage in sorted(tables)], shapes.get("features.0.0.weight", ())
    if not first or len(stem) != 4 or any(len(table) != 2 for table in first):
        return
    windows = tuple(side for positions, _ in first if (side := window_side(positions)))
    depths, heads = (len(tables[stage]) for stage in sorted(tables)), (heads for _, heads in first)
    sizes = Sizes(stem[0], tuple(depths), tuple(heads), windows, stem[2])
    if sizes.fits():
        yield _name(sizes) + ("_timm" if "head.fc.weight" in shapes else "")


def _name(sizes: Sizes) -> str:
    size = next((name for name, known in NAMED.items() if known == (sizes.width, sizes.depths)), None)
    depths, heads = ("_".join(map(str, numbers)) for numbers in (sizes.depths, sizes.heads))
    windows = "_".join(map(str, sizes.windows if len(set(sizes.windows)) > 1 else sizes.windows[:1]))
    return "".join(
        (
            f"swin_{size}" if size else f"swin_w{sizes.width}_d{depths}",
            "" if sizes.heads == _standard_heads(sizes.width, len(sizes.depths)) else f"_h{heads}",
            "" if sizes.patch == PATCH else f"_p{sizes.patch}",
            "" if windows == str(WINDOW) else f"_window{windows}",
        )
    )


register_family(Family(NAME, "swin_t", _make, _propose))
