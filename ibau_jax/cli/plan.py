"""The runs a command line asks for: every checkpoint with every seed and learning rate, each in its own folder."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ibau_jax.cli.options import ModelOptions
from ibau_jax.config import UnlearnConfig
from ibau_jax.errors import ConfigError

RUNS = Path("runs")


@dataclass(frozen=True)
class Planned:
    """One run: a checkpoint, a configuration, and the folder of its results."""

    subject: ModelOptions
    config: UnlearnConfig
    folder: Path

    @property
    def name(self) -> str:
        """What the screen calls it."""
        return self.folder.name


def plan_runs(subjects: list[ModelOptions], configs: list[UnlearnConfig], out: Path | None) -> list[Planned]:
    """One run has its results in `out` or runs/NAME; several have theirs in folders below `out` or runs."""
    if len(subjects) == len(configs) == 1:
        folder = out or RUNS / subjects[0].ckpt.absolute().stem
        return [Planned(subjects[0], configs[0], folder)]
    names = _names([subject.ckpt for subject in subjects])
    return [
        Planned(subject, config, (out or RUNS) / (name + _suffix(config, configs)))
        for subject, name in zip(subjects, names, strict=True)
        for config in configs
    ]


def _names(paths: list[Path]) -> list[str]:
    """The files' names, with those of their folders as far as it takes to tell them apart (many are `model.pth`).

    Raises:
        ConfigError: a file is named twice.
    """
    whole = [path.absolute() for path in paths]
    deepest = max(len(path.parts) for path in whole)
    tries = [[path.stem for path in whole], [path.name.replace(".", "-") for path in whole]]
    tries += [["-".join([*path.parts[-depth:-1], path.stem]) for path in whole] for depth in range(2, deepest)]
    for names in tries:
        if len(set(names)) == len(names):
            return names
    raise ConfigError("--ckpt names a checkpoint twice")


def _suffix(config: UnlearnConfig, configs: list[UnlearnConfig]) -> str:
    seeds, rates = Counter(other.seed for other in configs), Counter(other.lr for other in configs)
    seed = f"-seed{config.seed}" if len(seeds) > 1 else ""
    return seed + (f"-lr{config.lr:g}" if len(rates) > 1 else "")
