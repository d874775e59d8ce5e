"""An interrupted unlearning run: its state after each of the last rounds (see `ibau_jax.cli.stored`).

Everything random is drawn from the seed and the number of the round, and the order of the data from the seed, so they
need no keeping.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from ibau_jax.aims import Suspects
from ibau_jax.checkpoints.conversion import Leaves
from ibau_jax.cli.stored import Content, StoredSteps, leaves_of_tree, tree_of_leaves
from ibau_jax.metrics import Metrics
from ibau_jax.result import Round, Standing, State

FIGURES = ("perturbation_norm", "inner_loss", "outer_loss", "seconds", "undone")


class StoredRun(StoredSteps):
    """An interrupted run's states."""

    def __init__(self, results: Path, identity: Content) -> None:
        super().__init__(results, identity, "round")

    def store_state(self, state: State, found: Content) -> None:
        """Stores the state after a round and what was `found` (`before`, `rounds`); see `StoredSteps.store`."""
        content = {
            "initial": _as_json(state.initial),
            "mirrored": state.mirrored,
            "rehearsed": [_as_json(standing) for standing in state.rehearsed],
            "pace": state.pace,
            **found,
        }
        self.store(len(state.rounds), _leaves_of(state), content)

    def restore_state(self, fresh: State) -> tuple[State, Metrics, list[dict[str, Any]]]:
        """The last stored state that is whole, the original model's figures, and the rounds as result.json has them.

        `fresh` is the state before the first round.

        Raises:
            ConfigError: see `StoredSteps.restore`.
        """
        return self.restore(
            lambda leaves, content: (
                _restored(fresh, leaves, content),
                Metrics.of(content["before"]),
                [{**record, **asdict(Metrics.of(record))} for record in content["rounds"]],
            )
        )


def _as_json(standing: Standing | None) -> dict[str, Any] | None:
    return asdict(standing) if standing else None


def _leaves_of(state: State) -> Leaves:
    leaves = leaves_of_tree("model", nnx.state(state.model)) | leaves_of_tree("optimizer", state.optimizer_state)
    if state.best is not None:
        leaves |= leaves_of_tree("best", nnx.state(state.best))
    leaves |= {("perturbation", done.number): done.perturbation for done in state.rounds}
    if state.suspects:
        leaves |= {("suspects", name): np.asarray(value) for name, value in vars(state.suspects).items()}
    return leaves


def _restored(fresh: State, leaves: Leaves, stored: Content) -> State:
    graph, weights = nnx.split(fresh.model)
    rounds = list(range(1, len(stored["rounds"]) + 1))
    if [record["round"] for record in stored["rounds"]] != rounds:
        raise ValueError("rounds are missing")
    if {path[1] for path in leaves if path[0] == "perturbation"} != set(rounds):
        raise ValueError("there are perturbations of more or fewer rounds than figures")
    suspects = {path[1]: leaf for path, leaf in leaves.items() if path[0] == "suspects"}
    return State(
        nnx.merge(graph, tree_of_leaves("model", weights, leaves)),
        tree_of_leaves("optimizer", fresh.optimizer_state, leaves),
        tuple(_round(record, leaves["perturbation", record["round"]]) for record in stored["rounds"]),
        Suspects(**suspects) if suspects else None,
        _standing(stored["initial"]),
        bool(stored["mirrored"]),
        nnx.merge(graph, tree_of_leaves("best", weights, leaves)) if ("best", 0) in leaves else None,
        tuple(Standing(**standing) for standing in map(_numbers, stored["rehearsed"])),
        float(stored["pace"]),
    )


def _standing(record: dict[str, Any] | None) -> Standing | None:
    return Standing(**_numbers(record)) if record else None


def _round(record: dict[str, Any], perturbation: np.ndarray) -> Round:
    figures = _numbers({name: record[name] for name in FIGURES})
    return Round(record["round"], perturbation, standing=_standing(record["standing"]), **figures)


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """The record, TypeError unless all its values are numbers."""
    if not all(isinstance(value, (int, float)) for value in record.values()):
        raise TypeError("a figure is no number")
    return record
