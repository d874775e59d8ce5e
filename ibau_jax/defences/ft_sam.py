"""FT-SAM: fine-tuning with sharpness-aware minimisation, scaled by the weights (Zhu et al., ICCV 2023).

    min over θ of  max over ‖T⁻¹ε‖₂ ≤ ρ  of  L(θ + ε),  T = diag |θ|,  ε ≈ ρ T² ∇L / ‖T ∇L‖₂

Neurons of a backdoor have large weights, which move more.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from ibau_jax.data.dataset import Dataset
from ibau_jax.defences.registry import defence
from ibau_jax.defences.tuning import Gradient, OnEpoch, Sample, Slope, TuneConfig, cross_entropy_gradient, tuned
from ibau_jax.execution import Execution
from ibau_jax.functional import Params, Run, Weights


@dataclass(frozen=True)
class SamConfig(TuneConfig):
    """The paper's constants for CIFAR-10 and PreActResNet18."""

    rho: float = 2.0
    """radius ρ"""
    smoothing: float = 0.1
    """share of a label that the other classes get"""


def worst(params: Params, gradient: Params, rho: float) -> Params:
    """The ascent step ε of adaptive SAM (Kwon et al., ICML 2021)."""
    scaled = jax.tree.map(lambda weight, slope: jnp.abs(weight) * slope, params, gradient)
    norm: Array = optax.tree.norm(scaled)
    return jax.tree.map(lambda weight, slope: rho * jnp.abs(weight) * slope / (norm + 1e-12), params, scaled)


def sam_gradient(run: Run, rho: float, smoothing: float) -> Gradient:
    """∇L(θ + ε); what else the model holds is that of the first pass."""
    plain = cross_entropy_gradient(run, smoothing)

    def gradient(weights: Weights, sample: Sample, before: Weights) -> Slope:
        here = plain(weights, sample, before)
        moved = jax.tree.map(jnp.add, weights.params, worst(weights.params, here.gradient, rho))
        there = plain(Weights(moved, weights.rest), sample, before)
        return Slope(here.loss, there.gradient, here.rest)

    return gradient


@defence("ft-sam", "Zhu et al., Enhancing Fine-Tuning Based Backdoor Defense with SAM, ICCV 2023", SamConfig)
def ft_sam(
    model: nnx.Module, clean_set: Dataset, config: SamConfig, execution: Execution, on_epoch: OnEpoch | None
) -> nnx.Module:
    """Fine-tunes for flat minima."""
    return tuned(
        model, clean_set, config, lambda run: sam_gradient(run, config.rho, config.smoothing), execution, on_epoch
    )
