"""Options of scripts/unlearn.py: the method, and all groups together."""

import itertools
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from ibau_jax.cli.options import (
    AttackOptions,
    BeforeAfterOptions,
    DataOptions,
    DeviceOptions,
    ExecutionOptions,
    ModelsOptions,
    OutputOptions,
    RelearnOptions,
    option,
)
from ibau_jax.config import NO_MORE_ROUNDS, Mirror, Schedule, Solver, Space, UnlearnConfig
from ibau_jax.errors import ConfigError
from ibau_jax.presets import PRESETS, suited

if TYPE_CHECKING:
    from ibau_jax.defences import TuneConfig

Tuning = TypeVar("Tuning", bound="TuneConfig")


@dataclass(frozen=True)
class MethodOptions:
    """I-BAU, or another method. What is not given is as the preset, or the other method's paper, has it."""

    method: Literal["ibau", "ft", "ft-sam", "fp", "nc", "nad", "anp", "sau"] = "ibau"
    """ibau, or another defence to compare with (docs/defences.md), which takes --epochs, --batch-size, --lr, --crop and
    --seed of the options here, and no preset"""
    epochs: Annotated[int | None, option("N", "100")] = None
    """passes over the clean images, of another method than ibau"""
    preset: Literal[
        "robust", "robust-medium", "robust-few", "cifar10", "gtsrb", "backdoorbench", "backdoor-toolbox"
    ] = "robust"
    """robust: what cleans best (docs/experiments.md), with a short audit that says which class to suspect, and
    robust-medium below 3000 clean images, robust-few below 1000; or the published command line's settings (cifar10),
    the published GTSRB notebook's (gtsrb), or those of BackdoorBench and backdoor-toolbox (docs/presets.md has all in
    a table)"""
    n_rounds: Annotated[int | None, option("N", "robust, -toolbox 3, -medium, -few, gtsrb 1, others 5")] = None
    """rounds"""
    batch_size: Annotated[int | None, option("N", "backdoorbench 256, others 100")] = None
    """clean images in a batch"""
    K: Annotated[int | None, option("N", "robust 1, published 5")] = None
    """terms of the Neumann series, or iterations of another --solver"""
    optim: Annotated[str | None, option("NAME", "backdoorbench amsgrad, others adam")] = None
    """optimiser of the weights: adam, sgd or any optax optimiser"""
    lr: Annotated[
        tuple[float, ...] | None, option("X [X ...]", "0.001 (-medium, -few 8e-4, -bench 1e-4, -toolbox 5e-4)")
    ] = None
    """its learning rate; each of several is tried"""
    inner_optim: Annotated[str | None, option("NAME", "gtsrb adam, others sgd")] = None
    """optimiser of untargeted perturbations; targeted ones go along the gradient"""
    inner_lr: Annotated[float | None, option("X", "gtsrb 1, others 10")] = None
    """its learning rate"""
    norm_bound: Annotated[float | None, option("X", "gtsrb 10, others none")] = None
    """radius of the l2 ball that untargeted perturbations are projected onto"""
    clip: Annotated[bool | None, option("True|False", "gtsrb True, others False")] = None
    """clip perturbed images to [0, 1]"""
    space: Annotated[Space | None, option("pixel|normalized", "backdoor... normalized, others pixel")] = None
    """what the perturbation is added to: images in [0, 1], or images after --normalize"""
    shuffle: Annotated[bool | None, option("True|False", "backdoor... True, others False")] = None
    """find the perturbation on the images in a new order in each round"""
    portion: Annotated[float | None, option("X", "robust 0.2, published 0.01")] = None
    """share of each batch that is perturbed"""
    min_batches: Annotated[int | None, option("N", "robust 20, -medium, -few 40, published 1")] = None
    """a round goes through the clean batches as often as it takes to have so many"""
    schedule: Annotated[Schedule | None, option("constant|cosine", "robust cosine, published constant")] = None
    """learning rate over the rounds"""
    distillation: Annotated[float | None, option("X", "robust 1, -medium, -few 5, published 0")] = None
    """weight of the divergence from what the model as it came says of clean images"""
    crop: Annotated[int | None, option("N", "robust 2, backdoorbench 4, others 0")] = None
    """pixels by which the images that unlearn may move, anew in each round"""
    mix: Annotated[float | None, option("X", "robust-medium, -few 0.5, others 0")] = None
    """share of another image that is mixed into each of them, at most"""
    mirror: Annotated[Mirror | None, option("never|tolerated|always", "robust, -bench tolerated, others never")] = None
    """whether they may be mirrored; tolerated: where the model as it came classifies mirrored ones as well"""
    perturbations: Annotated[int | None, option("N", "robust 2, -medium, -few 4, published 1")] = None
    """perturbations in a round, each on its share of a batch"""
    targeted: Annotated[bool | None, option("True|False", "robust True, published False")] = None
    """whether they lead to suspected targets, instead of away from the labels"""
    untargeted_rounds: Annotated[int | None, option("N", "robust 1, published 0")] = None
    """rounds with untargeted perturbations before those with --targeted ones"""
    untargeted_max_ratio: Annotated[float | None, option("X", "robust 5, published none")] = None
    """none of them where a suspect stands out more: the median class's smallest perturbation is so many times its"""
    untargeted_reach: Annotated[float | None, option("X", "robust 15, -medium, -few 10, published none")] = None
    """norm of an untargeted perturbation, at most, in units of the smallest one that leads to the suspect"""
    suspects: Annotated[int | None, option("N", "1")] = None
    """classes that are suspected: those reached by the smallest perturbations"""
    tied: Annotated[float | None, option("X", "robust 0.1, published 0")] = None
    """and all those whose smallest perturbation is larger than the first one's by no more than this share"""
    suspects_min_ratio: Annotated[float | None, option("X", "robust 2.2, published none")] = None
    """and all those that stand out: the median class's smallest perturbation is so many times theirs"""
    reach: Annotated[tuple[float, float] | None, option("X X", "robust 2 16")] = None
    """norms of targeted perturbations, from and to, in units of the smallest one that leads to the class"""
    regularization: Annotated[float | None, option("X", "robust 0, published 0.001")] = None
    """weight of the perturbation's squared norm"""
    held_out: Annotated[float | None, option("X", "robust, -medium 0.1, others 0")] = None
    """share of the clean images that do not unlearn, but tell which rounds to keep"""
    folds: Annotated[int | None, option("N", "robust-few 3, others 1")] = None
    """instead of --held-out: rehearse the run N times, each without a part of the clean images, which then measures"""
    slower: Annotated[int | None, option("N", "robust-few 2, others 0")] = None
    """with --folds: rehearsals of the first round that cost too much are done again at a quarter of the learning rate,
    so often at most"""
    min_rounds: Annotated[int | None, option("N", "robust 2, others 1")] = None
    """rounds before it may stop"""
    closed: Annotated[float | None, option("X", "0.005")] = None
    """with --held-out or --folds: stop after a round that leaves no larger a share of images following short cuts"""
    more_rounds: Annotated[int | None, option("N", "-medium, -few 2, others 0")] = None
    """with those: rounds beyond the preset's, at most, one at a time, where a suspect stands out and its short cut is
    still open; with --n-rounds 0"""
    more_min_ratio: Annotated[float | None, option("X", "-few 1.4, others 1.6")] = None
    """a suspect stands out where the median class's smallest perturbation is so many times its"""
    left_open: Annotated[float | None, option("X", "0.08")] = None
    """its short cut is open where a larger share of images follow it"""
    hidden_rounds: Annotated[int | None, option("N", "robust 1, published 0")] = None
    """rounds after all others where several stood out, or one still does, towards those that another search finds then:
    some may have been behind the first; with --n-rounds 0"""
    hidden_min_ratio: Annotated[float | None, option("X", "-medium, -few 2.2, others none")] = None
    """it does where the median class's smallest patch is so many times its; without, no patches are looked for"""
    sure_ratios: Annotated[tuple[float, float] | None, option("X X", "-medium, -few 4 10, others none")] = None
    """the first of --more-rounds is done in any case where the median class's is between so many times its"""
    max_acc_drop: Annotated[float | None, option("X", "0.05")] = None
    """with those: a round that leaves accuracy lower than at first by more than this share is taken back"""
    solver: Annotated[Solver | None, option("neumann|cg|normal_cg|gmres|bicgstab", "neumann")] = None
    """linear solver of the hypergradient"""
    fixed_point_step: Annotated[float | None, option("X", "robust 0.001, published 0.1")] = None
    """step size of the inner gradient step in the hypergradient"""
    seed: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (2,)
    """seed of the clean set's choice and of the images perturbed or held out; each of several is tried"""

    def configs(self) -> list[UnlearnConfig]:
        """The preset with what was given on the command line, for each seed and learning rate.

        Raises:
            ConfigError: a value makes no sense.
        """
        sweeps = itertools.product(dict.fromkeys(self.seed), dict.fromkeys(self.lr or (None,)))
        if self.method == "ibau" and self.epochs is not None:
            raise ConfigError("--epochs is of other methods; ibau has rounds (--n-rounds)")
        configs = [self._config(self.preset, seed, lr) for seed, lr in sweeps]
        if not configs:
            raise ConfigError("--seed names no seed")
        return configs

    def suited(self, config: UnlearnConfig, n_clean: int) -> tuple[str, UnlearnConfig]:
        """The preset that holds for so many clean images, and one of `configs` with that preset."""
        preset = suited(self.preset, n_clean)
        return preset, self._config(preset, config.seed, config.lr if self.lr else None)

    def tuning(self, kind: type[Tuning], config: UnlearnConfig) -> Tuning:
        """The constants of another method than ibau, with what was given, and the seed of one of `configs`.

        Raises:
            ConfigError: something was given that it does not take, or makes no sense.
        """
        names = {field.name for field in fields(self)} - {"method", "preset", "seed", "lr"}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name in given.keys() - {"epochs", "batch_size", "crop"}:
            raise ConfigError(f"--{name.replace('_', '-')} says nothing to --method {self.method}; see --help")
        epochs = given.pop("epochs", None)
        given |= {"seed": config.seed} | ({"lr": config.lr} if self.lr else {})
        found = kind(**given)
        return found if epochs is None else found.shortened(epochs)

    def _config(self, preset: str, seed: int, lr: float | None) -> UnlearnConfig:
        given = {field.name: getattr(self, field.name, None) for field in fields(UnlearnConfig)}
        given |= {"seed": seed, "lr": lr}
        planned = {} if self.n_rounds is None else NO_MORE_ROUNDS
        given = planned | {name: value for name, value in given.items() if value is not None}
        return replace(PRESETS[preset], **given)


@dataclass(frozen=True)
class UnlearnOptions:
    """Unlearns a backdoor from a PyTorch image classifier with I-BAU (Zeng et al., ICLR 2022).

    python scripts/unlearn.py --ckpt suspicious.pth --dataset clean.npz --attack badnets --target-label 8

    python scripts/unlearn.py --ckpt models/*.pth --dataset clean.npz --seed 0 1 2

    The published command line's spellings work too: --poi_path, --unl_set, --n_rounds, --batch_size, --log_path.
    """

    subject: ModelsOptions
    data: DataOptions
    attack: AttackOptions
    method: MethodOptions
    audit: BeforeAfterOptions
    relearning: RelearnOptions
    output: OutputOptions
    device: DeviceOptions
    execution: ExecutionOptions
