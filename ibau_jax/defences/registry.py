"""Other defences than I-BAU under one interface, to compare with.

To add one, write a file here with a configuration, its paper's constants as defaults, and a function that takes a model
and clean images and gives a model, and decorate it with `@defence(...)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from ibau_jax.data.dataset import Dataset
from ibau_jax.defences.tuning import OnEpoch, TuneConfig
from ibau_jax.errors import ConfigError
from ibau_jax.execution import DEFAULT_EXECUTION, Execution
from ibau_jax.models.inference import count_classes

Run = Callable[[nnx.Module, Dataset, Any, Execution, OnEpoch | None], nnx.Module]  # the third is its own TuneConfig


@dataclass(frozen=True)
class Defence:
    """A defence.

    Attributes:
        name: what `--method` calls it.
        paper: where it is from.
        config: its constants; the paper's, or where that has none BackdoorBench's, are the defaults.
        function: does it.
    """

    name: str
    paper: str
    config: type[TuneConfig]
    function: Run

    def __call__(
        self,
        model: nnx.Module,
        clean_set: Dataset,
        config: TuneConfig | None = None,
        *,
        execution: Execution = DEFAULT_EXECUTION,
        on_epoch: OnEpoch | None = None,
    ) -> nnx.Module:
        """Defends a model.

        Args:
            model: see `ibau_jax.unlearn`. Not changed.
            clean_set: clean images with their true labels.
            config: the defence's constants.
            execution: precision.
            on_epoch: called after every epoch with its number and how many there are.

        Returns:
            The model that it gives, in inference mode.

        Raises:
            DataError: the clean set does not fit the model.
            ConfigError: the defence can't be applied to the model; or a loss became NaN or infinite.
        """
        shape = clean_set.images.shape[1:]
        clean_set.check_fits(shape, count_classes(model, shape))
        return self.function(model, clean_set, config or self.config(), execution, on_epoch)


_DEFENCES: dict[str, Defence] = {}


def defence(name: str, paper: str, config: type[TuneConfig]) -> Callable[[Run], Defence]:
    """Registers a function as a defence."""

    def register(function: Run) -> Defence:
        _DEFENCES[name] = Defence(name, paper, config, function)
        return _DEFENCES[name]

    return register


def defences() -> tuple[Defence, ...]:
    """All registered ones."""
    return tuple(_DEFENCES.values())


def get_defence(name: str) -> Defence:
    """The defence called `name`; ConfigError if there is none."""
    if name not in _DEFENCES:
        raise ConfigError(f"there is no defence {name!r}; choose one of {', '.join(_DEFENCES)}")
    return _DEFENCES[name]
