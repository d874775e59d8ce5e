"""Measures a classifier: clean accuracy, and what an attack achieves."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

from ibau_jax.cli import console, process
from ibau_jax.cli.options import AttackOptions, ClassOrder, DataOptions, DeviceOptions, ModelOptions, option, parse


@dataclass(frozen=True)
class Options(ClassOrder):
    """Measures ACC of a checkpoint on clean images, and ASR and RA where an attack is named.

    python scripts/evaluate.py --ckpt suspicious.pth --dataset clean.npz --attack badnets --target-label 8
    """

    subject: ModelOptions
    attack: AttackOptions
    device: DeviceOptions
    dataset: Annotated[str | None, option("SPEC", "what the checkpoint names")] = None
    """clean images, in the forms that --dataset of scripts/unlearn.py has: digits, tfds:NAME, FILE.npz, FILE.h5,
    FILE.parquet, a folder of class folders, or a folder[:SPLIT] of CIFAR, MNIST, GTSRB ... as downloaded"""
    json: bool = False
    """print JSON instead of a table"""


def main() -> int:
    """Parses the command line, evaluates, prints."""
    options = parse(Options)
    process.use_large_pages()
    process.quiet_libraries()
    # Imported here, so that --help and a wrong option need not wait for JAX.
    from ibau_jax.cli.device import start
    from ibau_jax.cli.job import attack_on, load_images, load_subject, settled
    from ibau_jax.metrics import check_measurable, evaluate

    start(options.device)
    subject = load_subject(options.subject)
    images = load_images(DataOptions(options.dataset, class_order=options.class_order), subject)
    attack = attack_on(subject, options.attack)
    if attack is not None:
        check_measurable(attack, images, subject.checkpoint.num_classes)
    subject = settled(subject, images, options.subject.force)
    metrics = evaluate(subject.model, images, attack)
    if options.json:
        print(json.dumps({**asdict(metrics), "intervals": metrics.intervals()}))
    else:
        console.console.print(console.metrics_table(metrics))
    console.warn_of_figures(metrics)
    return 0


if __name__ == "__main__":
    console.run_command(main)
