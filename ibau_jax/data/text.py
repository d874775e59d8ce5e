"""Text files beside images: names of classes, and tables that say which image is of which class."""

from pathlib import Path

from ibau_jax.data.images import SUFFIXES
from ibau_jax.errors import DataError, refusing, shortened
from ibau_jax.files import check_regular

LARGEST_TEXT = 2**22  # bytes; Tiny ImageNet's words.txt, the largest that is known, has 2.6 MB


def read_text(file: Path) -> str:
    """The text of a small file.

    Raises:
        DataError: it can't be read, is no UTF-8, or is larger than any such list. ConfigError: it is no regular file.
    """
    check_regular(file)
    with refusing(str(file), DataError):
        if file.stat().st_size > LARGEST_TEXT:
            raise DataError(f"{file} has {file.stat().st_size} bytes, more than any list of class names or images")
        try:
            return file.read_text("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"{file} is no text in UTF-8; save the list as UTF-8") from None


def names_in(file: Path) -> list[str]:
    """The lines of a file that are not empty, such as names of classes; raises as `read_text`."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def image_in(folder: Path, name: str, table: Path) -> Path:
    """The image in `folder` that a table names; folders before its name are left out, so that it lies nowhere else.

    Raises:
        DataError: that is no name of an image.
    """
    last = name.replace("\\", "/").rpartition("/")[2]
    if not last.lower().endswith(SUFFIXES):
        raise DataError(f"{table} lists {shortened(name, 60)!r}, which is no name of an image; the file is damaged")
    return folder / last
