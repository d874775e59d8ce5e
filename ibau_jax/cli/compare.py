"""Comparing methods as a command: every run, the tables after each."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from ibau_jax.checkpoints.flax_store import is_flax_checkpoint
from ibau_jax.cli import console
from ibau_jax.cli.compare_options import CompareOptions
from ibau_jax.cli.device import device_name, start
from ibau_jax.cli.job import Subject, attack_on, load_images, load_subject, settled
from ibau_jax.cli.options import DataOptions, ModelOptions
from ibau_jax.cli.progress import Bar
from ibau_jax.cli.run_folder import versions
from ibau_jax.comparison import Key, Outcome, Trial, as_csv, as_markdown, check_methods, key_of, outcome_of, rows
from ibau_jax.config import check_seed
from ibau_jax.data import Dataset, split_dataset
from ibau_jax.errors import ConfigError, IbauError
from ibau_jax.files import check_writable, exclusive, put_all_in_place, staging_folder, write_text
from ibau_jax.interruption import deferred_signals
from ibau_jax.json_files import read_json, write_json
from ibau_jax.metrics import Metrics, check_measurable, evaluate
from ibau_jax.triggers import Attack

OUTCOMES, MARKDOWN, CSV, PLOT = "outcomes.json", "table.md", "table.csv", "table.png"
SOME_FAILED = 1


def run(options: CompareOptions) -> int:
    """Runs `scripts/compare.py` and returns its exit code: 1 where some runs failed.

    Raises:
        IbauError: the input is to blame.
    """
    check_methods(options.methods)
    for seed in options.seed:
        check_seed(seed)
    check_writable(options.out / OUTCOMES)
    with exclusive(options.out):
        return _run(options)


def _run(options: CompareOptions) -> int:
    outcomes = restored(options.out / OUTCOMES)
    start(options.device)
    subjects = loaded_by_name(options)
    keys = (
        key_of(name, method, n_clean, seed, options.epochs)
        for n_clean, seed, name, method in itertools.product(options.n_clean, options.seed, subjects, options.methods)
    )

    @functools.lru_cache(maxsize=1)  # its methods come one after the other
    def trial(name: str, n_clean: int, seed: int) -> Trial:
        return trial_of(*subjects[name], n_clean, seed, options.evaluated)

    failed = run_each(
        options.out, outcomes, keys, lambda key: one_run(key, trial(key.checkpoint, key.n_clean, key.seed))
    )
    if not outcomes:
        raise ConfigError("no run succeeded")
    write(options.out, outcomes)  # those of an earlier command may have been edited
    console.console.print(console.comparison_table(rows(outcomes)))
    console.console.print(f"tables: {options.out / MARKDOWN}", soft_wrap=True)
    return SOME_FAILED if failed else 0


def run_each(folder: Path, outcomes: list[Outcome], keys: Iterable[Key], run_one: Callable[[Key], Outcome]) -> int:
    """Runs those of `keys` that `outcomes` lacks, adds what comes of them, and writes the tables after each.

    Returns:
        How many failed; a line says why.
    """
    failed = 0
    for key in keys:
        if key in {outcome.key for outcome in outcomes}:
            continue
        try:
            outcomes.append(run_one(key))
        except IbauError as error:
            failed += 1
            console.warn(f"{titled(key)}: {error}")
            continue
        write(folder, outcomes)
    return failed


def titled(key: Key) -> str:
    """What a run is called."""
    name, method, n_clean, seed, _ = key
    return f"{name}, {method}, {n_clean} images, seed {seed}"


def loaded_by_name(options: CompareOptions) -> dict[str, tuple[Subject, Dataset, Attack]]:
    """All checkpoints, by what tables call them.

    Raises:
        ConfigError: two are called the same; or see `loaded`.
    """
    found: dict[str, tuple[Subject, Dataset, Attack]] = {}
    for model in options.subject.each():
        subject, images, attack = loaded(options, model)
        name = name_of(subject.path)
        if name in found:
            raise ConfigError(f"{found[name][0].path} and {subject.path} are both {name} in the tables; rename one")
        found[name] = subject, images, attack
    return found


def name_of(path: Path) -> str:
    """What tables call a checkpoint: its name, with its folder's where that is always the same."""
    generic = path.stem in ("model", "attack_result") or is_flax_checkpoint(path)
    return f"{path.absolute().parent.name}/{path.name}" if generic else path.stem


def loaded(options: CompareOptions, model: ModelOptions) -> tuple[Subject, Dataset, Attack]:
    """A checkpoint with its images and its attack."""
    subject = load_subject(model)
    attack = attack_on(subject, options.attack)
    if attack is None:
        raise ConfigError(f"{subject.path} names no attack; name the one to measure by --attack")
    images = load_images(DataOptions(options.dataset, class_order=options.class_order), subject)
    largest = max(options.n_clean)
    if largest >= len(images):
        raise ConfigError(f"--n-clean {largest} of {len(images)} images leaves none to evaluate on")
    for n_clean, seed in itertools.product(options.n_clean, options.seed):
        others = split_dataset(images, n_clean, seed).evaluation.first(options.evaluated)
        check_measurable(attack, others, subject.checkpoint.num_classes)
    return settled(subject, images, model.force), images, attack


def trial_of(subject: Subject, images: Dataset, attack: Attack, n_clean: int, seed: int, evaluated: int) -> Trial:
    """A checkpoint with some of the images to unlearn, and up to `evaluated` others to measure on."""
    split = split_dataset(images, n_clean, seed)
    others = split.evaluation.first(evaluated)
    return Trial(subject.model, split.clean_set, lambda model: evaluate(model, others, attack))


def one_run(key: Key, trial: Trial) -> Outcome:
    """Defends a model, measures it before and after, and says what came of it."""
    with Bar() as bar:
        task = bar.add_task(titled(key), total=None)
        outcome = outcome_of(
            key,
            trial,
            on_step=lambda done, count: bar.update(task, completed=done, total=count),
        )
    before, after = outcome.before, outcome.after
    console.console.print(
        f"{titled(key)}: ACC {console.percent(before.acc)} → "
        f"{console.percent(after.acc)}, ASR {console.percent(before.asr)} → {console.percent(after.asr)}, "
        f"DER {console.percent(outcome.der)}, {outcome.seconds:.0f} s",
        soft_wrap=True,
    )
    return outcome


def restored(file: Path) -> list[Outcome]:
    """The outcomes of an earlier command, if any.

    Raises:
        ConfigError: the file holds something else.
    """
    if not file.exists():
        return []
    try:
        outcomes = [
            Outcome(**{**one, "before": Metrics.of(one["before"]), "after": Metrics.of(one["after"])})
            for one in read_json(file)["outcomes"]
        ]
        if any(None in (metrics.asr, metrics.ra) for one in outcomes for metrics in (one.before, one.after)):
            raise ValueError("an ASR is missing")
        return outcomes
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no file of outcomes ({str(error)[:200]}); choose another --out") from error


def write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes the tables and the plot."""
    with deferred_signals(), staging_folder(folder / OUTCOMES) as staging:
        write_text(staging / MARKDOWN, as_markdown(outcomes))
        write_text(staging / CSV, as_csv(outcomes))
        plot(outcomes, staging / PLOT)
        content = {
            "device": device_name(),
            "versions": versions(),
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        write_json(staging / OUTCOMES, content, indent=1)
        put_all_in_place(staging, folder, (OUTCOMES, MARKDOWN, CSV, PLOT))  # the others are made of the first one


def plot(outcomes: Sequence[Outcome], file: Path) -> None:
    """Mean DER of each method with its deviation, a panel for each number of clean images."""
    from matplotlib.figure import Figure

    found = rows(outcomes)
    sizes = list(dict.fromkeys(row["n_clean"] for row in found))
    figure = Figure(
        figsize=(4.6 * len(sizes), 0.9 + 0.42 * len({row["method"] for row in found})), layout="constrained"
    )
    for axis, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        some = [row for row in found if row["n_clean"] == size][::-1]
        names, means = [row["method"] for row in some], [100 * row["der"] for row in some]
        axis.barh(
            names, means, xerr=[100 * row["der_sd"] for row in some], color="#4477aa", ecolor="#222222", capsize=3
        )
        for place, mean in enumerate(means):
            axis.text(2, place, f"{mean:.1f}", va="center", color="white", fontsize=8)
        axis.set_xlim(0, 105)
        axis.set_title(f"{size} clean images", fontsize=10)
        axis.set_xlabel("DER in %: mean and deviation over checkpoints and seeds", fontsize=8)
    figure.savefig(file, dpi=150)
