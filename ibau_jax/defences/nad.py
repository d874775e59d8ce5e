"""NAD: neural attention distillation (Li et al., ICLR 2021).

A fine-tuned copy of the model teaches the model: where it looks, its attention maps, the model is to look too.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.data.dataset import Dataset
from ibau_jax.defences.registry import defence
from ibau_jax.defences.tuning import Gradient, Images, OnEpoch, Sample, Slope, TuneConfig, tuned
from ibau_jax.execution import Execution
from ibau_jax.functional import Params, Rest, Run, Weights, make_run
from ibau_jax.models.taps import tapped

Logits = Float[Array, "n classes"]
MAPS = 3


@dataclass(frozen=True)
class NadConfig(TuneConfig):
    """BackdoorBench's constants for CIFAR-10."""

    weight_decay: float = 1e-4
    """of everything"""
    teacher_epochs: int = 10
    """epochs that the teacher is fine-tuned for"""
    betas: tuple[float, float, float] = (500.0, 1000.0, 1000.0)
    """weights of the distances of attention maps, from the finest of the last three resolutions to the coarsest"""
    power: float = 2.0
    """of activations in a map"""


def attention(features: Float[Array, "n h w c"], power: float) -> Float[Array, "n hw"]:
    """Where a layer looks: Σ over channels of |activation|^p, of norm 1 (Zagoruyko and Komodakis, ICLR 2017)."""
    maps = jnp.mean(jnp.abs(features) ** power, axis=-1).reshape(len(features), -1)
    return maps / jnp.maximum(jnp.linalg.norm(maps, axis=1, keepdims=True), 1e-12)


def looked(run: Run, weights: Weights, images: Images, power: float) -> tuple[Logits, Rest, list[Array]]:
    """Logits, what else the model then holds, and the attention maps of its last three resolutions."""
    with tapped() as taps:
        logits, rest = run(*weights, images)
    return logits, rest, [attention(features, power) for features in list(taps.maps.values())[-MAPS:]]


def nad_gradient(run: Run, teach: Run, config: NadConfig) -> Gradient:
    """That of cross-entropy and the distances of the maps to those of the teacher, the weights beside, by `teach`."""

    def gradient(weights: Weights, sample: Sample, teacher: Weights) -> Slope:
        wanted = looked(teach, teacher, sample.images, config.power)[2]

        def loss(params: Params) -> tuple[Float[Array, ""], Rest]:
            logits, rest, maps = looked(run, Weights(params, weights.rest), sample.images, config.power)
            betas = config.betas[MAPS - len(maps) :]
            apart = sum(
                beta * jnp.mean((one - other) ** 2) for beta, one, other in zip(betas, maps, wanted, strict=True)
            )
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, sample.labels)) + apart, rest

        (value, rest), found = jax.value_and_grad(loss, has_aux=True)(weights.params)
        return Slope(value, found, rest)

    return gradient


@defence("nad", "Li et al., Neural Attention Distillation, ICLR 2021", NadConfig)
def nad(
    model: nnx.Module, clean_set: Dataset, config: NadConfig, execution: Execution, on_epoch: OnEpoch | None
) -> nnx.Module:
    """Distils the attention of a fine-tuned copy."""
    teaching, teach = replace(config, epochs=config.teacher_epochs), make_run(model)
    teacher = tuned(model, clean_set, teaching, execution=execution)
    return tuned(
        model, clean_set, config, lambda run: nad_gradient(run, teach, config), execution, on_epoch, reference=teacher
    )
