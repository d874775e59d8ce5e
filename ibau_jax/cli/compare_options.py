"""Options of scripts/compare.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ibau_jax.cli.options import AttackOptions, ClassOrder, DeviceOptions, ModelsOptions, option


@dataclass(frozen=True)
class CompareOptions(ClassOrder):
    """Runs methods x checkpoints x sizes of the clean set x seeds, and writes one table.

    python scripts/compare.py --ckpt models/*.pth --dataset clean.npz --attack badnets --target-label 8 --out runs/table

    Writes table.md, table.csv, table.png and outcomes.json, after every run; the same command goes on where it was
    interrupted, and runs what it lacks.
    """

    subject: ModelsOptions
    attack: AttackOptions
    device: DeviceOptions
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """folder of the tables"""
    dataset: Annotated[str | None, option("SPEC", "what the checkpoint names")] = None
    """images, as --dataset of scripts/unlearn.py takes them; those that do not unlearn evaluate"""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = (
        "robust",
        "cifar10",
        "ft",
        "ft-sam",
    )
    """presets of I-BAU (robust, cifar10, gtsrb, backdoorbench, backdoor-toolbox) and other defences (ft, ft-sam, fp,
    nc, nad, anp, sau)"""
    n_clean: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (5000, 100)
    """sizes of the clean set"""
    seed: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (0, 1, 2)
    """seeds of the clean set's choice and of the methods"""
    epochs: Annotated[int | None, option("N", "each method's own")] = None
    """passes over the clean images of other defences than I-BAU, whose own hundred take long on a CPU"""
    evaluated: int = 3000
    """images to evaluate on, at most"""
