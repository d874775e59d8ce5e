"""Other defences than I-BAU, to compare with: one file each."""

from ibau_jax.defences import anp, fine_pruning, fine_tuning, ft_sam, nad, neural_cleanse, sau
from ibau_jax.defences.registry import Defence, defence, defences, get_defence
from ibau_jax.defences.tuning import TuneConfig

__all__ = [
    "Defence",
    "TuneConfig",
    "anp",
    "defence",
    "defences",
    "fine_pruning",
    "fine_tuning",
    "ft_sam",
    "get_defence",
    "nad",
    "neural_cleanse",
    "sau",
]
