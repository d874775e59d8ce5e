"""Unlearns a backdoor from a PyTorch image classifier with I-BAU, and shows whether it worked."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ibau_jax.cli import console
from ibau_jax.cli.options import AttackOptions, DataOptions, DeviceOptions, MethodOptions, ModelOptions, OutputOptions


@dataclass(frozen=True)
class Options:
    """Unlearns a backdoor from a PyTorch image classifier with I-BAU (Zeng et al., ICLR 2022).

    python scripts/unlearn.py --ckpt suspicious.pth --dataset clean.npz --attack badnets --target-label 8

    The published command line's spellings work too: --poi_path, --unl_set, --n_rounds, --batch_size, --log_path.
    """

    subject: ModelOptions
    data: DataOptions
    attack: AttackOptions
    method: MethodOptions
    output: OutputOptions
    device: DeviceOptions


def main() -> int:
    """Parses the command line and runs."""
    options = tyro.cli(Annotated[Options, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff])
    console.quiet_libraries()
    # Imported here, so that --help and a wrong option need not wait for JAX.
    from ibau_jax.cli import run

    return run.run(options.subject, options.data, options.attack, options.method, options.output, options.device)


if __name__ == "__main__":
    console.run_command(main)
