"""Time and peak memory of converting a ViT-B/16, there and back: `python -m tests.measure_conversion`.

Each conversion is a process of its own; its peak is what the system says of it when it has ended, imports and JAX included.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cli.commands import CONVERT

MIB = 2**20
# Not in this process: a child's peak counts what its parent had when it was made.
MAKE_VIT = """
import sys, torch
from tests.oracles.torchvision_models import models
torch.save({"model": models.vit_b_16(num_classes=1000).state_dict()}, sys.argv[1])
"""


def measured(*arguments: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen([*map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "vit.pth"
        subprocess.run([sys.executable, "-c", MAKE_VIT, str(source)], check=True)
        size = source.stat().st_size
        print(f"ViT-B/16, {size / MIB:.0f} MiB")
        for name, arguments in {
            "import alone": [sys.executable, "-c", "import ibau_jax.checkpoints, orbax.checkpoint"],
            "inspect": [*CONVERT, "--inspect", source],
            "PyTorch -> Flax": [*CONVERT, source, Path(folder) / "flax"],
            "Flax -> PyTorch": [*CONVERT, Path(folder) / "flax", Path(folder) / "back.pth"],
            "PyTorch -> PyTorch": [*CONVERT, source, Path(folder) / "again.pth"],
            "PyTorch -> safetensors": [*CONVERT, source, Path(folder) / "again.safetensors"],
        }.items():
            seconds, peak = measured(*arguments)
            print(f"{name:24} {seconds:5.1f} s  peak {peak / MIB:5.0f} MiB = {peak / size:.2f} x the file", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
