"""What attackers stamp on images: stamps, the registered attacks, trigger files."""

from ibau_jax.triggers import known  # registers the attacks
from ibau_jax.triggers.attack import Attack, check_target_label, planted, together
from ibau_jax.triggers.files import TRIGGERS, read_triggers, write_triggers
from ibau_jax.triggers.input_aware import InputAware
from ibau_jax.triggers.registry import Canvas, attack, attack_names, load_attack, load_attacks
from ibau_jax.triggers.stamps import Additive, Images, Masked, Patch, Quantised, Stamp, Warp

__all__ = [
    "TRIGGERS",
    "Additive",
    "Attack",
    "Canvas",
    "Images",
    "InputAware",
    "Masked",
    "Patch",
    "Quantised",
    "Stamp",
    "Warp",
    "attack",
    "attack_names",
    "check_target_label",
    "known",
    "load_attack",
    "load_attacks",
    "planted",
    "read_triggers",
    "together",
    "write_triggers",
]
