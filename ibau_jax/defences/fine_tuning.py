"""FT: fine-tuning on clean images, what everything else has to beat."""

from flax import nnx

from ibau_jax.data.dataset import Dataset
from ibau_jax.defences.registry import defence
from ibau_jax.defences.tuning import OnEpoch, TuneConfig, tuned
from ibau_jax.execution import Execution


@defence("ft", "BackdoorBench (Wu et al., NeurIPS 2022), defense/ft.py", TuneConfig)
def fine_tune(
    model: nnx.Module, clean_set: Dataset, config: TuneConfig, execution: Execution, on_epoch: OnEpoch | None
) -> nnx.Module:
    """Fine-tunes."""
    return tuned(model, clean_set, config, execution=execution, on_epoch=on_epoch)
