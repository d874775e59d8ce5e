"""Chooses the device; must run before JAX first computes something."""

import hashlib
import os
import platform
import re
from pathlib import Path

import jax

from ibau_jax.cli.options import DeviceOptions, ExecutionOptions
from ibau_jax.errors import ConfigError, shortened

PLATFORMS = {"cpu": "cpu", "cuda": "cuda,cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}  # the first one computes
REMEDY = "install JAX for it (pip install -e '.[cuda]'), or use --device cpu"


def start(device: DeviceOptions, execution: ExecutionOptions | None = None) -> None:
    """Joins the other processes if there are any, chooses the device and the place of compiled programs.

    Raises:
        ConfigError: there is no such device, or the other processes are not to be found.
    """
    if device.compile_cache:
        use_compile_cache()
    if execution and execution.coordinator:
        _select(device.device)
        _join(execution)
    choose_device(device.device)


def use_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder; where that can't be written, JAX goes on without."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "ibau_jax" / _processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # dozens of small ones take seconds too


def _processor() -> str:
    """Names what this processor can do: programs compiled for another, in a home that hosts share, may crash."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def _join(execution: ExecutionOptions) -> None:
    given = execution.coordinator != "auto"
    address = execution.coordinator if given else None
    if given and (execution.num_processes is None or execution.process_id is None):
        raise ConfigError("--coordinator HOST:PORT needs --num-processes and --process-id; under SLURM say auto")
    try:
        jax.distributed.initialize(address, execution.num_processes, execution.process_id)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--coordinator {execution.coordinator}: {error}") from error


def is_first_process() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def choose_device(device: str) -> None:
    """Makes `device` JAX's default.

    Args:
        device: `auto`, `cpu`, `cuda`, `gpu`, `tpu`, `cuda:N`, or CUDA device numbers (`0`, `4,5`).

    Raises:
        ConfigError: there is no such device.
    """
    _select(device)
    wanted = {"auto": None, "cpu": "cpu", "tpu": "tpu"}.get(device, "gpu")
    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        jax.config.update("jax_platforms", "cpu")
        raise ConfigError(f"JAX has no device for --device {device} ({shortened(error)}); {REMEDY}") from error
    if wanted not in (None, backend):
        raise ConfigError(f"JAX has no device for --device {device}; {REMEDY}")


def _select(device: str) -> None:
    match = re.fullmatch(r"(?:cuda:|gpu:)?(\d+(?:,\d+)*)", device)
    if match:
        os.environ["CUDA_VISIBLE_DEVICES"] = match[1]
    elif device not in (*PLATFORMS, "auto"):
        raise ConfigError(f"--device {device!r} is none of auto, cpu, cuda, tpu, cuda:N or CUDA device numbers")
    if device != "auto":
        jax.config.update("jax_platforms", PLATFORMS["cuda" if match else device])


def device_name() -> str:
    """The default device, such as `cpu` or `NVIDIA H100 80GB HBM3`."""
    return str(jax.devices()[0].device_kind)
