"""The conversion utility: look at a file, or convert it."""

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ibau_jax.batches import to_unit
from ibau_jax.checkpoints import Checkpoint, save
from ibau_jax.checkpoints.checkpoint import form_of
from ibau_jax.checkpoints.conversion import described_not_finite
from ibau_jax.checkpoints.flax_store import is_flax_checkpoint
from ibau_jax.checkpoints.hugging_face import weights_file
from ibau_jax.checkpoints.inspection import Report, inspect_file, normalization_name
from ibau_jax.checkpoints.recognition import Request
from ibau_jax.checkpoints.variants import check_evidence
from ibau_jax.checkpoints.verify import compared_module, random_images, verify
from ibau_jax.cli import console
from ibau_jax.cli.job import likeliest, load_images, load_subject, settled
from ibau_jax.cli.options import DataOptions, ModelOptions
from ibau_jax.data import Dataset
from ibau_jax.errors import CheckpointError, ConfigError
from ibau_jax.files import check_writable, put_in_place, staging_folder
from ibau_jax.models.custom import load_object

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

NOT_CONVERTIBLE = 1
FORMS = {"torch": "PyTorch", "safetensors": "safetensors", "npz": "NumPy's arrays", "flax": "Flax folder"}
SHOWN_KEYS = 3  # the JSON has all of them
SHOWN_CLASSES = 6


@dataclass(frozen=True)
class Comparison:
    """What to compare with PyTorch.

    Attributes:
        images: how many random images, and of the clean images, if there are any.
        torch_module: FILE.py:NAME of what makes the PyTorch module for a number of classes.
    """

    images: int
    torch_module: str | None = None

    def check(self) -> None:
        """Raises ConfigError unless there are images to compare."""
        if self.images < 1:
            raise ConfigError(f"--verify {self.images} compares nothing; give at least 1")


def check_out(target: Path, overwrite: bool) -> None:
    """Raises ConfigError where a checkpoint can't be written to `target`, or may not be; its source may be far away.

    Args:
        target: what to write.
        overwrite: whether to replace what is there.

    Raises:
        CheckpointError: its name is of no format that is written.
    """
    form_of(target)
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} is there already; add --overwrite or choose another OUT")
    if target.is_dir() and not is_flax_checkpoint(target):
        raise ConfigError(f"{target} is a folder that holds something other than a Flax checkpoint; choose another OUT")
    check_writable(target)


def convert(
    options: ModelOptions,
    target: Path,
    data: DataOptions | None = None,
    comparison: Comparison | None = None,
) -> Iterator[str]:
    """Converts a checkpoint to `target`, whose name says to what, and yields what to tell the user.

    `check_out` says beforehand whether `target` may be written: what is there is replaced.

    Args:
        options: the checkpoint, and what is known of its model.
        target: what to write.
        data: clean images that tell which of several networks the checkpoint is.
        comparison: with PyTorch's logits.

    Raises:
        CheckpointError: see `ibau_jax.load`; or the logits differ from PyTorch's, or no network agrees with the clean
            images. Nothing is written then.
        ConfigError: `target` lies in the checkpoint's folder.
        DataError: the clean images can't be read.
    """
    form, source = form_of(target), options.ckpt
    if source.is_dir() and Path(os.path.realpath(source)) in Path(os.path.realpath(target)).parents:
        raise ConfigError(f"{target} lies in the folder {source}, which is read; choose another OUT")
    subject = load_subject(options)
    images = None
    if data is not None:
        images = load_images(data, subject)
        subject = settled(subject, images, options.force)
    checkpoint = subject.checkpoint
    with staging_folder(target) as folder:
        prepared = folder / target.name
        save(checkpoint, prepared)
        if comparison:
            torch_file = prepared if is_flax_checkpoint(source) else weights_file(source)
            yield from compared(checkpoint, torch_file, comparison, images)
        put_in_place(prepared, target)
    values = sum(leaf.size for leaf in checkpoint.leaves.values())
    yield f"{source}: {checkpoint.summary()}, {values:,} values in {len(checkpoint.leaves)} leaves"
    if note := checkpoint.assumption_note():
        yield note
    elif images is None and options.model is None and not source.is_dir() and not checkpoint.envelope.tells_layers():
        yield f"{UNTRACED} are taken as {checkpoint.architecture.name} has them; --dataset checks that"
    yield f"written: {target} ({FORMS[form]})"


def compared(checkpoint: Checkpoint, torch_file: Path, comparison: Comparison, images: Dataset | None) -> Iterator[str]:
    """Compares the logits of random and of clean images with PyTorch's, and says by how much they differ.

    Raises:
        CheckpointError: see `verify`.
    """
    make: Callable[[int], torch.nn.Module] | None = None
    whose = compared_module(checkpoint)
    if comparison.torch_module:
        make, whose = _named_module(comparison.torch_module), comparison.torch_module
    elif images is None:
        whose += ", chosen by names and shapes as the network was,"
    sets = {"random": random_images(checkpoint, comparison.images)}
    if images is not None:
        sets[images.name] = np.asarray(to_unit(jnp.asarray(images.images[: comparison.images])))
    for name, images_of in sets.items():
        difference = verify(checkpoint, torch_file, images_of, make)
        yield f"logits of {len(images_of)} {name} images differ from those of {whose} by {difference:.1e} (relative)"


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


def inspect(options: ModelOptions, data: DataOptions | None, as_json: bool) -> int:
    """Prints what a file is, as a table or JSON. Returns 0, or 1 if it can't be converted.

    Args:
        options: the file, and what is known of its model.
        data: clean images that tell which of several networks it is, if any.
        as_json: whether to print JSON.

    Raises:
        CheckpointError: the file is missing, damaged, or of no known format.
        DataError: the clean images can't be read.
    """
    request = Request(options.model, options.num_classes, options.image_size, leave_out=options.leave_out)
    report = inspect_file(options.ckpt, request, options.key)
    if data is not None and report.problem is None:
        report = with_evidence(report, options, data)
    if as_json:
        size = report.image_size and report.image_size.plain()
        content = {**dataclasses.asdict(report), "image_size": size, "convertible": report.problem is None}
        print(json.dumps(content, indent=2))
    else:
        console.print_facts(described(report))
    return NOT_CONVERTIBLE if report.problem else 0


def with_evidence(report: Report, options: ModelOptions, data: DataOptions) -> Report:
    """The report with what clean images say; that no network agrees with them is a problem."""
    subject = load_subject(options)
    evidence = likeliest(subject, load_images(data, subject)).evidence
    records = [one.record() for one in evidence]
    report = replace(report, model=evidence[0].architecture.name, assumed=False, evidence=records)
    try:
        check_evidence(evidence[:1] if options.model else evidence)
    except CheckpointError as error:
        return report if options.force else replace(report, problem=str(error))
    return report


def described(report: Report) -> dict[str, Any]:
    """A report for a person: what is not there is left out."""
    lines = {
        "file": f"{report.file}, {report.size:,} bytes",
        "format": FORMATS[report.format],
        "written by": report.source,
        "state dict": _state_dict_line(report),
        "others": ", ".join(report.other_state_dicts) and f"{', '.join(report.other_state_dicts)} (for --key)",
        "beside it": _beside(report),
        "no part of it": ", ".join(report.beside),
        "architecture": _architecture_line(report),
        "clean images": "; ".join(map(_evidence_line, report.evidence)),
        "classes": report.num_classes,
        "images": report.image_size,
        "parameters": f"{report.parameters:,}",
        "dtypes": ", ".join(f"{name} ({count})" for name, count in report.dtypes.items()),
        "normalisation": _normalization_line(report),
        "not finite": described_not_finite(report.not_finite),
        "not allowed": ", ".join(report.refused_globals) or "no global outside the allow list",
        "objects": _objects_line(report),
        **{f"why not {name}": why for name, why in report.runners_up.items()},
        "convertible": f"no: {report.problem}" if report.problem else "yes",
    }
    return {name: value for name, value in lines.items() if value not in (None, "")}


UNTRACED = "activations, poolings and strides, which leave no trace in a file,"

FORMATS = {
    "zip": "PyTorch (zip)",
    "torchscript": "TorchScript",
    "legacy": "PyTorch before 1.6 (legacy)",
    "pickle": "pickle of tensors",
    "safetensors": "safetensors",
    "npz": "NumPy's arrays (npz)",
}


def _architecture_line(report: Report) -> str:
    if report.model is None:
        return "not recognised"
    if not report.assumed:
        told = report.evidence or report.is_whole_module
        return report.model if told else f"{report.model}; {UNTRACED} as it has them (--dataset checks that)"
    others = ", ".join(name for name in report.variants if name != report.model)
    alike = f": {others} have the same names and shapes" if others else ""
    return f"{report.model}, assumed{alike}; --dataset or --model tells"


def _evidence_line(record: dict[str, Any]) -> str:
    accuracy = "" if record["accuracy"] is None else f", ACC {console.percent(record['accuracy'])} %"
    return f"{record['model']} {100 * record['discrepancy']:.2f} % off{accuracy}"


def _objects_line(report: Report) -> str | None:
    shown = ", ".join(report.unknown_classes[:SHOWN_CLASSES])
    more = ", ..." if len(report.unknown_classes) > SHOWN_CLASSES else ""
    return (
        shown and f"{shown}{more}: kept as data. PyTorch runs their code when it loads the file, or what is made of it"
    )


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
    return ": ".join(filter(None, (name or report.data_name, numbers)))
