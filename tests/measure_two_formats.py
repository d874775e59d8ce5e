"""How many honest safetensors files are refused as being a pickle too: `python -m tests.measure_two_formats`."""

import argparse
import io
import json
import random
import struct
from collections.abc import Callable, Iterator

import numpy as np

from ibau_jax.checkpoints import two_formats
from ibau_jax.errors import CheckpointError

PARTS = (
    *("conv1", "conv2", "bn1", "bn2", "layer1", "layer4", "downsample", "features", "classifier", "fc", "linear"),
    *("encoder", "layers", "self_attention", "in_proj", "mlp", "ln_1", "norm", "head", "block", "stem", "proj"),
    *("backbone", "module", "net", "trunk", "patch_embed", "attn", "qkv", "query", "key", "value", "dense", "pooler"),
    *map(str, range(24)),
)
ENDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "gamma", "beta", "in_proj_weight")
DTYPES = ("F32", "F16", "BF16", "I64")


def honest(seed: int, longest: int = 10_000_000) -> io.BytesIO:
    """The begin of a file as the library writes it, or as others do: a header of 64 bytes to `longest`, then floats."""
    source = random.Random(seed)
    length = int(64 * (longest / 64) ** source.random())
    metadata = {"__metadata__": {"format": "pt"}} if source.random() < 0.7 else {}
    entries = {**metadata, **dict(_entries(source, min(length, 20_000)))}
    text = json.dumps(entries, separators=(",", ":")).encode()[1:-1]
    header = b"{" + b",".join([text] * max(1, length // len(text))) + b"}"
    padded = 1 if source.random() < 0.3 else 8  # as others write it, or the library
    header = header.ljust(-(-len(header) // padded) * padded)
    floats = np.random.default_rng(seed).normal(0, source.choice((0.02, 1)), 20_000).astype(np.float32)
    return io.BytesIO(struct.pack("<Q", len(header)) + header + floats.tobytes())


def _entries(source: random.Random, length: int) -> Iterator[tuple[str, dict[str, object]]]:
    """Tensors of about that many bytes of JSON."""
    place, left = 0, length - 60
    while left > 0:
        name = ".".join([*source.choices(PARTS, k=source.randint(1, 5)), source.choice(ENDS)])
        shape = [source.choice((1, 3, 7, 10, 64, 128, 512, 768)) for _ in range(source.randint(1, 4))]
        size = 4 * int(np.prod(shape))
        yield name, {"dtype": source.choice(DTYPES), "shape": shape, "data_offsets": [place, place + size]}
        place, left = place + size, left - 75 - len(name)


def refused(refuse: Callable[[io.BytesIO], None], count: int, longest: int = 10_000_000) -> list[int]:
    """The seeds, of the first `count`, whose honest files are refused."""
    found = []
    for seed in range(count):
        try:
            refuse(honest(seed, longest))
        except CheckpointError:
            found.append(seed)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    files = parser.parse_args().files
    seeds = refused(two_formats.refuse_pickle, files)
    print(f"{len(seeds)} of {files} honest files are refused as pickles: {seeds[:20]}")
