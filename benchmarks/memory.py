"""What `--microbatch`, `--remat` and `--shard-params` do to a step's memory, as the compiled program says.

    python -m benchmarks.memory [--devices]

Compiles the outer step, executes nothing. With `--devices` it starts anew with 8 virtual CPU devices and shows what
each of them holds of a ViT-B/16.
"""

import argparse
import os
import sys
from typing import Any

import numpy as np

from ibau_jax.config import UnlearnConfig
from ibau_jax.data import make_dataset
from ibau_jax.image_size import ImageSize

MIB = 2**20
VIRTUAL = "--xla_force_host_platform_device_count=8"


def outer_step_memory(
    architecture: str, image_size: int, batch_size: int, K: int, execution: Any
) -> tuple[float, float]:
    """MiB of arguments (weights, optimiser, batch) and of temporary arrays, on each device."""
    from flax import nnx

    from ibau_jax.models import get_architecture
    from ibau_jax.unlearning import initial_state
    from ibau_jax.unlearning.loop import compile_round
    from ibau_jax.unlearning.stack import Stack

    rng, config = np.random.default_rng(0), UnlearnConfig(batch_size=batch_size, K=K)
    images = rng.integers(0, 256, (batch_size, image_size, image_size, 3), np.uint8)
    data = make_dataset(images, rng.integers(0, 10, batch_size), "random")
    model = get_architecture(architecture).build(10, ImageSize(image_size, image_size), nnx.Rngs(0))
    stack = Stack([initial_state(model, config)], [data], [config], execution)
    program: Any = compile_round(stack).outer.call
    found = program.memory_analysis()
    return found.argument_size_in_bytes / MIB, found.temp_size_in_bytes / MIB


def table(title: str, architecture: str, batch_size: int, K: int, executions: dict[str, Any]) -> None:
    """Prints a Markdown table of the step for images of 224x224."""
    print(f"\n| {title} | arguments MiB | temporary MiB |\n| --- | --- | --- |", flush=True)
    for name, execution in executions.items():
        arguments, temporary = outer_step_memory(architecture, 224, batch_size, K, execution)
        print(f"| {name} | {arguments:.0f} | {temporary:.0f} |", flush=True)


def main() -> None:
    """Prints the tables."""
    from ibau_jax.execution import Execution

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", action="store_true")
    devices = parser.parse_args().devices
    if devices and VIRTUAL not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = VIRTUAL
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.memory", "--devices"])
    if devices:
        on = {
            "1 device": {},
            "8 devices": {"devices": 8},
            "8 devices, --shard-params": {"devices": 8, "shard_params": True},
        }
        choices = {name: Execution(**some) for name, some in on.items()}  # type: ignore[arg-type]
        table("ViT-B/16 at 224, batch of 8, K = 1, each device", "vit_b_16", 8, 1, choices)
        return
    sparing = {
        "as it is": Execution(),
        "--remat": Execution(remat=True),
        "--microbatch 4": Execution(microbatch=4),
        "--microbatch 4, scanned as on accelerators": Execution(microbatch=4, loop="scan"),
    }
    table("ResNet50 at 224, batch of 16, K = 5, CPU", "resnet50", 16, 5, sparing)


if __name__ == "__main__":
    main()
