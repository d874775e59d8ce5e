"""Every constant of the algorithm, of the audit and of training, and what values make sense."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ibau_jax.errors import ConfigError

Solver = Literal["neumann", "cg", "normal_cg", "gmres", "bicgstab"]
Schedule = Literal["constant", "cosine"]
Mirror = Literal["never", "tolerated", "always"]
Space = Literal["pixel", "normalized"]
Precision = Literal["float32", "tf32", "bfloat16"]

NO_MORE_ROUNDS: dict[str, Any] = {"more_rounds": 0, "hidden_rounds": 0}  # than `n_rounds`


@dataclass(frozen=True)
class UnlearnConfig:
    """The choices that docs/design.md's algorithm leaves open. The defaults are the preset `cifar10`.

    Raises:
        ConfigError: a value makes no sense; the message names it.
    """

    n_rounds: int = 5
    """rounds of inner maximisation and outer minimisation"""
    batch_size: int = 100
    """clean images in a batch; the last batch may be smaller"""
    K: int = 5
    """terms of the Neumann series (iterations of the other linear solvers)"""
    solver: Solver = "neumann"
    """linear solver of the implicit hypergradient"""
    fixed_point_step: float = 0.1
    """step size η of the gradient step Φ whose fixed point the perturbation is taken for"""
    optim: str = "adam"
    """optimiser of the model's weights: adam, sgd or any optax optimiser by its name"""
    lr: float = 1e-3
    """its learning rate"""
    portion: float = 0.01
    """share of each batch that is perturbed in the outer step, at least one image"""
    clip: bool = False
    """clip perturbed images to [0, 1]"""
    space: Space = "pixel"
    """what δ is added to: images in [0, 1], or images after the normalisation that is inside the model"""
    unit: tuple[float, ...] = ()
    """how far a pixel moves where δ is 1, a number a channel; none for 1. It follows from `space` and the model"""
    shuffle: bool = False
    """whether the inner maximisation goes through the images in a new order in each round"""
    inner_optim: str = "sgd"
    """optimiser of the perturbation: sgd, adam or any optax optimiser by its name"""
    inner_lr: float = 10.0
    """its learning rate"""
    norm_bound: float | None = None
    """radius C of the ℓ2 ball that the perturbation is projected onto after the inner maximisation"""
    regularization: float = 0.001
    """weight of ‖δ‖² in the inner loss"""
    min_batches: int = 1
    """a round goes through the clean batches as often as it takes to have so many"""
    schedule: Schedule = "constant"
    """learning rate of the rounds: the same for all, or falling along a cosine"""
    distillation: float = 0.0
    """weight of the divergence from what the model as it came says of images that are not perturbed"""
    crop: int = 0
    """pixels by which the images of the outer step may move, anew in each round"""
    mix: float = 0.0
    """share of another image that is mixed into each of them, at most (Zhang et al., 2018)"""
    mirror: Mirror = "never"
    """whether they may be mirrored: never, always, or where the model as it came classifies mirrored ones as well"""
    perturbations: int = 1
    """perturbations in a round, each on its share of a batch"""
    targeted: bool = False
    """whether they lead to suspected targets, instead of away from the labels as the published one"""
    untargeted_rounds: int = 0
    """rounds with untargeted perturbations before those with targeted ones"""
    untargeted_max_ratio: float | None = None
    """none of them where a suspect stands out more: the median class's smallest perturbation is so many times its"""
    untargeted_reach: float | None = None
    """norm of an untargeted perturbation, at most, in units of the smallest one that leads to the suspect"""
    suspects: int = 1
    """classes that are suspected: those reached by the smallest perturbations"""
    tied: float = 0.0
    """and those whose smallest perturbation is larger than the first one's by no more than this share, as many as there
    are perturbations"""
    suspects_min_ratio: float | None = None
    """and those that stand out by themselves: the median class's smallest perturbation is so many times theirs"""
    reach: tuple[float, float] = (2.0, 8.0)
    """norms of targeted perturbations, from and to, in units of the smallest one that leads to the class"""
    held_out: float = 0.0
    """share of the clean set that does not unlearn, but tells which rounds to keep"""
    folds: int = 1
    """where none is held out and this is above 1: rehearsals of the run, each without a part of the clean set, which
    then measures"""
    slower: int = 0
    """where rehearsals of the first round cost too much accuracy they are done again at a quarter of the learning rate,
    so often at most"""
    min_rounds: int = 1
    """rounds before it may stop"""
    closed: float = 0.005
    """unlearning stops after a round that leaves no larger a share of images following the suspects' short cuts"""
    more_rounds: int = 0
    """rounds beyond `n_rounds`, at most, one at a time: where a suspect stands out and its short cut is still open"""
    more_min_ratio: float = 1.6
    """it stands out where the median class's smallest perturbation is so many times its; without a backdoor further
    rounds cost accuracy and mend nothing"""
    left_open: float = 0.08
    """and is open where a larger share of images follow it"""
    hidden_rounds: int = 0
    """rounds after all these where several stood out (`suspects_min_ratio`) or one still does (`hidden_min_ratio`):
    suspects are searched for again, and those that may have been behind the first are aimed at"""
    hidden_min_ratio: float | None = None
    """it does where the median class's smallest patch is so many times its; without, no patches are looked for"""
    sure_ratios: tuple[float, float] | None = None
    """the first of these rounds is done in any case where the median class's is between so many times the suspect's:
    what an attacker stamps is larger than the short cut that is closed first"""
    max_acc_drop: float = 0.05
    """a round that leaves the held-out accuracy lower than at first, or than before the last search for suspects, by
    more than this share, and by more than chance may, is taken back"""
    seed: int = 2
    """seed of the choice of perturbed and of held-out images, and of the norms of targeted perturbations"""

    @property
    def needs_suspects(self) -> bool:
        """Whether unlearning has to know which classes are suspected."""
        return bool(self.targeted or self.held_out or self.folds > 1 or self.untargeted_reach)

    def of_round(self, number: int) -> "UnlearnConfig":
        """What holds for one round: the first ones may have untargeted perturbations."""
        return replace(self, targeted=False) if number <= self.untargeted_rounds else self

    def __post_init__(self) -> None:
        _require_each(
            self,
            ("n_rounds", "batch_size", "K", "min_batches", "perturbations", "suspects", "folds", "min_rounds"),
            _AT_LEAST_1,
        )
        _require_each(self, ("lr", "inner_lr", "fixed_point_step"), _POSITIVE)
        _require(0 <= self.mix <= 0.5, f"mix is {self.mix}; it must be in [0, 0.5]")
        _require(self.schedule in get_args(Schedule), f"schedule is {self.schedule!r}; choose constant or cosine")
        _require(self.space in get_args(Space), f"space is {self.space!r}; choose pixel or normalized")
        _require(
            self.space == "pixel" or not (self.targeted or self.untargeted_reach),
            "norms in units of the suspect's perturbation are those of pixels; with space normalized leave out "
            "targeted and untargeted_reach",
        )
        _require(self.mirror in get_args(Mirror), f"mirror is {self.mirror!r}; choose never, tolerated or always")
        for name in ("reach", "sure_ratios"):
            low, high = getattr(self, name) or (1.0, 1.0)
            _require(
                0 < low <= high, f"{name} is {low}, {high}; it must be two positive numbers, the smaller one first"
            )
        _require(0 < self.portion <= 1, f"portion is {self.portion}; it must be in (0, 1]")
        _require(0 <= self.held_out < 1, f"held_out is {self.held_out}; it must be at least 0 and less than 1")
        _require(
            not self.held_out or self.folds == 1, "held_out and folds both ask for images that measure; choose one"
        )
        _require_each(
            self,
            (
                "tied",
                "regularization",
                "distillation",
                "crop",
                "untargeted_rounds",
                "closed",
                "more_rounds",
                "left_open",
                "hidden_rounds",
                "max_acc_drop",
            ),
            _NOT_NEGATIVE,
        )
        _require_each(
            self,
            ("norm_bound", "untargeted_max_ratio", "untargeted_reach", "suspects_min_ratio", "hidden_min_ratio"),
            _POSITIVE_OR_NONE,
        )
        check_seed(self.seed)
        for name in ("optim", "inner_optim"):
            _require_optimizer(getattr(self, name))


def _require_optimizer(name: str) -> None:
    """Optax knows the names; importing it, and JAX with it, takes seconds that the presets' need not cost --help."""
    if name.lower() not in ("adam", "amsgrad", "sgd"):
        from ibau_jax.optimizers import make_optimizer

        make_optimizer(name, 0.1)


@dataclass(frozen=True)
class AuditConfig:
    """How hard an audit looks. The defaults were chosen on the models of docs/experiments.md.

    Raises:
        ConfigError: a value makes no sense; the message names it.
    """

    steps: int = 100
    """steps of the search for each class's smallest trigger"""
    batch_size: int = 16
    """random clean images in a step"""
    success: float = 0.9
    """share of images of other classes that a trigger must take to its class"""
    rate: float = 0.1
    """share by which the size allowed shrinks after a step that succeeds, and grows after one that does not; it falls
    to a tenth of it"""
    search_images: int = 500
    """clean images to search on, at most"""
    held_out_images: int = 200
    """other clean images to measure on, at most"""
    seed: int = 0
    """seed of the order of images and of the first triggers"""

    def __post_init__(self) -> None:
        _require_each(self, ("steps", "batch_size", "search_images", "held_out_images"), _AT_LEAST_1)
        _require_each(self, ("success", "rate"), _SHARE)
        check_seed(self.seed)


@dataclass(frozen=True)
class TrainConfig:
    """How `ibau_jax.training` trains.

    Raises:
        ConfigError: a value makes no sense; the message names it.
    """

    epochs: int = 12
    """passes over the images; a remainder smaller than a batch is left out of each"""
    batch_size: int = 128
    """images in a step"""
    lr: float = 0.1
    """the largest learning rate, reached after a quarter of the steps"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float = 5e-4
    """of kernels"""
    crop: int = 4
    """pixels by which an image may move"""
    flip: bool = False
    """whether images may be mirrored"""
    seed: int = 0
    """seed of everything random"""

    def __post_init__(self) -> None:
        _require_each(self, ("epochs", "batch_size"), _AT_LEAST_1)
        _require_each(self, ("momentum", "weight_decay", "crop"), _NOT_NEGATIVE)
        _require_each(self, ("lr",), _POSITIVE)
        check_seed(self.seed)


@dataclass(frozen=True)
class RelearnConfig:
    """The fine-tuning that tries to bring a backdoor back.

    Raises:
        ConfigError: a value makes no sense.
    """

    triggered: int = 10
    """triggered images beside the clean set"""
    epochs: int = 5
    """passes over all of them"""
    batch_size: int = 100
    """images in a step"""
    lr: float = 0.001
    """learning rate of SGD"""
    momentum: float = 0.9
    """of SGD"""
    seed: int = 0
    """seed of the choice of images and of their order"""

    def __post_init__(self) -> None:
        _require_each(self, ("triggered", "epochs", "batch_size"), _AT_LEAST_1)
        _require_each(self, ("momentum",), _NOT_NEGATIVE)
        _require_each(self, ("lr",), _POSITIVE)
        check_seed(self.seed)


Rule = tuple[Callable[[Any], bool], str]
_AT_LEAST_1: Rule = (lambda value: value >= 1, "must be at least 1")
_POSITIVE: Rule = (lambda value: 0 < value < float("inf"), "must be positive")
_POSITIVE_OR_NONE: Rule = (lambda value: value is None or 0 < value < float("inf"), "must be positive (or none)")
_NOT_NEGATIVE: Rule = (lambda value: value >= 0, "must not be negative")
_SHARE: Rule = (lambda value: 0 < value < 1, "must be between 0 and 1")


def check_seed(seed: int) -> None:
    """Raises ConfigError unless NumPy and JAX both take `seed`."""
    _require(0 <= seed < 2**32, f"seed is {seed}; it must be at least 0 and less than 2**32")


def _require_each(config: object, names: tuple[str, ...], rule: Rule) -> None:
    holds, text = rule
    for name in names:
        _require(holds(getattr(config, name)), f"{name} is {getattr(config, name)}; it {text}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
