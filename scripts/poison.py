"""Trains a poisoned image classifier, or a clean one, to try defences on."""

from ibau_jax.cli import console, process
from ibau_jax.cli.options import parse
from ibau_jax.cli.poison_options import PoisonOptions


def main() -> int:
    """Parses the command line and trains."""
    options = parse(PoisonOptions)
    process.use_large_pages()
    process.quiet_libraries()
    # Imported here, so that --help and a wrong option need not wait for JAX.
    from ibau_jax.cli import poison

    return poison.run(options)


if __name__ == "__main__":
    console.run_command(main, ("a smaller --batch-size",))
