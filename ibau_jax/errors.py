"""What goes wrong because of the input.

The command line prints the message after `error:` as one line and exits with code 2, so a message says what was
wrong and what to do about it.
"""

import warnings
from collections.abc import Iterator, Sized
from contextlib import contextmanager

LONGEST = 200  # characters of a text that comes from a file or a parser
MAX_MESSAGE = 20_000  # a list of all names that do not fit is long; what a file says may not be longer


def shortened(text: object, length: int = LONGEST) -> str:
    """`text` on one line of at most `length` characters, and how many there were: for what a file says of itself."""
    whole = text if isinstance(text, str) else str(text[: 4 * length] if isinstance(text, bytes) else text)
    line = " ".join(whole[: 2 * length].split()) if len(whole) > length else " ".join(whole.split())
    return line if len(whole) <= length else f"{line[:length]}... ({len(whole):,} characters)"


def quoted(text: str | bytes, length: int = LONGEST) -> str:
    """The same in quotes, what can't be printed escaped, which takes up to ten times as many characters."""
    shown = repr(text[:length])
    fits = len(text) <= length and len(shown) <= length + 2
    return shown if fits else f"{shown[:length]}... ({len(text):,} characters)'"


def and_more(items: Sized, shown: int) -> str:
    """` and N more` behind the first `shown` of some items; nothing where these are all."""
    return f" and {len(items) - shown} more" if len(items) > shown else ""


class IbauError(Exception):
    """Base of every error that the input, not the program, is to blame for. Its message is bounded."""

    def __str__(self) -> str:
        return shortened(super().__str__(), MAX_MESSAGE)


class CheckpointError(IbauError):
    """A checkpoint file is missing, damaged, dangerous, or no state dict of a known model."""


class DataError(IbauError):
    """Images or labels cannot be had, or do not fit the model."""


class NotFiniteError(IbauError):
    """A model computes NaN or infinity, so that no figure and no verdict can be had of it."""


class ConfigError(IbauError):
    """An option has a value that makes no sense."""


@contextmanager
def refusing(subject: str, kind: type[IbauError]) -> Iterator[None]:
    """The one boundary around a parser of files: whatever it raises becomes an error of one line.

    Args:
        subject: what is read, for the message `can't read SUBJECT: ...`.
        kind: the error to raise.

    Raises:
        IbauError: our own errors pass as they are; every other exception, also one for want of memory, becomes `kind`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # parsers warn of what is read all the same
            yield
    except IbauError:
        raise
    except MemoryError as error:
        raise kind(f"can't read {subject}: it takes more memory than there is") from error
    except OSError as error:
        raise kind(f"can't read {subject}: {shortened(error.strerror or error)}") from error
    except Exception as error:  # parsers have no common error
        raise kind(f"can't read {subject}: {shortened(error) or type(error).__name__}") from error
