"""Networks whose weights come from TensorFlow, as timm's `tf_` models: other padding, and a larger ε of BatchNorm."""

from typing import cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.image_size import ImageSize
from ibau_jax.models.alterations import normalize_by
from ibau_jax.models.convolution import Conv
from ibau_jax.models.registry import Build

EPSILON = 1e-3


class SameConv(Conv):
    """TensorFlow's padding "SAME": an output for each stride begun; an odd padding is larger below and to the right."""

    def applied(
        self, x: Float[Array, "n h w i"], kernel: Float[Array, "h w i o"], bias: Float[Array, " o"] | None
    ) -> Float[Array, "n oh ow o"]:
        """The convolution with other weights."""
        stride = cast(int, self.strides)
        totals = [
            max((-(-extent // stride) - 1) * stride + size - extent, 0)
            for extent, size in zip(x.shape[1:3], kernel.shape[:2], strict=True)
        ]
        x = jnp.pad(x, ((0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)))
        return super().applied(x, kernel, bias)


def from_tensorflow(build: Build) -> Build:
    """The same network as TensorFlow has it: without a stride both pad alike."""

    def built(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> nnx.Module:
        model = build(num_classes, image_size, rngs)
        normalize_by(EPSILON, model)
        for _, module in nnx.iter_graph(model):
            if isinstance(module, Conv) and module.strides != 1:
                module.__class__, module.padding = SameConv, 0
        return model

    return built
