"""Files that appear complete or not at all."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ibau_jax.errors import ConfigError


def check_regular(path: Path) -> None:
    """Raises ConfigError where `path` is there but no regular file: opening a pipe waits, and a device has no end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # whoever opens it says why that fails
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is no regular file but a folder, a pipe, a socket or a device")


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
