"""What goes wrong because of the input.

The command line prints the message after `error:` as one line and exits with code 2, so a message says what was
wrong and what to do about it.
"""

MAX_MESSAGE = 20_000  # a list of all names that do not fit is long; what a file says may not be longer


def shortened(text: object, length: int = 120) -> str:
    """`text` on one line of at most `length` characters, and how many there were: for what a file says of itself."""
    whole = text if isinstance(text, str) else str(text[: 4 * length] if isinstance(text, bytes) else text)
    line = " ".join(whole[: 2 * length].split()) if len(whole) > length else " ".join(whole.split())
    return line if len(whole) <= length else f"{line[:length]}... ({len(whole):,} characters)"


class IbauError(Exception):
    """Base of every error that the input, not the program, is to blame for. Its message is bounded."""

    def __str__(self) -> str:
        return shortened(super().__str__(), MAX_MESSAGE)


class CheckpointError(IbauError):
    """A checkpoint file is missing, damaged, dangerous, or no state dict of a known model."""


class DataError(IbauError):
    """Images or labels cannot be had, or do not fit the model."""


class ConfigError(IbauError):
    """An option has a value that makes no sense."""
