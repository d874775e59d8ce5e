"""Unlearns a backdoor from a PyTorch image classifier with I-BAU, and shows whether it worked."""

from ibau_jax.cli import console, process
from ibau_jax.cli.options import parse
from ibau_jax.cli.unlearn_options import UnlearnOptions


def main() -> int:
    """Parses the command line and runs."""
    options = parse(UnlearnOptions)
    process.use_large_pages()
    process.quiet_libraries()
    # Imported here, so that --help and a wrong option need not wait for JAX.
    from ibau_jax.cli import run

    return run.run(options)


if __name__ == "__main__":
    console.run_command(main, ("a smaller --microbatch", "a smaller --batch-size", "--remat"))
