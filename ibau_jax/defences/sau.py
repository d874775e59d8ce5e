"""SAU: unlearning shared adversarial examples (Wei et al., NeurIPS 2023).

An adversarial example that the model and the model as it came misclassify alike may be a trigger. For every image one
is searched for, then the model is to stop sharing the class that the model as it came gives it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ibau_jax.data.dataset import Dataset
from ibau_jax.defences.registry import defence
from ibau_jax.defences.tuning import Gradient, Images, OnEpoch, Sample, Slope, TuneConfig, tuned
from ibau_jax.execution import Execution
from ibau_jax.functional import Params, Run, Weights

Logits = Float[Array, "n classes"]


@dataclass(frozen=True)
class SauConfig(TuneConfig):
    """The paper's constants, as BackdoorBench has them. Images are taken as they are, BatchNorm's statistics too."""

    lr: float = 1e-4
    """learning rate of Adam, falling along a cosine"""
    crop: int = 0
    """pixels by which images may move"""
    bound: float = 0.2
    """largest change of a pixel, and the length of a step"""
    steps: int = 5
    """steps of the search"""
    adversarial: float = 0.01
    """weight β₁ of misclassification in the search"""
    shared: float = 1.0
    """weight β₂ of agreement in the search"""

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam."""
        return optax.adam(optax.cosine_decay_schedule(self.lr, steps))


def divergence(logits: Logits, others: Logits) -> Float[Array, " n"]:
    """Jensen and Shannon's divergence of two classifiers' probabilities."""
    p, q = (jnp.maximum(jax.nn.softmax(some), 1e-8) for some in (logits, others))
    middle = jnp.log((p + q) / 2)
    return 0.5 * jnp.sum(p * (jnp.log(p) - middle) + q * (jnp.log(q) - middle), axis=1)


def search_loss(
    logits: Logits,
    others: Logits,
    own: Int[Array, " n"],
    others_own: Int[Array, " n"],
    labels: Int[Array, " n"],
    config: SauConfig,
) -> Float[Array, ""]:
    """What the search lowers: images that are classified rightly yet, and two models that disagree yet."""
    said, others_said = jnp.argmax(logits, axis=1), jnp.argmax(others, axis=1)
    fooled, others_fooled = said != own, others_said != others_own
    right = jnp.where(fooled, 0, optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    others_right = jnp.where(others_fooled, 0, optax.softmax_cross_entropy_with_integer_labels(others, labels))
    apart = jnp.where(fooled & others_fooled & (said == others_said), 0, divergence(logits, others))
    return jnp.mean(config.shared * apart - config.adversarial * (right + others_right) / 2)


def adversarial_examples(
    forward: Callable[[Images], tuple[Logits, Logits]], sample: Sample, config: SauConfig
) -> Images:
    """One for each image, by steps along the gradient's sign in the l∞ ball; `forward` gives both models' logits."""
    own, others_own = (jnp.argmax(logits, axis=1) for logits in forward(sample.images))

    def loss(delta: Images) -> Float[Array, ""]:
        return search_loss(*forward(sample.images + delta), own, others_own, sample.labels, config)

    delta = jnp.full_like(sample.images, config.bound)
    for _ in range(config.steps):
        delta = jnp.clip(delta - config.bound * jnp.sign(jax.grad(loss)(delta)), -config.bound, config.bound)
    return sample.images + delta


def sharing(logits: Logits, others: Logits, poisoned: Bool[Array, " n"]) -> Float[Array, ""]:
    """The shared risk: of images that may be poisoned, how surely the class that the other model gives is given."""
    shared = jnp.take_along_axis(jax.nn.softmax(logits), jnp.argmax(others, axis=1)[:, None], axis=1)[:, 0]
    rest = -jnp.log(1e-6 + jnp.minimum(1 - shared, 0.999)) - jnp.log(1 + 1e-6 - jnp.maximum(shared, 0.001))
    return jnp.mean(jnp.where(poisoned, rest / 2, 0))


def sau_gradient(run: Run, config: SauConfig) -> Gradient:
    """That of clean cross-entropy and shared risk."""

    def gradient(weights: Weights, sample: Sample, before: Weights) -> Slope:
        def forward(images: Images) -> tuple[Logits, Logits]:
            return run(*weights, images)[0], run(*before, images)[0]

        examples = jax.lax.stop_gradient(adversarial_examples(forward, sample, config))
        others, others_own = run(*before, examples)[0], jnp.argmax(run(*before, sample.images)[0], axis=1)
        said = jnp.argmax(others, axis=1)
        poisoned = (said != sample.labels) & (said != others_own)

        def loss(params: Params) -> Float[Array, ""]:
            clean, _ = run(params, weights.rest, sample.images)
            adversarial, _ = run(params, weights.rest, examples)
            wrong = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(clean, sample.labels))
            return wrong + sharing(adversarial, others, poisoned)

        value, found = jax.value_and_grad(loss)(weights.params)
        return Slope(value, found, weights.rest)

    return gradient


@defence("sau", "Wei et al., Shared Adversarial Unlearning, NeurIPS 2023", SauConfig)
def sau(
    model: nnx.Module, clean_set: Dataset, config: SauConfig, execution: Execution, on_epoch: OnEpoch | None
) -> nnx.Module:
    """Unlearns adversarial examples that the model shares with itself as it came."""
    return tuned(model, clean_set, config, lambda run: sau_gradient(run, config), execution, on_epoch, training=False)
