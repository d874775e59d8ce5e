"""Networks of tokens without attention, of any width, depth and patch, as timm names them.

MLP-Mixer (Tolstikhin et al., 2021) mixes tokens by an MLP of half as many hidden features as a token has, ResMLP
(Touvron et al., 2021) by one linear layer.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize, squares
from ibau_jax.models.blocks import named_mlp
from ibau_jax.models.layers import NamedSequential, Sequential, conv, layer_norm, linear, parameter
from ibau_jax.models.registry import Architecture, Family, Shapes, register_family
from ibau_jax.models.sizes import count_matching
from ibau_jax.models.vit import SIDES, Sizes, Tokens

# Width, depth and patch of published ones; the patch of the others stands in their names.
MIXERS = {"s": (512, 8), "b": (768, 12), "l": (1024, 24)}
RESMLPS = {"12": (384, 12, 16), "24": (384, 24, 16), "36": (384, 36, 16), "big_24": (768, 24, 8)}
SIZES = r"w(?P<width>\d{1,4})_d(?P<depth>\d{1,2})_p(?P<patch>\d{1,2})"
NAME = re.compile(
    rf"mixer_(?P<mixer>[sbl])_(?P<p>\d{{1,2}})|resmlp_(?P<resmlp>{'|'.join(RESMLPS)})|(?P<kind>mixer|resmlp)_{SIZES}"
)


class MixerBlock(nnx.Module):
    """An MLP along the tokens and one along their features, each behind its normalisation and added."""

    def __init__(self, sizes: Sizes, tokens: int, rngs: nnx.Rngs) -> None:
        width = sizes.width
        self.norm1, self.mlp_tokens = layer_norm(width, rngs), named_mlp(tokens, width // 2, rngs)
        self.norm2, self.mlp_channels = layer_norm(width, rngs), named_mlp(width, 4 * width, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.mlp_tokens(self.norm1(x).transpose(0, 2, 1)).transpose(0, 2, 1)
        return x + self.mlp_channels(self.norm2(x))


class Affine(nnx.Module):
    """A factor and a shift for each feature, in a normalisation's place."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.alpha, self.beta = parameter((1, 1, width), rngs), parameter((1, 1, width), rngs)

    def __call__(self, x: Tokens) -> Tokens:
        return self.alpha[...] * x + self.beta[...]


class ResMLPBlock(nnx.Module):
    """A linear layer along the tokens and an MLP along their features, each scaled feature by feature and added."""

    def __init__(self, sizes: Sizes, tokens: int, rngs: nnx.Rngs) -> None:
        width = sizes.width
        self.norm1, self.linear_tokens = Affine(width, rngs), linear(tokens, tokens, rngs)
        self.norm2, self.mlp_channels = Affine(width, rngs), named_mlp(width, 4 * width, rngs)
        self.ls1, self.ls2 = parameter((width,), rngs), parameter((width,), rngs)

    def __call__(self, x: Tokens) -> Tokens:
        mixed = self.linear_tokens(self.norm1(x).transpose(0, 2, 1)).transpose(0, 2, 1)
        x = x + self.ls1[...].reshape(1, 1, -1) * mixed
        return x + self.ls2[...].reshape(1, 1, -1) * self.mlp_channels(self.norm2(x))


MakeBlock = type[MixerBlock] | type[ResMLPBlock]
MakeNorm = Callable[[int, nnx.Rngs], nnx.LayerNorm | Affine]
# How each kind's block is made, what normalises behind the last one, and a tensor of a block with a side of its shape
# for each token.
KINDS: dict[str, tuple[MakeBlock, MakeNorm, str]] = {
    "mixer": (MixerBlock, layer_norm, "mlp_tokens.fc1.weight"),
    "resmlp": (ResMLPBlock, Affine, "linear_tokens.weight"),
}


class TokenMixer(nnx.Module):
    """Logits of RGB images of exactly `image_size`, a multiple of the patch."""

    def __init__(self, kind: str, sizes: Sizes, num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> None:
        block, norm, _ = KINDS[kind]
        width, patch, tokens = sizes.width, sizes.patch, image_size.places(lambda side: side // sizes.patch)
        self.stem = NamedSequential({"proj": conv(3, width, patch, rngs, stride=patch, padding=0, bias=True)})
        self.blocks = Sequential([block(sizes, tokens, rngs) for _ in range(sizes.depth)])
        self.norm, self.head = norm(width, rngs), linear(width, num_classes, rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        patches = self.stem(x)
        tokens = patches.reshape(x.shape[0], -1, patches.shape[3])
        return self.head(jnp.mean(self.norm(self.blocks(tokens)), 1))


def _make(match: re.Match[str]) -> Architecture | None:
    if match["mixer"]:
        kind, sizes = "mixer", Sizes(*MIXERS[match["mixer"]], int(match["p"]))
    elif match["resmlp"]:
        kind, sizes = "resmlp", Sizes(*RESMLPS[match["resmlp"]])
    else:
        kind, sizes = match["kind"], Sizes(*(int(match[part]) for part in ("width", "depth", "patch")))
    sides = tuple(side for side in SIDES if sizes.is_reasonable and side % sizes.patch == 0)
    if not sides:
        return None
    return Architecture(
        name=match[0],
        build=partial(TokenMixer, kind, sizes),
        classifier="head.weight",
        image_sizes=squares(*sides),
        landmarks={
            f"blocks.{sizes.depth - 1}.mlp_channels.fc1.weight": (4 * sizes.width, sizes.width),
            "stem.proj.weight": (sizes.width, 3, sizes.patch, sizes.patch),
        },
    )


def _propose(shapes: Shapes) -> Iterator[str]:
    kind = next((kind for kind, (_, _, part) in KINDS.items() if f"blocks.0.{part}" in shapes), None)
    stem = shapes.get("stem.proj.weight", ())
    if kind is None or len(stem) != 4:
        return
    depth = count_matching(r"blocks\.\d+\.mlp_channels\.fc1\.weight", shapes)
    sizes = (stem[0], depth, stem[2])
    if kind == "mixer":
        size = next((f"{name}_{stem[2]}" for name, known in MIXERS.items() if known == sizes[:2]), None)
    else:
        size = next((name for name, known in RESMLPS.items() if known == sizes), None)
    yield f"{kind}_{size or 'w{}_d{}_p{}'.format(*sizes)}"


register_family(Family(NAME, "mixer_b_16", _make, _propose))
