"""How functions are compiled and looped over batches on each backend.

On XLA:CPU a convolution inside `lax.scan` or `fori_loop` is 5 to 40 times slower than outside (jax issue 12868), so
there batches are driven from Python through one compiled step; on accelerators they are scanned on the device.
"""

import contextlib
import ctypes
import functools
from typing import Literal

import jax

LoopForm = Literal["python", "scan"]

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


def release_memory() -> None:
    """Gives back what compiling took and no longer needs (160 MiB for a small VGG); glibc keeps it unless asked."""
    with contextlib.suppress(AttributeError, OSError):  # another C library has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def default_loop_form() -> LoopForm:
    """The loop form that is fast on the default backend."""
    return "python" if jax.default_backend() == "cpu" else "scan"
