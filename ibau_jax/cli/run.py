"""The main job: read, check, evaluate, unlearn, evaluate, write."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ibau_jax import minimax
from ibau_jax.cli import console
from ibau_jax.cli.device import choose_device, device_name
from ibau_jax.cli.job import Subject, Threat, load_split, load_subject, load_threat
from ibau_jax.cli.options import AttackOptions, DataOptions, DeviceOptions, MethodOptions, ModelOptions, OutputOptions
from ibau_jax.cli.run_folder import Progress, check_folder, default_folder, round_record, versions, write_results
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import Split
from ibau_jax.errors import ConfigError
from ibau_jax.metrics import Metrics

DIVERGED = 1


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked."""

    subject: Subject
    split: Split
    threat: Threat
    config: UnlearnConfig
    folder: Path
    settings: dict[str, Any] = field(repr=False)

    def evaluate(self, model: Any) -> Metrics:
        """Evaluates on the images that do not unlearn."""
        return self.threat.evaluate(model, self.split.evaluation)


def run(
    subject: ModelOptions,
    data: DataOptions,
    attack: AttackOptions,
    method: MethodOptions,
    output: OutputOptions,
    device: DeviceOptions,
) -> int:
    """Runs `scripts/unlearn.py` and returns its exit code: 0, or 1 where a loss became NaN or infinite.

    Raises:
        IbauError: the input is to blame; nothing was written.
    """
    start = time.perf_counter()
    config = method.config()
    choose_device(device.device)
    folder = output.out or default_folder(subject.ckpt)
    check_folder(folder, output.overwrite)
    loaded = load_subject(subject)
    split = load_split(data, loaded, config.seed)
    threat = load_threat(attack, loaded, split.used)
    job = Job(loaded, split, threat, config, folder, settings(loaded, split, threat, method, config))
    console.describe(description(job, method.preset))
    return _run(job, output.resume, start)


def settings(
    subject: Subject, split: Split, threat: Threat, method: MethodOptions, config: UnlearnConfig
) -> dict[str, Any]:
    """What result.json's `config` holds, and what tells an interrupted run from another."""
    return {
        "preset": method.preset,
        **asdict(config),
        "clean_set": split.clean_set.name,
        "n_clean": len(split.clean_set),
        "dataset": split.evaluation.name,
        "n_evaluation": len(split.evaluation),
        "attack": threat.attack.name if threat.attack else None,
        "target_label": threat.target_label,
        "mean": list(subject.normalization.mean) if subject.normalization else None,
        "std": list(subject.normalization.std) if subject.normalization else None,
        "checkpoint_sha256": subject.sha256(),
    }


def description(job: Job, preset: str) -> dict[str, Any]:
    """What is about to be done, for the screen."""
    checkpoint, split = job.subject.checkpoint, job.split
    left_out = f" ({split.duplicates} left out: they are in the clean set)" if split.duplicates else ""
    attack = job.threat.attack.name if job.threat.attack else "none named, so only ACC is measured"
    target = f", target label {job.threat.target_label}" if job.threat.target_label is not None else ""
    norm = job.subject.normalization
    return {
        "checkpoint": f"{job.subject.path} ({checkpoint.summary()})",
        "normalisation": f"mean {norm.mean}, std {norm.std}" if norm else "none",
        "clean set": f"{len(split.clean_set)} images of {split.clean_set.name}",
        "evaluation": f"{len(split.evaluation)} other images of {split.evaluation.name}{left_out}",
        "attack": f"{attack}{target}",
        "method": f"I-BAU, preset {preset}, {job.config.n_rounds} rounds, K = {job.config.K}, on {device_name()}",
    }


def _run(job: Job, resume: bool, start: float) -> int:
    fresh = minimax.initial_state(job.subject.model, job.config)
    progress = Progress(job.folder, job.settings)
    state, records = progress.restore(fresh) if resume else (fresh, [])
    if progress.exists() and not resume:
        console.console.print("an interrupted run is there; it is replaced (--resume would go on with it)")
    before = job.evaluate(job.subject.model)
    result = _unlearn_with_progress(job, state, records, progress)
    if not records:
        raise ConfigError(
            "a loss became NaN or infinite in the first round; nothing to keep. Try a smaller --inner-lr or --lr"
        )
    after = Metrics(**{name: records[-1][name] for name in asdict(before)})
    content = _content(job, before, after, records, result)
    content["seconds"]["total"] = time.perf_counter() - start
    cleaned = job.subject.checkpoint.with_weights(result.model)
    model_file = write_results(job.folder, content, cleaned, result.rounds)
    progress.remove()
    console.console.print(console.before_after(before, after))
    return _conclude(result, model_file)


def _content(
    job: Job, before: Metrics, after: Metrics, records: list[dict[str, Any]], result: minimax.Result
) -> dict[str, Any]:
    """What result.json holds. Seconds of resumed rounds count, those of an interrupted round do not."""
    unlearn_seconds = sum(record["seconds"] for record in records)
    return {
        "checkpoint": str(job.subject.path),
        "model": job.subject.checkpoint.architecture.name,
        "num_classes": job.subject.checkpoint.num_classes,
        "status": result.status,
        "config": job.settings,
        "device": device_name(),
        "versions": versions(),
        "before": asdict(before),
        "after": asdict(after),
        "rounds": records,
        "seconds": {"compile": result.compile_seconds, "unlearn": unlearn_seconds},
    }


def _unlearn_with_progress(
    job: Job, state: minimax.State, records: list[dict[str, Any]], progress: Progress
) -> minimax.Result:
    """Runs the rounds; appends each one's record to `records`."""
    bar = console.RoundProgress(job.config.n_rounds)

    def on_round(state: minimax.State) -> None:
        bar.on_evaluation()
        metrics = job.evaluate(state.model)
        records.append(round_record(state.rounds[-1], metrics))
        progress.store(state, records)
        bar.on_round(state.rounds[-1], metrics)

    try:
        with bar.running(len(state.rounds)):
            return minimax.unlearn(
                job.subject.model,
                job.split.clean_set,
                job.config,
                state=state,
                on_round=on_round,
                on_batch=bar.on_batch,
            )
    except KeyboardInterrupt:
        if records:
            console.errors.print(f"interrupted after round {len(records)}; the same command with --resume goes on")
        raise


def _conclude(result: minimax.Result, model_file: Path) -> int:
    console.console.print(f"cleaned model: {console.escaped(str(model_file))}", soft_wrap=True)
    if result.status == "completed":
        return 0
    console.errors.print(
        f"stopped: a loss became NaN or infinite in round {len(result.rounds) + 1}; "
        f"the results are those of round {len(result.rounds)}, the last good one",
        soft_wrap=True,
    )
    return DIVERGED
