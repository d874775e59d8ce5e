"""Image data sets of the Hugging Face hub: parquet files with a column of encoded images and one of labels.

pyarrow reads them, whose optional installation is `.[parquet]`. Only images that lie in the file itself are read: a row
may name another file instead, which is refused.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ibau_jax.data.dataset import Dataset, checked_labels
from ibau_jax.data.images import decoded_image
from ibau_jax.data.layout import ImageRequest, Layout, chosen_split, place_and_split, split_of
from ibau_jax.data.memory import check_memory, check_size
from ibau_jax.errors import DataError, refusing, shortened
from ibau_jax.files import check_regular

SUFFIX = ".parquet"
LABELS = ("label", "labels", "fine_label")  # the usual names, the first that is there
BATCH = 64  # rows read at a time
MOST_COLUMNS = 1000
MOST_CONFIGURATIONS = 20  # folders that are looked into; where there are more they are classes
STEM = re.compile(r"(\w+?)(-\d+-of-\d+.*)?$")  # test-00000-of-00001


def find(folder: Path) -> list[Path]:
    """The folders with parquet files: this one, or those in it, of which a hub data set has one a configuration."""
    if _files(folder):
        return [folder]
    places = [place for place in sorted(folder.iterdir()) if place.is_dir()]
    return [place for place in places if _files(place)] if len(places) <= MOST_CONFIGURATIONS else []


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == SUFFIX and not file.name.startswith("."))


def load(folder: Path, split: str, request: ImageRequest) -> Dataset:
    """The images of a split, which the files' names begin with, resized to the model's input; raises as `_read`."""
    by_split: dict[str, list[Path]] = {}
    for file in _files(folder):
        match = STEM.match(file.stem)
        word = match[1] if match else file.stem
        by_split.setdefault(split_of(word) or word, []).append(file)
    split = next(iter(by_split)) if split == "" and len(by_split) == 1 else chosen_split(split, by_split, folder)
    return _read(by_split[split], request, f"{folder}:{split}")


def load_parquet(spec: str, request: ImageRequest) -> Dataset:
    """The images of one parquet file, resized to the model's input; raises as `_read`."""
    path, split = place_and_split(spec)
    if split:
        raise DataError(f"{path} is one file, without splits; name the file of the split")
    return _read([Path(path)], request, path)


def _read(files: list[Path], request: ImageRequest, name: str) -> Dataset:
    """The images in files of one split.

    Raises:
        DataError: pyarrow is not installed; a file is damaged, or has no images and labels; or the classes are not as
            many as the model's. ConfigError: a file is no regular file.
    """
    opened = [_Table(file) for file in files]
    class_names = opened[0].class_names()
    request.check_classes(class_names, name)
    count = sum(table.rows for table in opened)
    check_memory(count * int(np.prod(request.input_shape)), name)
    images, labels = np.empty((count, *request.input_shape), np.uint8), np.empty(count, np.int64)
    rows = (row for table in opened for row in table.images(request.input_shape))
    with refusing(name, DataError):
        for place, (image, label) in enumerate(rows):
            images[place], labels[place] = image, label
    return Dataset(images, checked_labels(labels, name), name, class_names)


class _Table:
    """A parquet file: its columns found and its declared sizes checked, nothing read yet."""

    def __init__(self, path: Path) -> None:
        check_regular(path)
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise DataError(f"reading {path} needs pyarrow: pip install -e '.[parquet]'") from None
        self.path = path
        with refusing(str(path), DataError):
            self.file = parquet.ParquetFile(path)
            metadata = self.file.metadata
            declared = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
            check_size(max(declared, metadata.num_rows), path.stat().st_size, str(path))
            self.rows: int = metadata.num_rows
            self.image, self.label = self._columns()

    def _columns(self) -> tuple[str, str]:
        """The names of the columns of images and of labels."""
        import pyarrow.types as types

        schema = self.file.schema_arrow
        if len(schema) > MOST_COLUMNS:
            raise DataError(f"{self.path} has {len(schema)} columns; images and labels need two")
        images = [field.name for field in schema if _holds_bytes(field.type)]
        labels = [field.name for field in schema if types.is_integer(field.type)]
        usual = [name for name in LABELS if name in labels]
        if len(images) != 1 or not (usual or len(labels) == 1):
            shown = ", ".join(f"{shortened(field.name, 40)}: {shortened(field.type, 40)}" for field in [*schema][:8])
            raise DataError(
                f"{self.path} has no single column of encoded images (struct of bytes and path) with one of integer "
                f"labels ({', '.join(LABELS)}); it has {shown or 'nothing'}"
            )
        return images[0], (usual or labels)[0]

    def class_names(self) -> tuple[str, ...]:
        """The names of classes that the hub's library puts into the schema; empty where there are none."""
        content = (self.file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        with refusing(f"the schema of {self.path}", DataError):
            found: Any = json.loads(content)
        for key in ("info", "features", self.label, "names"):
            found = found.get(key) if isinstance(found, dict) else None
        named = isinstance(found, list) and all(isinstance(name, str) for name in found)
        return tuple(found) if named and found else ()

    def images(self, shape: tuple[int, int, int]) -> Iterator[tuple[np.ndarray, int]]:
        """Each row's image and label."""
        place = 0
        for batch in self.file.iter_batches(BATCH, columns=[f"{self.image}.bytes", self.label]):
            for image, label in zip(batch.column(self.image), batch.column(self.label), strict=True):
                content, number = image.as_py(), label.as_py()
                where = f"the image in row {place} of {self.path}"
                if not content or content.get("bytes") is None or number is None:
                    raise DataError(f"{where} is not in the file, or has no label; save the data set with its images")
                yield decoded_image(content["bytes"], shape, where), number
                place += 1


def _holds_bytes(kind: Any) -> bool:
    """Whether a column's type is a struct with the bytes of a file."""
    import pyarrow.types as types

    if not types.is_struct(kind):
        return False
    inner = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
    return "bytes" in inner and (types.is_binary(inner["bytes"]) or types.is_large_binary(inner["bytes"]))


LAYOUTS = (Layout(find, load, has_class_folders=False),)
