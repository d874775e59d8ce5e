"""The folder of a run: what it holds and how it is written."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ibau_jax.auditing import Suspect
from ibau_jax.checkpoints import Checkpoint, save
from ibau_jax.errors import ConfigError
from ibau_jax.files import check_writable, put_all_in_place, staging_folder, write_text
from ibau_jax.interruption import deferred_signals
from ibau_jax.json_files import json_text, read_json, write_json
from ibau_jax.metrics import Metrics
from ibau_jax.report.figures import plot_perturbations
from ibau_jax.unlearning import Round

RESULT, SUMMARY, REPORT = "result.json", "summary.json", "report.html"
FLAX, PERTURBATION = "flax", "perturbation.png"
MODELS = dict.fromkeys(("zip", "legacy", "pickle"), "model.pth") | {
    "safetensors": "model.safetensors",
    "npz": "model.npz",
}
RESULTS = (*sorted(set(MODELS.values())), FLAX, PERTURBATION, REPORT, RESULT)  # the last one says that all are there
PACKAGES = ("ibau-jax", "jax", "jaxlib", "flax", "optax", "jaxopt", "numpy")


def check_folder(folder: Path, names: Sequence[str] = RESULTS, *, overwrite: bool) -> None:
    """Raises ConfigError, and writes nothing, if results can't be written to `folder`.

    Args:
        folder: where to.
        names: what results are called.
        overwrite: whether they may be there already.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file, not a folder")
    if not Path(os.path.abspath(folder)).name:
        raise ConfigError(f"--out {folder} is no folder of its own; name one below it")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise ConfigError(f"{folder} already holds {', '.join(there)}; add --overwrite or choose another --out")
    check_writable(folder)  # where its state waits, beside it
    check_writable(folder / names[-1])


def check_apart(folder: Path, read: Path, names: Sequence[str] = RESULTS) -> None:
    """Raises ConfigError if writing `names` to `folder` would change a file or folder that is read."""
    out, source = Path(os.path.realpath(folder)), Path(os.path.realpath(read))
    if source.is_dir() and (out == source or source in out.parents):
        raise ConfigError(f"--out {folder} lies in the folder {read}, which is read; choose another --out")
    written = [out / name for name in names]
    if any(place == source or place in source.parents for place in written):
        raise ConfigError(f"the results in --out {folder} would replace {read}, which is read; choose another --out")


def finished_result(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What result.json in `folder` holds, where it is of a run of the same `config`; it is written last."""
    try:
        result = read_json(folder / RESULT)
        same = result["config"] == json.loads(json_text(config))
        return result if same and isinstance(result["status"], str) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # there is none, or of something else: `check_folder` says so


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
    with deferred_signals(), staging_folder(folder / RESULT) as staging:
        save(checkpoint, staging / model)
        save(checkpoint, staging / FLAX)
        if any(len(done.perturbation) for done in rounds):
            plot_perturbations(rounds, staging / PERTURBATION)
        digest = hashlib.sha256((staging / model).read_bytes()).hexdigest()
        result = {**result, "cleaned": {"file": model, "sha256": digest}}
        write_text(staging / REPORT, report(result))
        write_json(staging / RESULT, result)
        put_all_in_place(staging, folder, RESULTS)
    return folder / model


def write_summary(folder: Path, records: list[dict[str, Any]]) -> None:
    """Writes what came of several runs to `folder`/summary.json."""
    with staging_folder(folder / SUMMARY) as staging:
        write_json(staging / SUMMARY, records)
        put_all_in_place(staging, folder, (SUMMARY,))


def suspects_record(suspects: Sequence[Suspect]) -> list[dict[str, Any]]:
    """What stands out, as result.json has it."""
    return [asdict(suspect) for suspect in suspects]


def round_record(done: Round, metrics: Metrics) -> dict[str, Any]:
    """A round as result.json has it."""
    return {
        "round": done.number,
        **asdict(metrics),
        "perturbation_norm": done.perturbation_norm,
        "inner_loss": done.inner_loss,
        "outer_loss": done.outer_loss,
        "seconds": done.seconds,
        "suspects": suspects_record(done.outliers),
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
