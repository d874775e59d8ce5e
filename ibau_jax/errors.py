"""What goes wrong because of the input.

The command line prints the message after `error:` as one line and exits with code 2, so a message says what was
wrong and what to do about it.
"""


class IbauError(Exception):
    """Base of every error that the input, not the program, is to blame for."""


class CheckpointError(IbauError):
    """A checkpoint file is missing, damaged, dangerous, or no state dict of a known model."""


class DataError(IbauError):
    """Images or labels cannot be had, or do not fit the model."""


class NotFiniteError(IbauError):
    """A model computes NaN or infinity, so that no figure and no verdict can be had of it."""


class ConfigError(IbauError):
    """An option has a value that makes no sense."""
