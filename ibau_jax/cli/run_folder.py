"""The folder of a run: what it holds and how it is written."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ibau_jax.aims import Suspects
from ibau_jax.checkpoints import Checkpoint, save
from ibau_jax.errors import ConfigError
from ibau_jax.files import check_writable, put_all_in_place, staging_folder
from ibau_jax.interruption import deferred_signals
from ibau_jax.metrics import Metrics
from ibau_jax.report.figures import plot_perturbations
from ibau_jax.result import Round

RESULT, SUMMARY, REPORT = "result.json", "summary.json", "report.html"
FLAX, PERTURBATION = "flax", "perturbation.png"
MODELS = {"zip": "model.pth", "legacy": "model.pth", "pickle": "model.pth", "safetensors": "model.safetensors"}
PACKAGES = ("ibau-jax", "jax", "jaxlib", "flax", "optax", "jaxopt", "numpy")


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ConfigError, and writes nothing, if results can't be written to `folder` or are there already."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file, not a folder")
    there = [name for name in (RESULT, REPORT, FLAX, PERTURBATION, *MODELS.values()) if (folder / name).exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{folder} already holds {', '.join(sorted(set(there)))}; add --overwrite or choose another --out"
        )
    check_writable(folder / RESULT)


def write_results(
    folder: Path,
    result: dict[str, Any],
    checkpoint: Checkpoint,
    rounds: Sequence[Round],
    report: Callable[[dict[str, Any]], str],
) -> Path:
    """Writes everything to `folder`; result.json comes last, so a folder that has it is complete.

    Args:
        folder: where to.
        result: what result.json holds; the cleaned model's file and its digest are added.
        checkpoint: the cleaned model.
        rounds: those done.
        report: makes report.html of `result`.

    Returns:
        The cleaned model's file.
    """
    model = MODELS[checkpoint.envelope.format]
    with deferred_signals(), staging_folder(folder) as staging:
        save(checkpoint, staging / model)
        save(checkpoint, staging / FLAX)
        if any(len(done.perturbation) for done in rounds):
            plot_perturbations(rounds, staging / PERTURBATION)
        digest = hashlib.sha256((staging / model).read_bytes()).hexdigest()
        result = {**result, "cleaned": {"file": model, "sha256": digest}}
        (staging / REPORT).write_text(report(result))
        (staging / RESULT).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        put_all_in_place(staging, folder, (*sorted(set(MODELS.values())), FLAX, PERTURBATION, REPORT, RESULT))
    return folder / model


def write_summary(folder: Path, records: list[dict[str, Any]]) -> None:
    """Writes what came of several runs to `folder`/summary.json."""
    with staging_folder(folder) as staging:
        (staging / SUMMARY).write_text(json.dumps(records, indent=2, allow_nan=False) + "\n")
        put_all_in_place(staging, folder, (SUMMARY,))


def suspects_record(suspects: Suspects) -> list[dict[str, float]]:
    """The classes that perturbations were led to, as result.json has them."""
    return [
        {"label": int(label), "norm": float(norm), "found_after_rounds": int(rounds)}
        for label, norm, rounds in zip(suspects.labels, suspects.norms, suspects.found_after, strict=True)
    ]


def round_record(done: Round, metrics: Metrics) -> dict[str, Any]:
    """A round as result.json has it."""
    return {
        "round": done.number,
        **asdict(metrics),
        "perturbation_norm": done.perturbation_norm,
        "inner_loss": done.inner_loss,
        "outer_loss": done.outer_loss,
        "seconds": done.seconds,
        "standing": asdict(done.standing) if done.standing else None,
        "undone": done.undone,
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
