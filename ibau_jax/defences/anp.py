"""ANP: adversarial neuron pruning (Wu and Wang, NeurIPS 2021).

Every channel of a BatchNorm has a mask in [0, 1] on its scale. Masks are learnt so that the model is accurate under the
worst small change of all scales and shifts; those that fall below a threshold are pruned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.augmentation import augmented
from ibau_jax.batches import to_unit
from ibau_jax.data.dataset import Dataset
from ibau_jax.defences.registry import defence
from ibau_jax.defences.tuning import Images, OnEpoch, TuneConfig, fitted, last_of
from ibau_jax.epochs import TrainingBatch, run_epochs
from ibau_jax.errors import ConfigError
from ibau_jax.execution import Execution
from ibau_jax.functional import Params, Run, Weights, make_run, split_weights, training_copy

Path = tuple[Any, ...]
Channels = dict[str, Float[Array, " c"]]  # of every BatchNorm, by the name of its place


@dataclass(frozen=True)
class AnpConfig(TuneConfig):
    """The paper's constants."""

    lr: float = 0.2
    """learning rate of the masks"""
    iterations: int | None = 2000
    """steps, in as many epochs as it takes; `epochs` says how many passes where this is none"""
    bound: float = 0.4
    """largest change of a scale and a shift, as a share of it"""
    clean: float = 0.2
    """weight of the loss without a change"""
    threshold: float = 0.2
    """channels whose mask ends below are pruned"""

    def shortened(self, epochs: int) -> Self:
        """The same for so many passes."""
        return replace(self, epochs=epochs, iterations=None)


def norms_of(model: nnx.Module) -> list[Path]:
    """The places of a model's BatchNorms.

    Raises:
        ConfigError: it has none.
    """
    found = [path for path, module in nnx.iter_graph(model) if isinstance(module, nnx.BatchNorm)]
    if not found:
        raise ConfigError("anp prunes the channels of BatchNorm, and this model has none")
    return found


def name_of(path: Path) -> str:
    """A place as a key."""
    return ".".join(map(str, path))


def changed(params: Params, norms: list[Path], scales: Channels, shifts: Channels) -> Params:
    """The parameters with every BatchNorm's scale and bias multiplied."""
    flat = nnx.to_flat_state(params)
    factors = {(*path, "scale"): scales[name_of(path)] for path in norms}
    factors |= {(*path, "bias"): shifts[name_of(path)] for path in norms}
    return nnx.from_flat_state(
        [(path, leaf.replace(leaf[...] * factors[path]) if path in factors else leaf) for path, leaf in flat]
    )


def anp_losses(run: Run, norms: list[Path], weights: Weights, images: Images, labels: Array) -> Callable[..., Array]:
    """`loss(masks, scale_noise, shift_noise)`, the mean cross-entropy."""

    def loss(masks: Channels, scales: Channels, shifts: Channels) -> Float[Array, ""]:
        scales = jax.tree.map(jnp.add, masks, scales)
        params = changed(weights.params, norms, scales, jax.tree.map(lambda shift: 1 + shift, shifts))
        logits, _ = run(params, weights.rest, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return loss


def worst_noise(loss: Callable[..., Array], masks: Channels, key: Array, bound: float) -> tuple[Channels, Channels]:
    """A random change of scales and shifts in the l∞ ball, moved by a step of its radius along the gradient's sign.

    As published the step may leave the ball: up to twice the bound.
    """
    keys = jax.random.split(key, (2, len(masks)))
    noises = [
        {
            name: jax.random.uniform(of_norm, mask.shape, minval=-bound, maxval=bound)
            for of_norm, (name, mask) in zip(of_part, masks.items(), strict=True)
        }
        for of_part in keys
    ]
    slopes = jax.grad(lambda scales, shifts: loss(masks, scales, shifts), argnums=(0, 1))(*noises)
    scales, shifts = jax.tree.map(lambda noise, slope: noise + bound * jnp.sign(slope), tuple(noises), slopes)
    return scales, shifts


def masks_of(model: nnx.Module, clean_set: Dataset, config: AnpConfig, execution: Execution, on_epoch: Any) -> Channels:
    """Learns the masks."""
    copy, norms = training_copy(model), norms_of(model)
    run, optimizer = make_run(copy), optax.sgd(config.lr, config.momentum)
    weights = split_weights(copy)
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(weights.params)}
    masks = {name_of(path): jnp.ones(shapes[(*path, "scale")]) for path in norms}
    carry = (masks, optimizer.init(masks), jax.random.key_data(jax.random.key(config.seed)))

    def step(carry: Any, batch: TrainingBatch, weights: Weights) -> Any:
        masks, state, key_data = carry
        now, noise, later = jax.random.split(jax.random.wrap_key_data(key_data), 3)
        images = augmented(now, to_unit(batch.batch.images), config.crop, config.flip)
        loss = anp_losses(run, norms, weights, images, batch.batch.labels)
        none = jax.tree.map(jnp.zeros_like, masks)
        noises = worst_noise(loss, masks, noise, config.bound)

        def both(masks: Channels) -> Float[Array, ""]:
            return config.clean * loss(masks, none, none) + (1 - config.clean) * loss(masks, *noises)

        value, gradient = jax.value_and_grad(both)(masks)
        updates, state = optimizer.update(gradient, state)
        masks = jax.tree.map(lambda mask: jnp.clip(mask, 0, 1), optax.apply_updates(masks, updates))
        return (masks, state, jax.random.key_data(later)), value

    epochs = run_epochs(step, carry, clean_set, config, constant=weights, execution=execution)
    learnt: Channels = last_of(epochs, config, on_epoch)[0]
    return learnt


def pruned(model: nnx.Module, masks: Channels, threshold: float) -> nnx.Module:
    """The model without the channels whose mask is below the threshold: their scales are 0."""
    copy: nnx.Module = nnx.clone(model)
    for path, module in nnx.iter_graph(copy):
        if isinstance(module, nnx.BatchNorm):
            assert module.scale is not None
            kept = masks[name_of(path)] >= threshold
            module.scale[...] = jnp.where(kept, module.scale[...], 0)
    return copy


@defence("anp", "Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021", AnpConfig)
def anp(
    model: nnx.Module, clean_set: Dataset, config: AnpConfig, execution: Execution, on_epoch: OnEpoch | None
) -> nnx.Module:
    """Prunes the channels that are sensitive to small changes."""
    config = fitted(config, model, clean_set)
    if config.iterations is not None:
        batches = len(clean_set) // config.batch_size
        config = replace(config, epochs=-(-config.iterations // batches))
    return pruned(model, masks_of(model, clean_set, config, execution, on_epoch), config.threshold)
