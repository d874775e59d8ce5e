"""How functions are compiled and looped over batches on each backend.

On XLA:CPU a convolution inside `lax.scan` or `fori_loop` is 5 to 40 times slower than outside (jax issue 12868), so
there batches are driven from Python through one compiled step; on accelerators they are scanned on the device.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

LoopForm = Literal["python", "scan"]
PyTree = Any

# XLA:CPU's YNNPACK convolutions take 1.5 times as long as its Eigen ones (small VGG's layers, jaxlib 0.10.2, AVX-512,
# 2 cores). This names the operations that go to YNNPACK: only matrix products.
_CPU_OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


@functools.cache
def compiler_options() -> dict[str, str | bool]:
    """XLA options for the default backend; empty where this jaxlib does not know them."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x).lower(0.0).compile(compiler_options=_CPU_OPTIONS)
    except (jax.errors.JaxRuntimeError, ValueError):
        return {}
    return _CPU_OPTIONS


def default_loop_form() -> LoopForm:
    """The loop form that is fast on the default backend."""
    return "python" if jax.default_backend() == "cpu" else "scan"


@dataclass(frozen=True)
class BatchLoop:
    """`carry, loss = step(carry, batch, constant)` over stacked batches, compiled once.

    Attributes:
        call: the compiled step ("python") or the compiled scan over all batches ("scan").
        form: which of the two.
        compile_seconds: how long compiling took.
    """

    call: Callable[..., Any]
    form: LoopForm
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
            The last carry and the losses, float32 (batches,); "python" ends at the first loss that is not finite.
        """
        count = len(jax.tree.leaves(batches)[0])
        if self.form == "scan":
            carry, scanned = self.call(carry, batches, constant)
            losses = np.asarray(scanned)
            if on_batch:
                on_batch(count)
            return carry, losses
        done: list[float] = []
        for index in range(count):
            carry, loss = self.call(carry, _slice(batches, index), constant)
            done.append(float(loss))
            if on_batch:
                on_batch(index + 1)
            if not np.isfinite(done[-1]):
                break
        return carry, np.asarray(done, np.float32)


def compile_loop(
    step: Callable[..., Any], carry: PyTree, batches: PyTree, constant: PyTree, form: LoopForm
) -> BatchLoop:
    """Compiles a `BatchLoop` for arguments of these shapes."""
    start = time.perf_counter()
    if form == "scan":

        def whole(carry: PyTree, batches: PyTree, constant: PyTree) -> Any:
            return jax.lax.scan(lambda carry, batch: step(carry, batch, constant), carry, batches)

        lowered = jax.jit(whole).lower(carry, batches, constant)
    else:
        lowered = jax.jit(step).lower(carry, _slice(batches, 0), constant)
    compiled = lowered.compile(compiler_options=compiler_options())
    return BatchLoop(compiled, form, time.perf_counter() - start)


def _slice(batches: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda array: array[index], batches)
