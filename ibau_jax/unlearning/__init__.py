"""I-BAU's minimax: from a model and clean images to a cleaned model."""

from ibau_jax.unlearning.api import Member, check_feasible, stackable, unlearn, unlearn_many
from ibau_jax.unlearning.state import OnBatch, Phase, Result, Round, State, Status, initial_state

__all__ = [
    "Member",
    "OnBatch",
    "Phase",
    "Result",
    "Round",
    "State",
    "Status",
    "check_feasible",
    "initial_state",
    "stackable",
    "unlearn",
    "unlearn_many",
]
