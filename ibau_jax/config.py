"""The constants of the algorithm, of the audit and of training that a run can change, and what values make sense."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal, get_args

from ibau_jax.errors import ConfigError

Solver = Literal["neumann", "cg", "normal_cg", "gmres", "bicgstab"]
Schedule = Literal["constant", "cosine"]
Mirror = Literal["never", "tolerated", "always"]
Space = Literal["pixel", "normalized"]
SpaceName = Literal["perturbation", "patch", "warp", "wave"]
OPTIMIZERS = ("adam", "amsgrad", "sgd")  # of the presets, known without asking optax
Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True)
class UnlearnConfig:
    """The constants of the minimax. The defaults are the preset `cifar10`.

    Raises:
        ConfigError: a value makes no sense; the message names it.
    """

    # Schedule.
    n_rounds: int = 5
    """rounds of inner maximisation and outer minimisation"""
    batch_size: int = 100
    """clean images in a batch; the last batch may be smaller"""
    min_batches: int = 1
    """if more than 1, a round has at least so many batches and all are full: images are drawn anew when used up"""
    shuffle: bool = False
    """whether the inner maximisation goes through the images in a new order in each round"""
    seed: int = 2
    """seed of what is random in the rounds; the search that players begin with has AuditConfig's"""

    # Untargeted perturbations: the inner maximisation.
    perturbations: int = 1
    """untargeted perturbations in a round, each on its share of a batch; as many players of a space move in a step"""
    renew: bool = True
    """whether untargeted perturbations are found anew in each round; else those of the first round stay"""
    inner_optim: str = "sgd"
    """optimiser of the untargeted perturbations: sgd, adam or any optax optimiser by its name"""
    inner_lr: float = 10.0
    """learning rate of the untargeted perturbations"""
    norm_bound: float | None = None
    """radius C of the ℓ2 ball that untargeted perturbations are projected onto after the inner maximisation; where
    players are, the largest norm that is tried"""
    regularization: float = 0.001
    """weight of ‖δ‖² in the inner loss"""
    clip: bool = False
    """clip images with an untargeted perturbation to [0, 1]"""
    space: Space = "pixel"
    """what an untargeted δ is added to: images in [0, 1], or images after the normalisation inside the model"""
    unit: tuple[float, ...] = ()
    """how far a pixel moves where δ is 1, a number a channel; none for 1. It follows from `space` and the model"""

    # Players: perturbations that lead to a class.
    spaces: tuple[SpaceName, ...] = ()
    """spaces in which one persistent player a class looks for the smallest perturbation that leads there, and one for
    the smallest that leads to any other class than an image's own"""
    enlarge: float = 1.0
    """where players are, perturbations in the outer step are made up to so many times as large as they need to be"""
    sharpness: float = 4.0
    """exponent p of r = (median size) / (size): half of the players that move are drawn with odds r^p; an image's loss
    counts min(1, log2 r)^p where a player perturbs it, and min(1, r)^p where an untargeted perturbation does"""

    # The outer minimisation.
    optim: str = "adam"
    """optimiser of the model's weights: adam, sgd or any optax optimiser by its name"""
    lr: float = 1e-3
    """learning rate of the model's weights"""
    b2: float | None = None
    """decay of Adam's second moment in a step; none for 0.999. Optimisers without a second moment ignore it"""
    schedule: Schedule = "constant"
    """learning rate over the steps of all rounds: constant, or falling along a cosine to 0"""
    portion: float = 0.01
    """share of each batch that is perturbed in the outer step, at least one image"""
    K: int = 5
    """terms of the Neumann series (iterations of the other linear solvers); 0 leaves the implicit term out"""
    solver: Solver = "neumann"
    """linear solver of the implicit hypergradient"""
    fixed_point_step: float = 0.1
    """step size η of the gradient step Φ whose fixed point the perturbation is taken for"""
    distillation: float = 0.0
    """weight of the divergence from the original model's probabilities on images that are not perturbed, where they
    make one batch; it falls with the square root of their number"""
    consistency: float = 0.0
    """weight of the divergence on perturbed images, from the original model's probabilities of the image as it was"""
    crop: int = 0
    """pixels by which the images of the outer step may move, anew in each round"""
    mix: float = 0.0
    """largest share of another image that is mixed into an image that is not perturbed (Zhang et al., 2018)"""
    mirror: Mirror = "never"
    """whether images may be mirrored: never, always, or where the original model classifies mirrored ones as well"""

    def __post_init__(self) -> None:
        _require_whole(self)
        _require_each(self, ("n_rounds", "batch_size", "min_batches", "perturbations"), _AT_LEAST_1)
        _require(
            self.perturbations <= self.batch_size,
            f"perturbations is {self.perturbations}; each takes images of its own, and a batch has {self.batch_size}",
        )
        _require_each(self, ("lr", "inner_lr", "fixed_point_step"), _POSITIVE)
        _require(self.b2 is None or 0 < self.b2 < 1, f"b2 is {self.b2}; it must be between 0 and 1 (or none)")
        _require(0 <= self.mix <= 0.5, f"mix is {self.mix}; it must be in [0, 0.5]")
        _require(self.schedule in get_args(Schedule), f"schedule is {self.schedule!r}; choose constant or cosine")
        _require(self.solver in get_args(Solver), f"solver is {self.solver!r}; choose {', '.join(get_args(Solver))}")
        _require(self.space in get_args(Space), f"space is {self.space!r}; choose pixel or normalized")
        _require(self.mirror in get_args(Mirror), f"mirror is {self.mirror!r}; choose never, tolerated or always")
        for space in self.spaces:
            known = ", ".join(get_args(SpaceName))
            _require(space in get_args(SpaceName), f"spaces has {space!r}; choose some of {known}")
        _require(
            not self.spaces or "perturbation" in self.spaces,
            "untargeted perturbations are compared with players of the space perturbation; add it to spaces",
        )
        _require(
            self.space == "pixel" or not self.spaces,
            "untargeted perturbations are compared with players in the image range; space normalized has no players",
        )
        _require(
            self.solver == "neumann" or not self.K or (self.renew and not self.spaces),
            f"solver {self.solver} has no solution where players wait or untargeted perturbations stay; choose neumann",
        )
        _require(not self.unit or self.space == "normalized", "unit is of a δ that is added to normalised images")
        _require(1 <= self.enlarge < float("inf"), f"enlarge is {self.enlarge}; it must be at least 1, and finite")
        _require(0 < self.portion <= 1, f"portion is {self.portion}; it must be in (0, 1]")
        _require_each(self, ("K", "regularization", "distillation", "consistency", "crop", "sharpness"), _NOT_NEGATIVE)
        _require_each(self, ("norm_bound",), _POSITIVE_OR_NONE)
        check_seed(self.seed)
        for name in ("optim", "inner_optim"):
            _require_optimizer(getattr(self, name))


def _require_optimizer(name: str) -> None:
    """Optax knows the names; importing it, and JAX with it, takes seconds that the presets' need not cost --help."""
    if name.lower() not in OPTIMIZERS:
        from ibau_jax.optimizers import make_optimizer

        make_optimizer(name, 0.1)


@dataclass(frozen=True)
class AuditConfig:
    """How hard an audit looks. benchmarks/NOTEBOOK.md says on which models the defaults were chosen.

    Raises:
        ConfigError: a value makes no sense; the message names it.
    """

    steps: int = 51
    """steps of the search for the smallest triggers, rounded up to a multiple of three; classes that can't decide an
    audit do a third of them"""
    batch_size: int = 16
    """random clean images in a step"""
    success: float = 0.9
    """share of images of other classes that a trigger must take to its class"""
    rate: float = 0.2
    """share by which the size allowed shrinks after a step that succeeds, and grows after one that does not; from the
    second third of the steps on it falls to a tenth of this value"""
    search_images: int = 500
    """clean images to search on, at most"""
    held_out_images: int = 200
    """other clean images to measure on, at most"""
    seed: int = 0
    """seed of the order of images and of the first triggers"""

    def __post_init__(self) -> None:
        _require_whole(self)
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
        _require_whole(self)
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
        _require_whole(self)
        _require_each(self, ("triggered", "epochs", "batch_size"), _AT_LEAST_1)
        _require_each(self, ("momentum",), _NOT_NEGATIVE)
        _require_each(self, ("lr",), _POSITIVE)
        check_seed(self.seed)


Rule = tuple[Callable[[Any], bool], str]
_AT_LEAST_1: Rule = (lambda value: value >= 1, "must be at least 1")
_POSITIVE: Rule = (lambda value: 0 < value < float("inf"), "must be positive")
_POSITIVE_OR_NONE: Rule = (lambda value: value is None or 0 < value < float("inf"), "must be positive (or none)")
_NOT_NEGATIVE: Rule = (lambda value: 0 <= value < float("inf"), "must not be negative or infinite")
_SHARE: Rule = (lambda value: 0 < value < 1, "must be between 0 and 1")


def check_seed(seed: int) -> None:
    """Raises ConfigError unless NumPy and JAX both take `seed`."""
    _require(0 <= seed < 2**32, f"seed is {seed}; it must be at least 0 and less than 2**32")


def _require_whole(config: Any) -> None:
    """Requires whole numbers where a field is one; 20.0 is none, since it can't count."""
    for one in fields(config):
        value = getattr(config, one.name)
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        _require(one.type is not int or whole, f"{one.name} is {value!r}; it must be a whole number")


def _require_each(config: object, names: tuple[str, ...], rule: Rule) -> None:
    holds, text = rule
    for name in names:
        _require(holds(getattr(config, name)), f"{name} is {getattr(config, name)}; it {text}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
