"""How fast a backdoor comes back: fine-tuning on clean images and a few triggered ones.

A model whose backdoor is only hidden relearns it at once (Min et al., NeurIPS 2024, call such safety superficial). What
"at once" means is told by two others under the same fine-tuning: the model as it came, and one that never had it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from ibau_jax.batches import Batches, make_batches, to_unit
from ibau_jax.config import RelearnConfig
from ibau_jax.data.dataset import Dataset
from ibau_jax.errors import ConfigError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.functional import Params, Rest, make_apply, mean_over, split_weights
from ibau_jax.loops import BatchLoop, compile_loop
from ibau_jax.metrics import Metrics
from ibau_jax.placement import Placement
from ibau_jax.triggers import Attack, planted


@dataclass(frozen=True)
class Relearned:
    """What fine-tuning did to a model: its figures before (index 0) and after each epoch."""

    figures: tuple[Metrics, ...]

    @property
    def asr(self) -> list[float]:
        """The attack's success, in [0, 1]."""
        return [metrics.asr or 0.0 for metrics in self.figures]


def tempting_set(clean_set: Dataset, attack: Attack, num_classes: int, config: RelearnConfig) -> Dataset:
    """The clean set, float32 in [0, 1], and random images of it with the trigger and the attacker's label.

    Raises:
        ConfigError: only triggered images are known, not the trigger; or there are too few images of other classes.
    """
    if attack.stamp is None:
        raise ConfigError("relearning puts the trigger on clean images; --attack names a folder of triggered ones only")
    parts = attack.parts(num_classes)
    wanted = [part.targets(clean_set.labels, num_classes) for part in parts]
    others = np.flatnonzero(np.all(wanted != clean_set.labels, axis=0))
    if not 0 < config.triggered <= len(others):
        raise ConfigError(
            f"--relearn {config.triggered}: choose 1 to {len(others)}, the clean images that the attack would change"
        )
    chosen = np.random.default_rng(config.seed).choice(others, config.triggered, replace=False)
    images = np.asarray(to_unit(jnp.asarray(clean_set.images)))
    stamped, targets = planted(images[chosen], clean_set.labels[chosen], parts, num_classes)
    return Dataset(np.concatenate([images, stamped]), np.concatenate([clean_set.labels, targets]), clean_set.name)


def relearn(
    models: Mapping[str, nnx.Module],
    tempting: Dataset,
    evaluate: Callable[[nnx.Module], Metrics],
    config: RelearnConfig,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    on_epoch: Callable[[str, int], None] | None = None,
) -> dict[str, Relearned]:
    """Fine-tunes each of several models of one architecture in the same way, SGD with momentum, in inference mode.

    Args:
        models: by name; not changed.
        tempting: what `tempting_set` makes.
        evaluate: gives ACC and ASR on images that are not in it.
        config: epochs and learning rate.
        execution: precision.
        on_epoch: called with a model's name and the epochs done.
    """
    loop: BatchLoop | None = None
    found: dict[str, Relearned] = {}
    for name, model in models.items():
        graph, place, weights = nnx.split(model)[0], Placement.one_device(), split_weights(model)
        optimizer = optax.sgd(config.lr, config.momentum, nesterov=True)
        carry, rest = place.members((weights.params, optimizer.init(weights.params))), place.members(weights.rest)
        figures, shuffled = [evaluate(model)], np.random.default_rng(config.seed)
        for epoch in range(config.epochs):
            batches = make_batches(tempting.take(shuffled.permutation(len(tempting))), config.batch_size)
            if loop is None:
                step = _step(make_apply(model, execution), optimizer, execution)
                loop = compile_loop(step, carry, batches, rest, execution=execution, placement=place)
            carry, _ = loop.run(carry, batches, rest)
            figures.append(evaluate(nnx.merge(graph, carry[0], rest)))
            if on_epoch:
                on_epoch(name, epoch + 1)
        found[name] = Relearned(tuple(figures))
    return found


def _step(apply: Any, optimizer: optax.GradientTransformation, execution: Execution) -> Callable[..., Any]:
    def losses(rest: Rest, _: Any, params: Params, batch: Batches) -> Float[Array, " n"]:
        return optax.softmax_cross_entropy_with_integer_labels(apply(rest, params, batch.images), batch.labels)

    def step(carry: Any, batch: Batches, rest: Rest) -> Any:
        params, state = carry

        def loss(params: Params) -> Float[Array, ""]:
            return mean_over(jnp.zeros(()), params, batch, batch.weights, partial(losses, rest), execution)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    return step
