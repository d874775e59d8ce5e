"""Where images come from, and which of them unlearn."""

from ibau_jax.data.dataset import Dataset, make_dataset
from ibau_jax.data.sources import load_dataset
from ibau_jax.data.split import Split, separate_clean_set, split_dataset

__all__ = ["Dataset", "Split", "load_dataset", "make_dataset", "separate_clean_set", "split_dataset"]
