"""Time and peak memory of reading and converting large files: `python -m tests.measure_conversion`.

ViT-B/16 is read in every format, and converted there and back; VGG-11, most of which is one tensor, is read. Each is a process of
its own. A conversion's peak is what the system says of it when it has ended, imports and JAX included; that of reading is what
comes on top of them.
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
MAKE = """
import pickle, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tests.oracles.torchvision_models import models
folder, name = Path(sys.argv[1]), sys.argv[2]
module = getattr(models, name)(num_classes=1000)
old = {"_use_new_zipfile_serialization": False}
torch.save({"model": module.state_dict()}, folder / "state dict, zip")
torch.save({"model": module.state_dict()}, folder / "state dict, legacy", **old)
torch.save(module, folder / "whole module, zip")
torch.save(module, folder / "whole module, legacy", **old)
save_file(module.state_dict(), folder / "safetensors")
for protocol in (0, 2, 4):
    (folder / f"pickle.dump, protocol {protocol}").write_bytes(pickle.dumps(module.state_dict(), protocol))
"""
READ = """
import sys
from pathlib import Path
from ibau_jax import load
from tests.promise import measured
result, seconds, memory = measured(lambda: load(Path(sys.argv[1])))
if isinstance(result, Exception):
    raise result
print(seconds, memory)
"""


def measured(*arguments: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen([*map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def made(folder: Path, name: str) -> Path:
    """A folder of the files of one of torchvision's networks."""
    (folder / name).mkdir()
    subprocess.run([sys.executable, "-c", MAKE, str(folder / name), name], check=True)
    return folder / name


def measure_reading(folder: Path) -> None:
    """Prints what reading each of a folder's files takes."""
    for file in sorted(folder.iterdir()):
        done = subprocess.run([sys.executable, "-c", READ, str(file)], check=True, capture_output=True, text=True)
        seconds, memory = map(float, done.stdout.split())
        size = file.stat().st_size
        print(
            f"read {folder.name}, {file.name:24} {size / MIB:4.0f} MiB {seconds:5.1f} s  "
            f"peak {memory / MIB:5.0f} MiB = {memory / size:.2f} x the file",
            flush=True,
        )


def measure_conversions(source: Path, folder: Path) -> None:
    """Prints what conversions of a file take, whose results are put into a folder."""
    size = source.stat().st_size
    print(f"{source.name}, {size / MIB:.0f} MiB")
    for name, arguments in {
        "import alone": [sys.executable, "-c", "import ibau_jax.checkpoints, orbax.checkpoint"],
        "inspect": [*CONVERT, "--inspect", source],
        "PyTorch -> Flax": [*CONVERT, source, folder / "flax"],
        "Flax -> PyTorch": [*CONVERT, folder / "flax", folder / "back.pth"],
        "PyTorch -> PyTorch": [*CONVERT, source, folder / "again.pth"],
        "PyTorch -> safetensors": [*CONVERT, source, folder / "again.safetensors"],
    }.items():
        seconds, peak = measured(*arguments)
        print(f"{name:24} {seconds:5.1f} s  peak {peak / MIB:5.0f} MiB = {peak / size:.2f} x the file", flush=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        vit, vgg = made(Path(folder), "vit_b_16"), made(Path(folder), "vgg11")
        measure_reading(vit)
        measure_reading(vgg)
        measure_conversions(vit / "state dict, zip", Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
