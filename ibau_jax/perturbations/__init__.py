"""What may be done to all images at once, and how large it is: the spaces that players move in.

The audit, the minimax, Neural Cleanse and the report use the same objects. To add a space, write a file with a frozen
dataclass that has what `PerturbationSpace` says.
"""

from ibau_jax.perturbations.patch import MaskAndPattern, Patch
from ibau_jax.perturbations.pixel import Pixel
from ibau_jax.perturbations.space import Images, Perturbation, PerturbationSpace, Shape, apply_each
from ibau_jax.perturbations.warp import Warp

__all__ = [
    "Images",
    "MaskAndPattern",
    "Patch",
    "Perturbation",
    "PerturbationSpace",
    "Pixel",
    "Shape",
    "Warp",
    "apply_each",
]
