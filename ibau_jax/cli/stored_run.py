"""An interrupted unlearning run: its state after each of the last rounds (see `ibau_jax.cli.stored`).

Everything random is drawn from the seed and the number of the round, and the order of the data from the seed, so they
need no keeping.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from ibau_jax.auditing import Suspect
from ibau_jax.checkpoints.conversion import Leaves
from ibau_jax.cli.run_folder import suspects_record
from ibau_jax.cli.stored import Content, StoredSteps, leaves_of_tree, tree_of_leaves
from ibau_jax.config import UnlearnConfig
from ibau_jax.metrics import Metrics
from ibau_jax.models.inference import count_classes
from ibau_jax.unlearning import Round, State
from ibau_jax.unlearning.players import like_players

FIGURES = ("perturbation_norm", "inner_loss", "outer_loss", "seconds")


class StoredRun(StoredSteps):
    """An interrupted run's states."""

    def __init__(self, results: Path, identity: Content) -> None:
        super().__init__(results, identity, "round")

    def store_state(self, state: State, found: Content) -> None:
        """Stores the state after a round and what was `found` (`before`, `rounds`); see `StoredSteps.store`."""
        content = {"mirrored": state.mirrored, "suspects": suspects_record(state.outliers), **found}
        self.store(len(state.rounds), _leaves_of(state), content)

    def restore_state(self, fresh: State, config: UnlearnConfig) -> tuple[State, Metrics, list[dict[str, Any]]]:
        """The last stored state that is whole, the original model's figures, and the rounds as result.json has them.

        `fresh` is the state before the first round.

        Raises:
            ConfigError: see `StoredSteps.restore`.
        """
        return self.restore(
            lambda leaves, content: (
                _restored(fresh, config, leaves, content),
                Metrics.of(content["before"]),
                [{**record, **asdict(Metrics.of(record))} for record in content["rounds"]],
            )
        )


def _leaves_of(state: State) -> Leaves:
    leaves = leaves_of_tree("model", nnx.state(state.model)) | leaves_of_tree("optimizer", state.optimizer_state)
    leaves |= {("perturbation", done.number): done.perturbation for done in state.rounds}
    return leaves | leaves_of_tree("players", state.players)


def _restored(fresh: State, config: UnlearnConfig, leaves: Leaves, stored: Content) -> State:
    graph, weights = nnx.split(fresh.model)
    rounds = list(range(1, len(stored["rounds"]) + 1))
    if [record["round"] for record in stored["rounds"]] != rounds:
        raise ValueError("rounds are missing")
    if {path[1] for path in leaves if path[0] == "perturbation"} != set(rounds):
        raise ValueError("there are perturbations of more or fewer rounds than figures")
    height, width, channels = leaves["perturbation", 1].shape[1:]
    shape = (height, width, channels)
    return State(
        nnx.merge(graph, tree_of_leaves("model", weights, leaves)),
        tree_of_leaves("optimizer", fresh.optimizer_state, leaves),
        tuple(_round(record, leaves["perturbation", record["round"]]) for record in stored["rounds"]),
        tree_of_leaves("players", like_players(config, count_classes(fresh.model, shape), shape), leaves)
        if config.spaces
        else None,
        bool(stored["mirrored"]),
        _suspects(stored["suspects"]),
    )


def _round(record: dict[str, Any], perturbation: np.ndarray) -> Round:
    figures = _numbers({name: record[name] for name in FIGURES})
    return Round(record["round"], perturbation, outliers=_suspects(record["suspects"]), **figures)


def _suspects(records: list[dict[str, Any]]) -> tuple[Suspect, ...]:
    return tuple(
        Suspect(
            space=str(record["space"]),
            **({"label": None} if record["label"] is None else _numbers({"label": record["label"]})),
            **_numbers({name: record[name] for name in ("ratio", "confidence")}),
        )
        for record in records
    )


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """The record, TypeError unless all its values are numbers."""
    if not all(isinstance(value, (int, float)) for value in record.values()):
        raise TypeError("a figure is no number")
    return record
