"""CaiT (Touvron et al., 2021) of any width, depth, heads and patch, as timm and its authors name it.

Heads talk to each other before and behind the softmax (Shazeer et al., 2020), and the class token comes in with the
last few blocks, which leave the patches as they are.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import named_mlp
from ibau_jax.models.layers import NamedSequential, Sequential, conv, layer_norm, linear, parameter
from ibau_jax.models.registry import Architecture, Family, Shapes, register_family
from ibau_jax.models.sizes import count_matching
from ibau_jax.models.vit import DEEPEST, LARGEST_PATCH, SIDES, WIDEST, Tokens

HEAD, PATCH, CLASS_BLOCKS = 48, 16, 2  # features of a head, side of a patch, blocks of the class token: the paper's


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a network's tensors say.

    Attributes:
        width: features of a token.
        depth: blocks of the patches.
        class_depth: blocks of the class token.
        heads: of each attention.
        patch: the side of a patch, in pixels.
    """

    width: int
    depth: int
    class_depth: int
    heads: int
    patch: int

    @property
    def is_reasonable(self) -> bool:
        """Whether there may be a network of these sizes."""
        depths = (self.depth, self.class_depth)
        return (
            0 < self.width <= WIDEST
            and all(0 < depth <= 2 * DEEPEST for depth in depths)
            and 0 < self.heads <= self.width
            and self.width % self.heads == 0
            and 0 < self.patch <= LARGEST_PATCH
        )


# Width and depth.
NAMED = {
    "xxs24": (192, 24),
    "xxs36": (192, 36),
    "xs24": (288, 24),
    "s24": (384, 24),
    "s36": (384, 36),
    "m36": (768, 36),
    "m48": (768, 48),
}
NAME = re.compile(
    rf"cait_(?:(?P<size>{'|'.join(NAMED)})|w(?P<width>\d{{1,4}})_d(?P<depth>\d{{1,2}}))"
    r"(?:_c(?P<class>\d{1,2}))?(?:_h(?P<heads>\d{1,3}))?(?:_p(?P<patch>\d{1,2}))?"
)


class TalkingHeads(nnx.Module):
    """Attention of the patches with themselves, its heads mixed before and behind the softmax."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.qkv, self.proj = linear(width, 3 * width, rngs), linear(width, width, rngs)
        self.proj_l, self.proj_w = linear(heads, heads, rngs), linear(heads, heads, rngs)
        self.heads = heads

    def __call__(self, x: Tokens) -> Tokens:
        heads = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        query, key, value = (heads[:, :, part] for part in range(3))
        logits = jnp.einsum("nqhd,nkhd->nqkh", query * query.shape[-1] ** -0.5, key)
        weights = self.proj_w(jax.nn.softmax(self.proj_l(logits), axis=2))
        return self.proj(jnp.einsum("nqkh,nkhd->nqhd", weights, value).reshape(x.shape))


class ClassAttention(nnx.Module):
    """Attention of the first token, the class's, with all of them."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.q, self.k, self.v = (linear(width, width, rngs) for _ in range(3))
        self.proj, self.heads = linear(width, width, rngs), heads

    def __call__(self, x: Tokens) -> Float[Array, "n 1 width"]:
        query, key, value = (
            projected.reshape(*projected.shape[:2], self.heads, -1)
            for projected in (self.q(x[:, :1]), self.k(x), self.v(x))
        )
        return self.proj(jax.nn.dot_product_attention(query, key, value).reshape(x.shape[0], 1, -1))


class CaiTBlock(nnx.Module):
    """Attention and an MLP, each behind its normalisation, scaled feature by feature and added."""

    def __init__(self, attention: type[TalkingHeads] | type[ClassAttention], sizes: Sizes, rngs: nnx.Rngs) -> None:
        width = sizes.width
        self.norm1, self.attn = layer_norm(width, rngs), attention(width, sizes.heads, rngs)
        self.norm2, self.mlp = layer_norm(width, rngs), named_mlp(width, 4 * width, rngs)
        self.gamma_1, self.gamma_2 = parameter((width,), rngs), parameter((width,), rngs)

    def __call__(self, x: Tokens, patches: Tokens | None = None) -> Tokens:
        """The tokens behind the block; those of `patches` take part behind them, and stay as they are."""
        seen = x if patches is None else jnp.concatenate([x, patches], axis=1)
        x = x + self.gamma_1.reshape(1, 1, -1) * self.attn(self.norm1(seen))
        return x + self.gamma_2.reshape(1, 1, -1) * self.mlp(self.norm2(x))


class CaiT(nnx.Module):
    """Logits of RGB images of exactly `image_size`, a multiple of the patch."""

    def __init__(self, sizes: Sizes, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        width, patch = sizes.width, sizes.patch
        self.patch_embed = NamedSequential({"proj": conv(3, width, patch, rngs, stride=patch, padding=0, bias=True)})
        self.cls_token = parameter((1, 1, width), rngs)
        self.pos_embed = parameter((1, image_size.places(lambda side: side // patch), width), rngs)
        self.blocks = Sequential([CaiTBlock(TalkingHeads, sizes, rngs) for _ in range(sizes.depth)])
        self.blocks_token_only = nnx.List([CaiTBlock(ClassAttention, sizes, rngs) for _ in range(sizes.class_depth)])
        self.norm, self.head = layer_norm(width, rngs), linear(width, num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        patches = self.patch_embed(x)
        patches = self.blocks(patches.reshape(x.shape[0], -1, patches.shape[3]) + self.pos_embed[...])
        token = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, patches.shape[2]))
        for block in self.blocks_token_only:
            token = block(token, patches)
        return self.head(self.norm(token)[:, 0])


def _make(match: re.Match[str]) -> Architecture | None:
    width, depth = NAMED[match["size"]] if match["size"] else (int(match["width"]), int(match["depth"]))
    heads = int(match["heads"] or width // HEAD)
    sizes = Sizes(width, depth, int(match["class"] or CLASS_BLOCKS), heads, int(match["patch"] or PATCH))
    sides = tuple(side for side in SIDES if sizes.is_reasonable and side % sizes.patch == 0)
    if not sides:
        return None
    return Architecture(
        name=match[0],
        build=partial(CaiT, sizes),
        classifier="head.weight",
        image_sizes=squares(*sides),
        landmarks={
            f"blocks.{depth - 1}.attn.proj_l.weight": (heads, heads),
            f"blocks_token_only.{sizes.class_depth - 1}.gamma_1": (width,),
            "patch_embed.proj.weight": (width, 3, sizes.patch, sizes.patch),
        },
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    depth = count_matching(r"blocks\.\d+\.attn\.proj_l\.weight", shapes)
    class_depth = count_matching(r"blocks_token_only\.\d+\.gamma_1", shapes)
    stem, talk = (shapes.get(name, ()) for name in ("patch_embed.proj.weight", "blocks.0.attn.proj_l.weight"))
    if not depth or not class_depth or len(stem) != 4 or not talk:
        return
    width, heads, patch = stem[0], talk[0], stem[2]
    size = next((name for name, known in NAMED.items() if known == (width, depth)), None)
    yield "".join(
        (
            f"cait_{size or f'w{width}_d{depth}'}",
            "" if class_depth == CLASS_BLOCKS else f"_c{class_depth}",
            "" if heads == width // HEAD else f"_h{heads}",
            "" if patch == PATCH else f"_p{patch}",
        )
    )


register_family(Family(NAME, "cait_xxs24", _make, _propose))
