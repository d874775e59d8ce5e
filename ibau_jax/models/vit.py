"""Vision transformer (Dosovitskiy et al., 2021) ViT-B/16, as torchvision names it.

Also behind a resize to 224x224, `torch.nn.Sequential(Resize((224, 224)), vit)`, as BackdoorBench has it: the names then
begin with `1.`.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.models.layers import (
    Activation,
    Identity,
    NamedSequential,
    Resize,
    Sequential,
    conv,
    gelu,
    layer_norm,
    linear,
    parameter,
)
from ibau_jax.models.registry import Architecture, from_torchvision, register

if TYPE_CHECKING:
    import torch

PATCH, WIDTH, DEPTH, HEADS, MLP = 16, 768, 12, 12, 3072
RESIZED = 224

Tokens = Float[Array, "n tokens width"]


class SelfAttention(nnx.Module):
    """`torch.nn.MultiheadAttention` of the tokens with themselves; queries, keys and values share `in_proj_weight`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.in_proj_weight = parameter((3 * WIDTH, WIDTH), rngs)
        self.in_proj_bias = parameter((3 * WIDTH,), rngs)
        self.out_proj = linear(WIDTH, WIDTH, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        # The same contraction as nnx.Linear's, so that jax's matmul precision holds for both.
        projected = jnp.einsum("nti,oi->nto", x, self.in_proj_weight[...]) + self.in_proj_bias[...].reshape(1, 1, -1)
        heads = projected.reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        query, key, value = (heads[:, :, part] for part in range(3))
        attended = jax.nn.dot_product_attention(query, key, value)
        return self.out_proj(attended.reshape(x.shape))


class EncoderBlock(nnx.Module):
    """Attention and an MLP, each behind its normalisation and added."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.ln_1, self.self_attention = layer_norm(WIDTH, rngs), SelfAttention(rngs)
        self.ln_2 = layer_norm(WIDTH, rngs)
        self.mlp = Sequential([linear(WIDTH, MLP, rngs), Activation(gelu), Identity(), linear(MLP, WIDTH, rngs)])

    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.self_attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Encoder(nnx.Module):
    """Positions, twelve blocks, a last normalisation."""

    def __init__(self, tokens: int, rngs: nnx.Rngs) -> None:
        self.pos_embedding = parameter((1, tokens, WIDTH), rngs)
        self.layers = NamedSequential({f"encoder_layer_{index}": EncoderBlock(rngs) for index in range(DEPTH)})
        self.ln = layer_norm(WIDTH, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        return self.ln(self.layers(x + self.pos_embedding[...]))


class VisionTransformer(nnx.Module):
    """Logits of RGB images of exactly `image_size`, a multiple of 16."""

    def __init__(self, num_classes: int, image_size: int, rngs: nnx.Rngs) -> None:
        self.conv_proj = conv(3, WIDTH, PATCH, rngs, stride=PATCH, padding=0, bias=True)
        self.class_token = parameter((1, 1, WIDTH), rngs)
        self.encoder = Encoder(1 + (image_size // PATCH) ** 2, rngs)
        self.heads = NamedSequential({"head": linear(WIDTH, num_classes, rngs)})

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        patches = self.conv_proj(x).reshape(x.shape[0], -1, WIDTH)
        class_token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, WIDTH))
        return self.heads(self.encoder(jnp.concatenate([class_token, patches], axis=1))[:, 0])


def resized_vit(num_classes: int, image_size: int, rngs: nnx.Rngs) -> Sequential:
    """`Resize((224, 224))` and ViT-B/16: logits of RGB images of any size."""
    return Sequential([Resize(RESIZED), VisionTransformer(num_classes, RESIZED, rngs)])


def resized_torch_module(num_classes: int) -> "torch.nn.Module":
    """The same in PyTorch. Needs torch and torchvision."""
    import torch
    from torchvision import transforms

    resize: torch.nn.Module = transforms.Resize((RESIZED, RESIZED))
    return torch.nn.Sequential(resize, from_torchvision("vit_b_16")(num_classes))


LANDMARKS = {"encoder.layers.encoder_layer_11.mlp.3.weight": (WIDTH, MLP), "conv_proj.weight": (WIDTH, 3, PATCH, PATCH)}
register(
    Architecture(
        name="vit_b_16",
        build=VisionTransformer,
        classifier="heads.head.weight",
        image_sizes=(RESIZED, 384, 512, 256, 128, 96, 64, 32),
        landmarks=LANDMARKS,
        torch_module=from_torchvision("vit_b_16"),
    )
)
register(
    Architecture(
        name="vit_b_16_resized",
        build=resized_vit,
        classifier="1.heads.head.weight",
        landmarks={f"1.{name}": shape for name, shape in LANDMARKS.items()},
        torch_module=resized_torch_module,
    )
)
