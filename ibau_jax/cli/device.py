"""Chooses the device; must run before JAX first computes something."""

import os
import re

import jax

from ibau_jax.errors import ConfigError

PLATFORMS = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}


def choose_device(device: str) -> None:
    """Makes `device` JAX's default.

    Args:
        device: `auto`, `cpu`, `cuda`, `gpu`, `tpu`, `cuda:N`, or CUDA device numbers (`0`, `4,5`).

    Raises:
        ConfigError: there is no such device.
    """
    match = re.fullmatch(r"(?:cuda:|gpu:)?(\d+(?:,\d+)*)", device)
    if match:
        os.environ["CUDA_VISIBLE_DEVICES"] = match[1]
    elif device not in (*PLATFORMS, "auto"):
        raise ConfigError(f"--device {device!r} is none of auto, cpu, cuda, tpu, cuda:N or CUDA device numbers")
    if device != "auto":
        jax.config.update("jax_platforms", "cuda" if match else PLATFORMS[device])
    try:
        jax.devices()
    except RuntimeError as error:
        jax.config.update("jax_platforms", "cpu")
        raise ConfigError(
            f"JAX has no device for --device {device}; pip install -e '.[cuda]' or use --device cpu"
        ) from error


def device_name() -> str:
    """The default device, such as `cpu` or `NVIDIA H100 80GB HBM3`."""
    return str(jax.devices()[0].device_kind)
