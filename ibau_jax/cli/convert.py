"""The conversion utility: look at a file, or convert it."""

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ibau_jax.batches import to_unit
from ibau_jax.checkpoints import Checkpoint, load, save
from ibau_jax.checkpoints.checkpoint import form_of
from ibau_jax.checkpoints.conversion import described_not_finite
from ibau_jax.checkpoints.flax_store import is_flax_checkpoint
from ibau_jax.checkpoints.inspection import Report, inspect_file, normalization_name
from ibau_jax.checkpoints.recognition import Request
from ibau_jax.checkpoints.verify import random_images, verify
from ibau_jax.cli import console
from ibau_jax.data import load_dataset
from ibau_jax.errors import CheckpointError, ConfigError
from ibau_jax.files import check_writable, put_in_place, staging_folder
from ibau_jax.models.custom import load_object

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

NOT_CONVERTIBLE = 1
FORMS = {"torch": "PyTorch", "safetensors": "safetensors", "flax": "Flax folder"}
SHOWN_KEYS = 3  # the JSON has all of them


@dataclass(frozen=True)
class Comparison:
    """What to compare with PyTorch.

    Attributes:
        images: how many random images.
        dataset: real images as well, as `ibau_jax.load_dataset` takes them; the first `images` of them.
        torch_module: FILE.py:NAME of what makes the PyTorch module for a number of classes.
    """

    images: int
    dataset: str | None = None
    torch_module: str | None = None

    def check(self) -> None:
        """Raises ConfigError unless there are images to compare."""
        if self.images < 1:
            raise ConfigError(f"--verify {self.images} compares nothing; give at least 1")


def convert(
    source: Path,
    target: Path,
    request: Request,
    key: str | None = None,
    comparison: Comparison | None = None,
    overwrite: bool = False,
) -> Iterator[str]:
    """Converts `source` to `target`, whose name says to what, and yields what to tell the user.

    Raises:
        CheckpointError: see `ibau_jax.load`; or the logits differ from PyTorch's. Nothing is written then.
        ConfigError: `target` is there already or can't be written.
    """
    if comparison:
        comparison.check()
    form = form_of(target)
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} is there already; add --overwrite or choose another OUT")
    if target.is_dir() and not is_flax_checkpoint(target):
        raise ConfigError(f"{target} is a folder that holds something other than a Flax checkpoint; choose another OUT")
    if source.is_dir() and Path(os.path.realpath(source)) in Path(os.path.realpath(target)).parents:
        raise ConfigError(f"{target} lies in the Flax folder {source}, which is read; choose another OUT")
    check_writable(target)
    checkpoint = load(
        source, model=request.model, num_classes=request.num_classes, image_size=request.image_size, key=key
    )
    with staging_folder(target) as folder:
        prepared = folder / target.name
        save(checkpoint, prepared)
        if comparison:
            yield from compared(checkpoint, prepared if source.is_dir() else source, comparison)
        put_in_place(prepared, target)
    values = sum(leaf.size for leaf in checkpoint.leaves.values())
    yield f"{source}: {checkpoint.summary()}, {values:,} values in {len(checkpoint.leaves)} leaves"
    if counts := checkpoint.not_finite():
        console.warn(f"{source}: weights or statistics are not finite, and kept so: {described_not_finite(counts)}")
    yield f"written: {target} ({FORMS[form]})"


def compared(checkpoint: Checkpoint, torch_file: Path, comparison: Comparison) -> Iterator[str]:
    """Compares the logits of random and of real images with PyTorch's, and says by how much they differ.

    Raises:
        CheckpointError: see `verify`.
        DataError: the real images can't be read.
    """
    make: Callable[[int], torch.nn.Module] | None = None
    if comparison.torch_module:
        make = _named_module(comparison.torch_module)
    sets = {"random": random_images(checkpoint, comparison.images)}
    if comparison.dataset:
        images = load_dataset(comparison.dataset, checkpoint.input_shape)
        images.check_fits(checkpoint.input_shape, checkpoint.num_classes)
        sets[images.name] = np.asarray(to_unit(jnp.asarray(images.images[: comparison.images])))
    for name, images_of in sets.items():
        difference = verify(checkpoint, torch_file, images_of, make)
        yield f"logits of {len(images_of)} {name} images differ from PyTorch's by {difference:.1e} (relative)"


def _named_module(spec: str) -> "Callable[[int], torch.nn.Module]":
    factory = load_object(spec, "--torch-module")
    if not callable(factory):
        raise CheckpointError(f"--torch-module: {spec} is no class or function")

    def make(num_classes: int) -> "torch.nn.Module":
        try:
            module: torch.nn.Module = factory(num_classes)
        except Exception as error:  # whatever the user's code raises
            raise CheckpointError(f"--torch-module: {spec}({num_classes}) fails: {error}") from error
        return module

    return make


def inspect(source: Path, request: Request, key: str | None, as_json: bool) -> int:
    """Prints what a file is, as a table or JSON. Returns 0, or 1 if it can't be converted.

    Raises:
        CheckpointError: the file is missing, damaged, or of no known format.
    """
    report = inspect_file(source, request, key)
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "convertible": report.problem is None}, indent=2))
    else:
        console.print_facts(described(report))
    return NOT_CONVERTIBLE if report.problem else 0


def described(report: Report) -> dict[str, Any]:
    """A report for a person: what is not there is left out."""
    lines = {
        "file": f"{report.file}, {report.size:,} bytes",
        "format": FORMATS[report.format],
        "written by": report.source,
        "state dict": _state_dict_line(report),
        "others": ", ".join(report.other_state_dicts) and f"{', '.join(report.other_state_dicts)} (for --key)",
        "beside it": _beside(report),
        "architecture": report.model or "not recognised",
        "classes": report.num_classes,
        "images": report.image_size and f"{report.image_size}x{report.image_size}",
        "parameters": f"{report.parameters:,}",
        "dtypes": ", ".join(f"{name} ({count})" for name, count in report.dtypes.items()),
        "normalisation": _normalization_line(report),
        "not allowed": ", ".join(report.refused_globals) or "no global outside the allow list",
        **{f"why not {name}": why for name, why in report.runners_up.items()},
        "convertible": f"no: {report.problem}" if report.problem else "yes",
    }
    return {name: value for name, value in lines.items() if value not in (None, "")}


FORMATS = {
    "zip": "PyTorch (zip)",
    "legacy": "PyTorch before 1.6 (legacy)",
    "pickle": "pickle of tensors",
    "safetensors": "safetensors",
}


def _state_dict_line(report: Report) -> str | None:
    if report.wrapper is None:
        return "none"
    place = f"under {report.wrapper!r}" if report.wrapper else "the file itself"
    prefix = f", names begin with {report.prefix!r}" if report.prefix else ""
    shown = ", ".join(f"{name} {shape}" for name, shape in list(report.keys.items())[:SHOWN_KEYS])
    return f"{place}, {len(report.keys)} tensors ({shown}{', ...' if len(report.keys) > SHOWN_KEYS else ''}){prefix}"


def _beside(report: Report) -> str:
    shown = [f"{name} = {kind}" if name else kind for name, kind in list(report.entries.items())[:12]]
    return ", ".join(shown) + (", ..." if len(report.entries) > 12 else "")


def _normalization_line(report: Report) -> str:
    if report.normalization is None:
        return f"none for {report.data_name!r}" if report.data_name else "the file does not say; see --normalize"
    name = normalization_name(**report.normalization)
    numbers = f"mean {report.normalization['mean']}, std {report.normalization['std']}"
    return f"{name or report.data_name}: {numbers}"
