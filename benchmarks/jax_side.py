"""This project's side of a comparison."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import BATCH_SIZE, LR, SEED, Case
from ibau_jax.checkpoints import load
from ibau_jax.cli.device import choose_device, device_name
from ibau_jax.cli.run_folder import versions
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import make_dataset
from ibau_jax.execution import Execution
from ibau_jax.functional import Weights, make_apply
from ibau_jax.metrics import predict
from ibau_jax.unlearning import State, initial_state, loop
from ibau_jax.unlearning.inner import inner_step
from ibau_jax.unlearning.outer import OuterBatch, OuterCarry, outer_step
from ibau_jax.unlearning.stack import Stack


class JaxSide:
    """Rounds through the package's own stack of one, as `unlearn` drives them."""

    def __init__(self, case: Case, folder: Path, device: str, precision: str) -> None:
        choose_device(device)
        self.work = dict(np.load(folder / "work.npz"))
        checkpoint = load(case.checkpoint or folder / "checkpoint.pth", model=case.model, image_size=case.image_size)
        config = UnlearnConfig(n_rounds=case.rounds, batch_size=BATCH_SIZE, K=case.K, lr=LR, seed=SEED)
        clean_set = make_dataset(self.work["images"], self.work["labels"], case.name)
        model = checkpoint.model()
        self.stack = Stack([initial_state(model, config)], [clean_set], [config], Execution(precision=precision))  # type: ignore[arg-type]
        self.steps = loop.compile_round(self.stack)
        self.carry, self.number = self.stack.carry(), 0

    def facts(self) -> dict[str, Any]:
        """What does not change."""
        return {
            "compile_seconds": self.steps.seconds,
            "device": device_name(),
            "versions": versions(),
            "round_flops": self.round_flops(),
        }

    def round_flops(self) -> float:
        """Operations of a round as XLA counts them in the steps' programs, before it optimises them."""
        apply = make_apply(self.stack.states[0].model, self.stack.execution)
        first = jax.tree.map(lambda array: array[0], self.stack.batches)
        member = partial(jax.tree.map, lambda array: array[0])
        delta, inner_state = self.stack.zero()
        params, state, _ = member(self.carry)
        seen = Weights(params, member(self.stack.rest))
        constants = member(self.stack.constants(delta))
        inner = inner_step(apply, self.stack.config)
        outer = outer_step(apply, self.stack.config)
        outer_batch = member(OuterBatch(first, np.full(1, LR, np.float32), first.weights))
        arguments: tuple[Any, ...] = (
            (member((delta, inner_state)), member(first), seen),
            (OuterCarry(params, state, None), outer_batch, constants),
        )
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), arguments)
        with jax.default_device(jax.devices("cpu")[0]):  # XLA counts for the CPU alone
            costs: tuple[Any, Any] = (
                jax.jit(inner).lower(*shapes[0]).cost_analysis(),
                jax.jit(outer).lower(*shapes[1]).cost_analysis(),
            )
        return self.stack.count * sum(float(cost["flops"]) for cost in costs)

    def round(self) -> None:
        """The next round."""
        self.number += 1
        self.carry, done = loop.run_round(self.stack, self.steps, self.number, self.carry, lambda *progress: None)
        jax.block_until_ready(self.carry)
        loop.commit(self.stack, self.carry, done, None)

    def evaluate(self) -> dict[str, float | None]:
        """ACC and ASR of the model as it is."""
        state: State = self.stack.states[0]
        if not len(self.work["true"]):
            return {"acc": None, "asr": None}
        clean = make_dataset(self.work["clean"], self.work["true"], "clean")
        triggered = make_dataset(self.work["triggered"], self.work["targets"], "triggered")
        return {
            "acc": float(np.mean(predict(state.model, clean) == clean.labels)),
            "asr": float(np.mean(predict(state.model, triggered) == triggered.labels)),
        }

    def ceiling(self) -> float:
        """Operations a second of a large float32 matrix product, the best of several."""
        size = 4096 if jax.default_backend() == "cpu" else 8192
        matrix = jax.random.normal(jax.random.key(0), (size, size))
        product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
        return 2 * size**3 / min(_seconds(lambda: jax.block_until_ready(product(matrix))) for _ in range(6))

    def device_peak(self) -> int | None:
        """Bytes of device memory at the most; None where the host's memory is the device's."""
        found = jax.devices()[0].memory_stats()
        return int(found["peak_bytes_in_use"]) if found else None


def _seconds(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
