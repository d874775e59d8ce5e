"""Options of scripts/unlearn.py: the method, and all groups together."""

import itertools
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

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
from ibau_jax.config import Mirror, Schedule, Solver, Space, SpaceName, UnlearnConfig
from ibau_jax.errors import ConfigError
from ibau_jax.presets import PRESETS

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
    preset: Literal["robust", "cifar10", "gtsrb", "backdoorbench", "backdoor-toolbox"] = "robust"
    """robust: what cleans best (docs/experiments.md); or the published command line's settings (cifar10), the published
    GTSRB notebook's (gtsrb), or those of BackdoorBench and backdoor-toolbox (docs/presets.md has all in a table)"""
    n_rounds: Annotated[int | None, option("N", "robust, -toolbox 3, gtsrb 1, others 5")] = None
    """rounds of inner maximisation and outer minimisation"""
    batch_size: Annotated[int | None, option("N", "backdoorbench 256, others 100")] = None
    """clean images in a batch"""
    K: Annotated[int | None, option("N", "robust 1, published 5")] = None
    """terms of the Neumann series, or iterations of another --solver; 0 leaves the implicit term out"""
    optim: Annotated[str | None, option("NAME", "backdoorbench amsgrad, others adam")] = None
    """optimiser of the weights: adam, sgd or any optax optimiser"""
    lr: Annotated[
        tuple[float, ...] | None, option("X [X ...]", "robust 8e-4, -bench 1e-4, -toolbox 5e-4, others 0.001")
    ] = None
    """learning rate of the weights; each of several is tried"""
    inner_optim: Annotated[str | None, option("NAME", "gtsrb adam, others sgd")] = None
    """optimiser of untargeted perturbations"""
    inner_lr: Annotated[float | None, option("X", "gtsrb 1, others 10")] = None
    """learning rate of untargeted perturbations"""
    norm_bound: Annotated[float | None, option("X", "gtsrb 10, others none")] = None
    """radius of the l2 ball that untargeted perturbations are projected onto; with players, the largest norm tried"""
    clip: Annotated[bool | None, option("True|False", "gtsrb True, others False")] = None
    """clip images with an untargeted perturbation to [0, 1]; with one of a player they always are"""
    space: Annotated[Space | None, option("pixel|normalized", "backdoor... normalized, others pixel")] = None
    """what the perturbation is added to: images in [0, 1], or images after --normalize"""
    shuffle: Annotated[bool | None, option("True|False", "backdoor... True, others False")] = None
    """find the perturbation on the images in a new order in each round"""
    portion: Annotated[float | None, option("X", "robust 0.4, published 0.01")] = None
    """share of each batch that is perturbed"""
    min_batches: Annotated[int | None, option("N", "robust 20, published 1")] = None
    """if more than 1, a round has at least so many batches and all are full: images are drawn anew when used up"""
    b2: Annotated[float | None, option("X", "robust 0.95, published 0.999")] = None
    """decay of Adam's second moment in a step; optimisers without a second moment ignore it"""
    schedule: Annotated[Schedule | None, option("constant|cosine", "robust cosine, published constant")] = None
    """learning rate over the steps of all rounds"""
    distillation: Annotated[float | None, option("X", "robust 10, published 0")] = None
    """weight of the divergence from the original model's probabilities on clean images, where they make one batch; it
    falls with the square root of their number"""
    consistency: Annotated[float | None, option("X", "robust 1, published 0")] = None
    """weight of the same divergence on images that are perturbed, from what the original model says without that"""
    crop: Annotated[int | None, option("N", "robust 2, backdoorbench 4, others 0")] = None
    """pixels by which the images that unlearn may move, anew in each round"""
    mix: Annotated[float | None, option("X", "robust 0.5, others 0")] = None
    """largest share of another image that is mixed into a clean image of the outer step"""
    mirror: Annotated[Mirror | None, option("never|tolerated|always", "robust, -bench tolerated, others never")] = None
    """whether images of the outer step may be mirrored; tolerated: where the original model classifies mirrored ones as
    well"""
    perturbations: Annotated[int | None, option("N", "robust 4, published 1")] = None
    """untargeted perturbations in a round, each on its share of a batch; as many players of a space move in a step"""
    renew: Annotated[bool | None, option("True|False", "robust False, published True")] = None
    """find untargeted perturbations anew in each round; else those of the first round stay"""
    spaces: Annotated[tuple[SpaceName, ...] | None, option("NAME [NAME ...]", "robust all, published none")] = None
    """spaces in which one persistent player a class looks for the smallest perturbation that leads there, and one for
    any other class than an image's own: perturbation, patch, warp, wave (a sum of few plane waves)"""
    enlarge: Annotated[float | None, option("X", "robust 3, published 1")] = None
    """where players are, perturbations in the outer step are made up to so many times as large as they need to be"""
    sharpness: Annotated[float | None, option("X", "robust 4")] = None
    """how much more prominent players matter, p: with r = (median size) / (size), half of the players that move are
    drawn with odds r^p; an image's loss counts (log2 r)^p if one perturbs it, r^p if an untargeted δ does, at most 1"""
    regularization: Annotated[float | None, option("X", "0.001")] = None
    """weight of an untargeted perturbation's squared norm in the inner loss"""
    solver: Annotated[Solver | None, option("neumann|cg|normal_cg|gmres|bicgstab", "neumann")] = None
    """linear solver of the hypergradient"""
    fixed_point_step: Annotated[float | None, option("X", "robust 0.001, others 0.1")] = None
    """step size of the inner gradient step in the hypergradient"""
    seed: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (2,)
    """seed of the clean set's choice and of what is random in the rounds; each of several is tried"""

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
        changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(PRESETS[preset], **changed)


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
