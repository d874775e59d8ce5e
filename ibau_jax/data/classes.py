"""Which label a class folder has: its number, its place in the order of names, or its place in the user's list."""

import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ibau_jax.data.text import read_text
from ibau_jax.errors import DataError, refusing, shortened

NUMBER, TEXT = "number", "text"
MOST_CLASSES = 10**6
NO_WORDS: Mapping[str, str] = MappingProxyType({})
LONGEST_NAME = 40  # characters of a class's name that are shown


def class_labels(names: Sequence[str], num_classes: int | None = None, order: str | None = None) -> dict[str, int]:
    """The label of each class folder, counted from 0.

    Folders named by numbers have these as labels, or their places in the order of numbers where the numbers can't be
    labels but there is a folder for every class. Other folders have their places in the order of text, as torchvision's
    ImageFolder has it, and there must be one for every class.

    Args:
        names: the folders' names, each once.
        num_classes: how many classes the model has; None where that is not known, and not checked then.
        order: `number`: by the numbers in the names, also where a word stands before them; `text`: by text, also where
            they are numbers; else a file with the name of one folder a line, in the order of labels, or torchvision's
            `class_to_idx` as JSON; None as above.

    Raises:
        DataError: the names don't fit the number of classes, or don't have this order.
        ConfigError: the file of names is no regular file.
    """
    if order not in (None, NUMBER, TEXT):
        return _listed(names, class_names(Path(str(order))), num_classes, str(order))
    numbers, plain = numbers_in(names), all(_is_number(name) for name in names)
    if order == NUMBER and numbers is None:
        raise DataError(
            f"the class folders ({_few(names)}) are no numbers, and no word with a number each: they have no order "
            "'number'; choose 'text', or a file that lists them"
        )
    if numbers is not None and (order == NUMBER or (order is None and plain)):
        return _by_number(numbers, num_classes)
    return _by_text(names, num_classes, plain)


def names_by_label(
    labels: Mapping[str, int], num_classes: int | None, words: Mapping[str, str] = NO_WORDS
) -> tuple[str, ...]:
    """The classes' names in the order of labels, "" for a class without one; none where all names are numbers.

    Args:
        labels: the label of each class folder.
        num_classes: how many classes there are; None for as many as the labels tell.
        words: what classes are called, by the names of their folders, where they are called otherwise.
    """
    if all(map(_is_number, labels)):
        return ()
    names = [""] * (num_classes or max(labels.values()) + 1)
    for folder, label in labels.items():
        names[label] = words.get(folder, folder)
    return tuple(names)


def with_name(label: int, names: Sequence[str]) -> str:
    """A label, and the class's name behind it where there is one."""
    name = names[label] if label < len(names) else ""
    return f"{label} ({shortened(name, LONGEST_NAME)})" if name else str(label)


def numbers_in(names: Sequence[str]) -> dict[str, int] | None:
    """The number at the end of each name, where all have one after the same word or none; else None."""
    parts = [re.fullmatch(r"(\D*)([0-9]+)", name, re.ASCII) for name in names]
    words = {part[1] if part else None for part in parts}
    if len(words) != 1 or None in words:
        return None
    return {part[0]: int(part[2]) for part in parts if part}


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _by_number(numbers: dict[str, int], num_classes: int | None) -> dict[str, int]:
    ranked = sorted(numbers, key=lambda name: numbers[name])
    for one, other in itertools.pairwise(ranked):
        if numbers[one] == numbers[other]:
            raise DataError(f"the class folders {one!r} and {other!r} have the same number; rename or remove one")
    largest = max(numbers.values(), default=0)
    if largest < (MOST_CLASSES if num_classes is None else num_classes):
        return numbers
    if num_classes is not None and len(ranked) == num_classes:
        return {name: label for label, name in enumerate(ranked)}
    if num_classes is None:
        raise DataError(f"the class folder {ranked[-1]!r} has a number that can be no label")
    raise DataError(
        f"the class folder {ranked[-1]!r} can be no label of a model with {num_classes} classes (0 to "
        f"{num_classes - 1}), and the folders are {len(ranked)}, not {num_classes}; remove what is no class, rename "
        "the folders to their labels, or list the names of all classes in a file for --class-order"
    )


def _by_text(names: Sequence[str], num_classes: int | None, plain: bool) -> dict[str, int]:
    ranked = sorted(names)
    if num_classes is not None and len(names) != num_classes:
        complete = _all_numbers(names, num_classes) if plain else None
        if complete is None:
            raise DataError(_wrong_count(ranked, num_classes))
        return {name: complete.index(name) for name in names}
    return {name: label for label, name in enumerate(ranked)}


def _all_numbers(names: Sequence[str], num_classes: int) -> list[str] | None:
    """The numbers of all classes in the order of text, written as the names are; None where these are others."""
    for width in {0, *map(len, names)}:
        complete = sorted(f"{label:0{width}d}" for label in range(num_classes))
        if set(names) <= set(complete):
            return complete
    return None


def _wrong_count(names: Sequence[str], num_classes: int) -> str:
    advice = (
        "make an empty folder for each class that has no images"
        if len(names) < num_classes
        else "remove what is no class, or name the data of this model"
    )
    numbers = ", or --class-order number where the numbers in the names are the labels" if numbers_in(names) else ""
    odd = [name for name in names if not _is_number(name)]
    others = f"; no numbers: {_few(odd)}" if len(odd) < len(names) else ""
    return (
        f"there are {len(names)} class folders ({_few(names)}{others}), but the model has {num_classes} classes; "
        f"{advice}, or list the names of all classes in a file for --class-order{numbers}"
    )


def _listed(names: Sequence[str], listed: Sequence[str], num_classes: int | None, file: str) -> dict[str, int]:
    if num_classes is not None and len(listed) != num_classes:
        raise DataError(f"{file} lists {len(listed)} classes ({_few(listed)}), but the model has {num_classes}")
    spellings = Counter(map(_composed, names))
    twice = [name for name in names if spellings[_composed(name)] > 1]
    if twice:
        raise DataError(f"the class folders {_few(twice)} have one name in two spellings; merge or rename them")
    labels = {_composed(name): label for label, name in enumerate(listed)}
    unlisted = [name for name in names if _composed(name) not in labels]
    if unlisted:
        raise DataError(f"{file} does not list the class folders {_few(unlisted)}; it has {_few(listed)}")
    return {name: labels[_composed(name)] for name in names}


def _composed(name: str) -> str:
    """A name as other systems spell it: macOS writes an accent as a character of its own."""
    return unicodedata.normalize("NFC", name)


def class_names(file: Path) -> list[str]:
    """The names in a file for `--class-order`, in the order of labels.

    Raises:
        DataError: it can't be read, or is neither a list of different names nor a `class_to_idx` or its inverse.
        ConfigError: it is no regular file.
    """
    if not os.path.exists(file):  # which takes names that are too long as well
        raise DataError(
            f"--class-order is {NUMBER}, {TEXT} or a file of class names; there is no file {shortened(file)}"
        )
    text = read_text(file)
    with refusing(str(file), DataError):
        names = (
            json.loads(text, object_pairs_hook=_each_once)
            if text.lstrip()[:1] in ("{", "[")
            else [line.strip() for line in text.splitlines()]
        )
        names = _in_order(names, file) if isinstance(names, dict) else [name for name in names if name != ""]
        if not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{file} lists no class names: one a line, or JSON as torchvision's class_to_idx")
    twice = sorted(name for name, count in Counter(map(_composed, names)).items() if count > 1)
    if twice:
        raise DataError(f"{file} lists {_few(twice)} more than once")
    return names


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dictionary; ValueError where a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there more than once")
    return found


def _in_order(labels: dict[str, object], file: Path) -> list[str]:
    if all(isinstance(name, str) for name in labels.values()) and all(map(_is_number, labels)):
        labels = {str(name): int(label) for label, name in labels.items()}  # an idx_to_class
    whole = [label for label in labels.values() if type(label) is int]
    if sorted(whole) != list(range(len(labels))):
        raise DataError(f"{file} is no class_to_idx: its values are not the labels 0 to {len(labels) - 1}, each once")
    return [name for _, name in sorted(zip(whole, labels, strict=True))]


def _few(names: Sequence[str], count: int = 4) -> str:
    """The first names and the last one, cut short."""
    shown = [shortened(name, 40) for name in names]
    return ", ".join(shown if len(shown) <= count + 1 else [*shown[:count], "...", shown[-1]])
