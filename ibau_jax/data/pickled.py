"""Data sets that are pickles, read as data: nothing in them is executed."""

import io
from pathlib import Path
from typing import Any

from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.unpickle import unpickle
from ibau_jax.checkpoints.values import GlobalName
from ibau_jax.data.memory import check_memory
from ibau_jax.errors import CheckpointError, DataError, refusing, shortened
from ibau_jax.files import check_regular

COPIES = 4  # of the file that reading it takes: its bytes, text of Python 2, bytes again, an array


def read_pickled_dict(file: Path) -> dict[str, Any]:
    """The dict that a pickle holds, its keys as text also where they are bytes, as Python 3 reads those of Python 2.

    Raises:
        DataError: the file is no pickle of a dict, is damaged, or calls something. ConfigError: it is no regular file.
    """
    check_regular(file)
    refused: dict[GlobalName, None] = {}
    with refusing(str(file), DataError):
        check_memory(COPIES * file.stat().st_size, str(file))
        content = file.read_bytes()
        try:
            tree = unpickle(io.BytesIO(content), Budget(len(content)), refused=refused)
        except CheckpointError as error:
            raise DataError(f"can't read {file}: {error}; unpack the data set's archive anew") from error
    if refused:
        names = ", ".join(shortened(name, 60) for name in list(refused)[:3])
        raise DataError(f"{file} calls {names}, which no data set needs: refused without running it")
    if not isinstance(tree, dict) or not all(isinstance(key, (str, bytes)) for key in tree):
        raise DataError(f"{file} is no pickle of a dict with names; unpack the data set's archive anew")
    return {text_of(key): value for key, value in tree.items()}


def text_of(value: str | bytes) -> str:
    """Text of Python 2, which is bytes to Python 3."""
    return value.decode("latin1") if isinstance(value, bytes) else value
