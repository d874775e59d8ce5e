"""Loops over batches, compiled once: in Python or as a scan on the device (see `ibau_jax.compilation`)."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ibau_jax.compilation import LoopForm, compiler_options
from ibau_jax.execution import Execution
from ibau_jax.placement import Placement

PyTree = Any


@dataclass(frozen=True)
class BatchLoop:
    """`carry, losses = step(carry, batch, constant)` over stacked batches, compiled once.

    Attributes:
        call: the compiled step ("python") or the compiled scan over all batches ("scan").
        form: which of the two.
        place: puts one batch on the devices ("python").
        compile_seconds: how long compiling took.
    """

    call: Callable[..., Any]
    form: LoopForm
    place: Callable[[PyTree], PyTree]
    compile_seconds: float

    def run(
        self, carry: PyTree, batches: PyTree, constant: PyTree, on_batch: Callable[[int], None] | None = None
    ) -> tuple[PyTree, np.ndarray]:
        """Runs over all batches.

        Args:
            carry: what the step updates.
            batches: arrays with a leading batch axis.
            constant: what every step sees.
            on_batch: called with the number of batches done, after each ("python") or once at the end ("scan").

        Returns:
            The last carry and the losses, float32 (batches, members); "python" ends where no member's loss is finite.
        """
        count = len(jax.tree.leaves(batches)[0])
        if self.form == "scan":
            carry, scanned = self.call(carry, batches, constant)
            losses = np.asarray(scanned)
            if on_batch:
                on_batch(count)
            return carry, losses
        done: list[np.ndarray] = []
        for index in range(count):
            carry, loss = self.call(carry, self.place(_slice(batches, index)), constant)
            done.append(np.asarray(loss))
            if on_batch:
                on_batch(index + 1)
            if not np.isfinite(done[-1]).any():
                break
        return carry, np.stack(done)


def compile_loop(
    step: Callable[..., Any],
    carry: PyTree,
    batches: PyTree,
    constant: PyTree,
    *,
    execution: Execution,
    placement: Placement,
) -> BatchLoop:
    """Compiles a `BatchLoop` for arguments of these shapes and at these places; the carry stays where it is."""
    start, form = time.perf_counter(), execution.loop_form
    places = (jax.tree.map(lambda array: array.sharding, carry), placement.whole())
    compiled = functools.partial(jax.jit, out_shardings=places)
    with execution.products():
        if form == "scan":

            def whole(carry: PyTree, batches: PyTree, constant: PyTree) -> Any:
                return jax.lax.scan(lambda carry, batch: step(carry, batch, constant), carry, batches)

            lowered = compiled(whole).lower(carry, batches, constant)
        else:
            lowered = compiled(step).lower(carry, placement.batch(_slice(batches, 0)), constant)
    call = lowered.compile(compiler_options=compiler_options())
    return BatchLoop(call, form, placement.batch, time.perf_counter() - start)


def _slice(batches: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda array: array[index], batches)
