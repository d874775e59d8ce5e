"""Tells from clean images whether a classifier has a backdoor, and which class is its target."""

from dataclasses import dataclass
from typing import Annotated

from ibau_jax.cli import console, process
from ibau_jax.cli.options import AuditOptions, ClassOrder, DeviceOptions, ModelOptions, option, parse

FOUND = 1


@dataclass(frozen=True)
class Options(ClassOrder):
    """Looks for a backdoor without knowing the trigger: for each class, how small can a trigger be that leads to it?

    python scripts/audit.py --ckpt suspicious.pth --dataset clean.npz

    Exit code: 0 no backdoor found, 1 backdoored, suspicious or not enough images to say, 2 bad input.
    """

    subject: ModelOptions
    audit: AuditOptions
    device: DeviceOptions
    dataset: Annotated[str | None, option("SPEC", "what the checkpoint names")] = None
    """clean images, half of them to search on, half to measure on, in the forms that --dataset of
    scripts/unlearn.py has: digits, tfds:NAME, FILE.npz, FILE.h5, FILE.parquet, a folder of class folders, or a
    folder[:SPLIT] of CIFAR, MNIST, GTSRB ... as downloaded"""
    json: bool = False
    """print JSON, all classes in it, instead of a table"""


def main() -> int:
    """Parses the command line, audits, prints."""
    options = parse(Options)
    process.use_large_pages()
    process.quiet_libraries()
    # Imported here, so that --help and a wrong option need not wait for JAX.
    from ibau_jax.cli.audit import AuditProgress, audit_record, audit_tables, make_auditor, verdict_lines
    from ibau_jax.cli.device import start
    from ibau_jax.cli.job import load_images, load_subject, settled
    from ibau_jax.cli.options import DataOptions
    from ibau_jax.json_files import json_text

    start(options.device)
    subject = load_subject(options.subject)
    images = load_images(DataOptions(options.dataset, class_order=options.class_order), subject)
    auditor = make_auditor(options.audit.config())
    subject = settled(subject, images, options.subject.force)
    with AuditProgress("audit") as bar:
        audit = auditor(subject.model, images, on_step=bar.on_step)
    if options.json:
        print(json_text({**audit_record(audit), "class_names": images.class_names or None}))
    else:
        for table in audit_tables(audit, images.class_names):
            console.console.print(table)
        verdict, *evidence = verdict_lines(audit, images.class_names)
        for line in (f"verdict: {verdict}", *evidence):
            console.console.print(console.escaped(line), soft_wrap=True)
    return 0 if audit.verdict == "no backdoor found" else FOUND


if __name__ == "__main__":
    console.run_command(main, ("a smaller --audit-images",))
