"""Vision transformers (Dosovitskiy et al., 2021; DeiT, Touvron et al., 2021) of any width, depth and patch.

A distilled DeiT (`vit_s_16_distilled`) has a second token that learns from a teacher, and a second classifier for it;
transformers' DeiT has that token without a classifier, unless it is for training (`vit_s_16_dist_token`). The blocks of
a DeiT III (Touvron et al., 2022) scale what they add, and its class token has no position (`vit_s_16_deit3`); with one,
it is `vit_s_16_layer_scale`.

Layers are named as torchvision names them; timm's and DeiT's are spellings of them (`checkpoints.spellings`). A state
dict does not tell the number of heads: each has 64 features, as all published sizes but ViT-H have. ViT-B/16 is met
behind a resize to 224x224 too, `torch.nn.Sequential(Resize((224, 224)), vit)`, as BackdoorBench has it: the names then
begin with `1.`.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import mlp
from ibau_jax.models.layers import Identity, NamedSequential, Resize, Sequential, conv, layer_norm, linear, parameter
from ibau_jax.models.registry import Architecture, Family, Shapes, from_torchvision, register, register_family
from ibau_jax.models.sizes import count_matching

if TYPE_CHECKING:
    import torch

RESIZED = 224
HEAD = 64  # features of a head
WIDEST, DEEPEST, LARGEST_PATCH = 4096, 36, 64
SIDES = (RESIZED, 384, 512, 518, 448, 336, 256, 128, 96, 64, 48, 32)  # of images, the common ones first


@dataclass(frozen=True)
class Sizes:
    """Features of a token, blocks, and the side of a patch in pixels."""

    width: int
    depth: int
    patch: int

    @property
    def heads(self) -> int:
        """Attention heads: 16 in ViT-H."""
        return 16 if self.width == 1280 else self.width // HEAD

    @property
    def is_reasonable(self) -> bool:
        """Whether there may be a network of these sizes."""
        return 0 < self.width <= WIDEST and 0 < self.depth <= DEEPEST and 0 < self.patch <= LARGEST_PATCH


BASE_16 = Sizes(768, 12, 16)
NAMED = {"ti": (192, 12), "s": (384, 12), "b": (768, 12), "l": (1024, 24), "h": (1280, 32)}  # width and depth
IN_TORCHVISION = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
NAME = re.compile(
    r"vit_(?:(?P<size>ti|s|b|l|h)_(?P<p>\d{1,2})|w(?P<width>\d{1,4})_d(?P<depth>\d{1,2})_p(?P<patch>\d{1,2}))"
    r"(?P<kind>_distilled|_dist_token|_layer_scale|_deit3)?"
)

Tokens = Float[Array, "n tokens width"]


class SelfAttention(nnx.Module):
    """`torch.nn.MultiheadAttention` of the tokens with themselves; queries, keys and values share `in_proj_weight`."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.in_proj_weight = parameter((3 * width, width), rngs)
        self.in_proj_bias = parameter((3 * width,), rngs)
        self.out_proj, self.heads = linear(width, width, rngs), heads

    def __call__(self, x: Tokens) -> Tokens:
        # The same contraction as nnx.Linear's, so that jax's matmul precision holds for both.
        projected = jnp.einsum("nti,oi->nto", x, self.in_proj_weight[...]) + self.in_proj_bias[...].reshape(1, 1, -1)
        heads = projected.reshape(*x.shape[:2], 3, self.heads, x.shape[2] // self.heads)
        query, key, value = (heads[:, :, part] for part in range(3))
        attended = jax.nn.dot_product_attention(query, key, value)
        return self.out_proj(attended.reshape(x.shape))


class LayerScale(nnx.Module):
    """A factor for each feature."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.gamma = parameter((width,), rngs)

    def __call__(self, x: Tokens) -> Tokens:
        return x * self.gamma.reshape(1, 1, -1)


class EncoderBlock(nnx.Module):
    """Attention and an MLP, each behind its normalisation, scaled feature by feature if `scales`, and added."""

    def __init__(self, sizes: Sizes, scales: bool, rngs: nnx.Rngs) -> None:
        width = sizes.width
        self.ls1, self.ls2 = (LayerScale(width, rngs) if scales else Identity() for _ in range(2))
        self.ln_1, self.self_attention = layer_norm(width, rngs), SelfAttention(width, sizes.heads, rngs)
        self.ln_2, self.mlp = layer_norm(width, rngs), mlp(width, 4 * width, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.ls1(self.self_attention(self.ln_1(x)))
        return x + self.ls2(self.mlp(self.ln_2(x)))


class Encoder(nnx.Module):
    """Positions of the last `tokens` tokens, blocks, a last normalisation."""

    def __init__(self, sizes: Sizes, tokens: int, scales: bool, rngs: nnx.Rngs) -> None:
        self.pos_embedding = parameter((1, tokens, sizes.width), rngs)
        blocks = {f"encoder_layer_{index}": EncoderBlock(sizes, scales, rngs) for index in range(sizes.depth)}
        self.layers = NamedSequential(blocks)
        self.ln = layer_norm(sizes.width, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        without = x.shape[1] - self.pos_embedding.shape[1]
        return self.ln(self.layers(x + jnp.pad(self.pos_embedding[...], ((0, 0), (without, 0), (0, 0)))))


class VisionTransformer(nnx.Module):
    """Logits of RGB images of exactly `image_size`, a multiple of the patch.

    Args:
        sizes: of the network.
        num_classes: of the classifier.
        image_size: height and width of the images.
        rngs: for the weights.
        placed_tokens: how many tokens beside the patches have a position.
        scales: whether blocks scale what they add, feature by feature.
    """

    def __init__(
        self,
        sizes: Sizes,
        num_classes: int,
        image_size: ImageSize,
        rngs: nnx.Rngs,
        *,
        placed_tokens: int = 1,
        scales: bool = False,
    ) -> None:
        width, patch = sizes.width, sizes.patch
        self.conv_proj = conv(3, width, patch, rngs, stride=patch, padding=0, bias=True)
        self.class_token = parameter((1, 1, width), rngs)
        self.encoder = Encoder(sizes, placed_tokens + image_size.places(lambda side: side // patch), scales, rngs)
        self.heads = NamedSequential({"head": linear(width, num_classes, rngs)})

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.heads(self.encoded(x, self.class_token)[:, 0])

    def encoded(self, x: Float[Array, "n h w 3"], *own: nnx.Param) -> Tokens:
        """What the encoder makes of an image's patches behind the network's own tokens."""
        patches = self.conv_proj(x)
        patches = patches.reshape(x.shape[0], -1, patches.shape[3])
        tokens = [jnp.broadcast_to(token[...], (x.shape[0], 1, patches.shape[2])) for token in own]
        return self.encoder(jnp.concatenate([*tokens, patches], axis=1))


class TwoTokenVisionTransformer(VisionTransformer):
    """A DeiT whose distillation token takes part in attention, but is not classified."""

    def __init__(self, sizes: Sizes, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        super().__init__(sizes, num_classes, image_size, rngs, placed_tokens=2)
        self.dist_token = parameter((1, 1, sizes.width), rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        return self.heads(self.encoded(x, self.class_token, self.dist_token)[:, 0])


class DistilledVisionTransformer(TwoTokenVisionTransformer):
    """A distilled DeiT: the mean of two classifiers' logits, of the class token and of the distillation token."""

    def __init__(self, sizes: Sizes, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        super().__init__(sizes, num_classes, image_size, rngs)
        self.head_dist = linear(sizes.width, num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        encoded = self.encoded(x, self.class_token, self.dist_token)
        return (self.heads(encoded[:, 0]) + self.head_dist(encoded[:, 1])) / 2


def resized_vit(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> Sequential:
    """`Resize((224, 224))` and ViT-B/16: logits of RGB images of any size."""
    return Sequential([Resize(RESIZED), VisionTransformer(BASE_16, num_classes, ImageSize(RESIZED, RESIZED), rngs)])


def resized_torch_module(num_classes: int) -> "torch.nn.Module":
    """The same in PyTorch. Needs torch and torchvision."""
    import torch
    from torchvision import transforms

    resize: torch.nn.Module = transforms.Resize((RESIZED, RESIZED))
    return torch.nn.Sequential(resize, from_torchvision("vit_b_16")(num_classes))


def _landmarks(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The patches' projection, and what the last block ends with."""
    last = f"encoder.layers.encoder_layer_{sizes.depth - 1}.mlp.3.weight"
    return {
        last: (sizes.width, 4 * sizes.width),
        "conv_proj.weight": (sizes.width, 3, sizes.patch, sizes.patch),
    }


# By what a name ends with.
KINDS: dict[str, Callable[[Sizes, int, ImageSize, nnx.Rngs], VisionTransformer]] = {
    "": VisionTransformer,
    "_dist_token": TwoTokenVisionTransformer,
    "_distilled": DistilledVisionTransformer,
    "_layer_scale": partial(VisionTransformer, scales=True),
    "_deit3": partial(VisionTransformer, placed_tokens=0, scales=True),
}
TWO_TOKENS = ("_dist_token", "_distilled")


def _architecture(name: str, sizes: Sizes, kind: str = "") -> Architecture:
    return Architecture(
        name=name,
        build=partial(KINDS[kind], sizes),
        classifier="heads.head.weight",
        image_sizes=squares(*(side for side in SIDES if side % sizes.patch == 0)),
        landmarks=_landmarks(sizes) | ({"dist_token": (1, 1, sizes.width)} if kind in TWO_TOKENS else {}),
        torch_module=from_torchvision(name) if name in IN_TORCHVISION else None,
    )


def _make(match: re.Match[str]) -> Architecture | None:
    if match["size"]:
        sizes = Sizes(*NAMED[match["size"]], int(match["p"]))
    else:
        sizes = Sizes(*(int(match[part]) for part in ("width", "depth", "patch")))
    if not sizes.is_reasonable or not sizes.heads or sizes.width % sizes.heads:
        return None
    made = _architecture(match[0], sizes, match["kind"] or "")
    return made if made.image_sizes else None


def _propose(shapes: Shapes) -> Iterator[str]:
    depth = count_matching(r"encoder\.layers\.encoder_layer_\d+\.ln_1\.weight", shapes)
    stem = shapes.get("conv_proj.weight", ())
    if not depth or len(stem) != 4:
        return
    sizes = Sizes(stem[0], depth, stem[2])
    size = next((name for name, known in NAMED.items() if known == (sizes.width, depth)), None)
    name = f"vit_{size}_{sizes.patch}" if size else f"vit_w{sizes.width}_d{depth}_p{sizes.patch}"
    yield name + _kind(shapes)


def _kind(shapes: Shapes) -> str:
    """Which of `KINDS` a state dict is of."""
    if "dist_token" in shapes:
        return "_distilled" if "head_dist.weight" in shapes else "_dist_token"
    if "encoder.layers.encoder_layer_0.ls1.gamma" not in shapes:
        return ""
    tokens = math.prod(shapes.get("encoder.pos_embedding", ())[1:2])
    return "_deit3" if math.isqrt(tokens) ** 2 == tokens else "_layer_scale"


register(_architecture("vit_b_16", BASE_16))
register(
    Architecture(
        name="vit_b_16_resized",
        build=resized_vit,
        classifier="1.heads.head.weight",
        landmarks={f"1.{name}": shape for name, shape in _landmarks(BASE_16).items()},
        torch_module=resized_torch_module,
    )
)
register_family(Family(NAME, "vit_s_16", _make, _propose))
