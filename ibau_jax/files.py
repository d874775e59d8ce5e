"""Files that appear complete or not at all, and files that are files."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ibau_jax.errors import ConfigError

if sys.platform != "win32":
    import fcntl

STAGING = ".staging"  # what the names of staging folders end with
MAX_NAME = 220  # bytes: file systems take 255, and hidden folders beside a file have longer names than it


def check_regular(path: Path) -> None:
    """Raises ConfigError where `path` is there but no regular file: opening a pipe waits, and a device has no end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # whoever opens it says why that fails
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is no regular file but a folder, a pipe, a socket or a device")


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file to read its bytes.

    Raises:
        OSError: it can't be opened, or is a folder, pipe, socket or device, or became one after it was looked at.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device may act
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(file, "rb")


def check_writable(target: Path) -> None:
    """Raises ConfigError, and writes nothing, if a file or folder at `target` could not be made."""
    try:
        os.fspath(target).encode()
    except UnicodeEncodeError:  # Orbax and safetensors take no other names
        raise ConfigError(f"can't write {target}: its name is not UTF-8; choose another name for the results") from None
    try:
        _check_place(target)
    except OSError as error:  # a name that is too long, a loop of links
        raise ConfigError(f"can't write {target}: {error.strerror or error}") from error


def _check_place(target: Path) -> None:
    if target.is_symlink() and not target.exists():
        raise ConfigError(f"can't write {target}: it is a link to {os.readlink(target)}, which is not there")
    if len(target.name.encode()) > MAX_NAME:
        raise ConfigError(f"can't write {target.name[:40]}...: the name is longer than {MAX_NAME} bytes")
    ancestor = target.absolute().parent
    while not os.path.lexists(ancestor):
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise ConfigError(f"can't write {target}: {ancestor} is not a folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise ConfigError(f"can't write {target}: no permission to write in {ancestor}")


def check_free(target: Path, size: int) -> None:
    """Raises ConfigError if the file system of `target`, a path that may not exist yet, has not `size` bytes left."""
    ancestor = target.absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    free = shutil.disk_usage(ancestor).free
    if free < size:
        raise ConfigError(
            f"can't write {target}: it takes about {size / 2**20:.0f} MiB, and the disk has {free / 2**20:.0f} MiB left"
        )


def check_space(folder: Path, size: int) -> None:
    """Raises OSError if `folder` can't take a file of `size` bytes; where the system can tell without writing them.

    TensorStore's threads print tracebacks when a write fails half-way, so that it is better not to begin.
    """
    if size and hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)


def write_text(file: Path, text: str) -> None:
    """Writes UTF-8 whatever the locale is; what is no Unicode, as in a path of other bytes, is written as `\\udcff`."""
    file.write_bytes(text.encode(errors="backslashreplace"))


def regular_files(folder: Path) -> list[Path]:
    """The files below `folder`, in order.

    Raises:
        ValueError: something there is neither a file nor a folder, such as a link to elsewhere or a named pipe.
        OSError: it can't be read.
    """
    found = []
    for entry in sorted(folder.rglob("*")):
        mode = entry.lstat().st_mode
        if stat.S_ISREG(mode):
            found.append(entry)
        elif not stat.S_ISDIR(mode):
            raise ValueError(f"{entry} is neither a file nor a folder")
    return found


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, by its path in it; raises as `regular_files`."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in regular_files(folder)
    }


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to prepare files in; what is left there at the end is deleted.

    So is what processes that were killed have left of theirs for the same target.

    Raises:
        ConfigError: it can't be made.
    """
    parent = target.absolute().parent
    there = parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target)
        folder, lock = _locked_folder(target)
    except OSError as error:
        raise ConfigError(f"can't write {target}: {error.strerror or error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        if not there:
            with contextlib.suppress(OSError):  # it holds what was put in place
                parent.rmdir()


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder, and the lock that tells other processes that this one lives; the system frees it at any end."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=STAGING, dir=target.absolute().parent))
        lock = _lock(folder, wait=True)
        if folder.exists():  # else another process has taken it for abandoned before it was locked
            return folder, lock
        if lock is not None:
            os.close(lock)


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Keeps other processes of this user on this machine from making results for the same place at the same time.

    The lock lies in the folder for temporary files, so that nothing is written where results go: processes with another
    TMPDIR are not kept out. The system frees it at any end.

    Raises:
        ConfigError: another process is at it.
    """
    lock = None
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            lock = _open_lock(os.path.realpath(target))
    try:
        if lock is not None and not _is_ours(lock):
            raise ConfigError(f"another run is making results for {target}; wait for it, or choose another --out")
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _open_lock(path: str) -> int:
    folder = Path(tempfile.gettempdir()) / f"ibau_jax-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256(os.fsencode(path)).hexdigest()
    return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _is_ours(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def remove_abandoned(target: Path) -> None:
    """Deletes the staging folders of `target` whose processes are dead; `target`'s folder is there."""
    for entry in target.absolute().parent.iterdir():
        if not (entry.name.startswith(f".{target.name}.") and entry.name.endswith(STAGING)) or entry.is_symlink():
            continue
        lock = _lock(entry, wait=False)
        if lock is not None:
            shutil.rmtree(entry, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path, wait: bool) -> int | None:
    """An open file that locks `folder`; None where it is locked already, or the file system can't lock folders."""
    if sys.platform == "win32":
        return None
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(opened)
        return None
    return opened


def put_in_place(prepared: Path, target: Path) -> None:
    """Renames a finished file or folder to `target`, replacing what is there."""
    is_folder = target.is_dir() and not target.is_symlink()
    if is_folder or (prepared.is_dir() and os.path.lexists(target)):
        old = prepared.with_name(prepared.name + ".old")
        target.rename(old)  # a folder can't be replaced in one step; the old one goes with the staging folder
    os.replace(prepared, target)


def put_all_in_place(staging: Path, folder: Path, names: Sequence[str]) -> None:
    """Moves what is called `names` from `staging` to `folder`, in this order; of an earlier run's, none is left.

    The last one of several goes first and comes last, so that a folder that has it is complete and of one run.

    Args:
        staging: where they were prepared; one that is not there is deleted from `folder`.
        folder: where to; it is made.
        names: each once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if len(names) > 1:
        _remove(folder / names[-1], staging)
    for name in names:
        if (staging / name).exists():
            put_in_place(staging / name, folder / name)
        else:
            _remove(folder / name, staging)


def _remove(path: Path, staging: Path) -> None:
    """Takes a file or folder away, if it is there; a folder goes with `staging`."""
    if path.is_dir() and not path.is_symlink():
        path.rename(staging / f"{path.name}.removed")
    else:
        path.unlink(missing_ok=True)
