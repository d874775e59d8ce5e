"""Files that appear complete or not at all, and files that are files."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ibau_jax.errors import ConfigError


def check_regular(path: Path) -> None:
    """Raises OSError unless `path` leads to a regular file: opening a pipe waits for ever, opening a device may act."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file to read its bytes.

    Raises:
        OSError: it can't be opened, or is a folder, pipe, socket or device, or became one after it was looked at.
    """
    check_regular(path)
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(file, "rb")


def check_writable(target: Path) -> None:
    """Raises ConfigError, and writes nothing, if a file or folder at `target` could not be made."""
    ancestor = target.absolute().parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise ConfigError(f"can't write {target}: {ancestor} is not a folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise ConfigError(f"can't write {target}: no permission to write in {ancestor}")


def check_space(folder: Path, size: int) -> None:
    """Raises OSError if `folder` can't take a file of `size` bytes; where the system can tell without writing them.

    TensorStore's threads print tracebacks when a write fails half-way, so that it is better not to begin.
    """
    if size and hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to prepare files in; what is left there at the end is deleted.

    Raises:
        ConfigError: it can't be made.
    """
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    except OSError as error:
        raise ConfigError(f"can't write {target}: {error.strerror or error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(prepared: Path, target: Path) -> None:
    """Renames a finished file or folder to `target`, replacing what is there."""
    if target.is_dir() and not target.is_symlink():
        old = prepared.with_name(prepared.name + ".old")
        target.rename(old)  # a folder can't be replaced in one step; the old one goes with the staging folder
    os.replace(prepared, target)


def put_all_in_place(staging: Path, folder: Path, names: Sequence[str]) -> None:
    """Moves what is called `names` from `staging` to `folder`, in this order; of an earlier run's, none is left.

    Args:
        staging: where they were prepared; one that is not there is deleted from `folder`.
        folder: where to; it is made.
        names: each once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (staging / name).exists():
            put_in_place(staging / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
