"""What a checkpoint says of itself in an entry `ibau_jax` beside the weights, so that the command line need not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ibau_jax.data.sources import EMBEDDED
from ibau_jax.triggers import attack_names

KEY = "ibau_jax"


@dataclass(frozen=True)
class Hints:
    """Defaults for the command line; None where the checkpoint does not say.

    The file may be hostile: only embedded data and registered attacks can be named, so a hint reads no file and
    reaches no network.
    """

    dataset: str | None = None
    attack: str | None = None
    target_label: int | None = None


def read_hints(metadata: Mapping[str, Any]) -> Hints:
    """The hints in a checkpoint's metadata; what is no valid hint is left out."""
    entry = metadata.get(KEY)
    entry = entry if isinstance(entry, dict) else {}
    dataset, attack, target = (entry.get(key) for key in ("dataset", "attack", "target_label"))
    return Hints(
        dataset=dataset if isinstance(dataset, str) and dataset.partition(":")[0] in EMBEDDED else None,
        attack=attack if isinstance(attack, str) and attack in attack_names() else None,
        target_label=target if type(target) is int else None,
    )
