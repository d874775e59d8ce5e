"""Compares I-BAU with other defences: one table of methods, checkpoints, clean sets and seeds."""

from ibau_jax.cli import console, process
from ibau_jax.cli.compare_options import CompareOptions
from ibau_jax.cli.options import parse


def main() -> int:
    """Parses the command line and compares."""
    options = parse(CompareOptions)
    process.use_large_pages()
    process.quiet_libraries()
    # Imported here, so that --help and a wrong option need not wait for JAX.
    from ibau_jax.cli import compare

    return compare.run(options)


if __name__ == "__main__":
    console.run_command(main)
