"""What may be done to all images at once, and how large it is: the spaces that players move in.

The audit, the minimax, Neural Cleanse and the report use the same objects. To add a space, write a file with a frozen
dataclass that has what `PerturbationSpace` says, and add it to `SPACES` and its name to `ibau_jax.config.SpaceName`.
"""

from types import MappingProxyType

from ibau_jax.perturbations.patch import MaskAndPattern, Patch
from ibau_jax.perturbations.pixel import Pixel
from ibau_jax.perturbations.space import Images, Perturbation, PerturbationSpace, Shape, apply_each, size_text
from ibau_jax.perturbations.warp import Warp
from ibau_jax.perturbations.wave import Wave

SPACES: MappingProxyType[str, PerturbationSpace] = MappingProxyType(
    {space.name: space for space in (Pixel(), Patch(), Warp(), Wave())}
)
"""All of them, by name."""

__all__ = [
    "SPACES",
    "Images",
    "MaskAndPattern",
    "Patch",
    "Perturbation",
    "PerturbationSpace",
    "Pixel",
    "Shape",
    "Warp",
    "Wave",
    "apply_each",
    "size_text",
]
