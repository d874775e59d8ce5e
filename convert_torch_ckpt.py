"""Converts classifiers' checkpoints between PyTorch and Flax, without torch and without executing anything in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ibau_jax.cli import console
from ibau_jax.cli.options import option


@dataclass(frozen=True)
class Options:
    """Converts a checkpoint: PyTorch (.pth, .pt, .safetensors) to a Flax folder, a Flax folder to PyTorch, or
    between PyTorch's formats. What OUT is called says what is written.

    python convert_torch_ckpt.py model.pth model_flax

    python convert_torch_ckpt.py model_flax model.pth
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """PyTorch checkpoint or Flax folder"""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """.pth or .pt for PyTorch, in the original's wrapper and key order; .safetensors; else a Flax folder"""
    model: Annotated[str | None, option("NAME", "recognised from names and shapes")] = None
    """architecture"""
    num_classes: Annotated[int | None, option("N", "recognised from shapes")] = None
    """number of classes"""
    verify: bool = False
    """compare the logits of 64 random images with PyTorch's (needs torch)"""
    overwrite: bool = False
    """replace OUT"""


def main() -> int:
    """Parses the command line, converts, and says what was converted."""
    options = tyro.cli(Annotated[Options, tyro.conf.FlagCreatePairsOff])
    console.quiet_libraries()
    # Imported here, so that --help and a wrong option need not wait for JAX.
    from ibau_jax.cli.convert import convert

    for line in convert(
        options.source, options.target, options.model, options.num_classes, options.verify, options.overwrite
    ):
        console.console.print(console.escaped(line), soft_wrap=True)
    return 0


if __name__ == "__main__":
    console.run_command(main)
