"""Converts classifiers' checkpoints between PyTorch and Flax, without torch and without executing anything in them."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ibau_jax.cli import console, process
from ibau_jax.cli.options import ClassOrder, DataOptions, ModelChoices, ModelOptions, option, parse
from ibau_jax.errors import ConfigError

VERIFY_IMAGES = 64


@dataclass(frozen=True)
class Options(ClassOrder):
    """Converts a checkpoint: PyTorch (or safetensors) to a Flax folder, a Flax folder to PyTorch, or between PyTorch's
    formats. What OUT is called says what is written; what IN is called does not matter. --inspect only looks at IN.

    python convert_torch_ckpt.py model.pth model_flax

    python convert_torch_ckpt.py model_flax model.pth

    python convert_torch_ckpt.py --inspect suspicious.pth
    """

    classifier: ModelChoices
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """PyTorch checkpoint, Flax folder, transformers' folder, or hf:ORG/NAME of the Hugging Face hub"""
    target: Annotated[Path | None, tyro.conf.Positional, option("OUT", "none with --inspect")] = None
    """.pth, .pt, .th, .t7, .tar, .bin, .pkl or .ckpt for PyTorch, in the original's wrapper and key order;
    .safetensors or .npz; a Flax folder without a suffix, or with .flax or .orbax"""
    inspect: bool = False
    """say what IN is, without converting or executing anything; exit code 1 if it can't be converted"""
    json: bool = False
    """print what --inspect finds as JSON"""
    verify: Annotated[int | None, option("[N]", f"not compared; {VERIFY_IMAGES} if N is left out")] = None
    """compare the logits of N random images with PyTorch's (needs torch)"""
    dataset: Annotated[str | None, option("SPEC", "none")] = None
    """clean images, which tell networks with the same names and shapes apart; --verify compares N of them as well:
    in the forms that --dataset of scripts/unlearn.py has"""
    torch_module: Annotated[
        str | None, option("FILE.py:NAME", "the architecture's own, torchvision's or this program's, if there is one")
    ] = None
    """makes the PyTorch module to compare with, called with the number of classes (that file is run)"""
    overwrite: bool = False
    """replace OUT"""


def main() -> int:
    """Parses the command line, converts, and says what was converted."""
    arguments = with_verify_count(sys.argv[1:])
    options = parse(Options, arguments)
    process.quiet_libraries()
    # Imported here, so that --help and a wrong option need not wait for JAX.
    from ibau_jax.cli.convert import Comparison, check_out, convert, inspect
    from ibau_jax.cli.device import use_compile_cache

    if options.dataset or options.verify is not None:  # nothing else runs the network
        use_compile_cache()
    comparison = None if options.verify is None else Comparison(options.verify, options.torch_module)
    # Before IN, which may be downloaded.
    if options.inspect:
        if options.target is not None:
            raise ConfigError(f"--inspect converts nothing, so {options.target} would not be written; leave it out")
    elif options.target is None:
        raise ConfigError("name OUT, what to convert to; or add --inspect to only look at IN")
    else:
        check_out(options.target, options.overwrite)
        if comparison:
            comparison.check()
    subject = ModelOptions(ckpt=options.source, **vars(options.classifier))
    data = DataOptions(options.dataset, class_order=options.class_order) if options.dataset else None
    if options.target is None:
        return inspect(subject, data, options.json)
    for line in convert(subject, options.target, data, comparison):
        console.console.print(console.escaped(line), soft_wrap=True)
    return 0


def with_verify_count(arguments: list[str]) -> list[str]:
    """The arguments with a number behind a bare `--verify`, which may stand without one."""
    counted: list[str] = []
    for index, argument in enumerate(arguments):
        counted.append(argument)
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        if argument == "--verify" and not following.lstrip("-").isdecimal():
            counted.append(str(VERIFY_IMAGES))
    return counted


if __name__ == "__main__":
    console.run_command(main)
