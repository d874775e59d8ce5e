"""JSON in files that others may have written: read within bounds, and written so that every reader takes it."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ibau_jax.files import write_text

MAX_SIZE = 16 * 2**20  # bytes; parsed, JSON takes up to twenty times as much
MAX_DEPTH = 50


def read_json(file: Path, max_size: int = MAX_SIZE) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no regular file, larger than `max_size` bytes, no UTF-8 or no JSON, nested more than 50 deep,
            or holds a number that is NaN, infinite or beyond what a float or Python's integers of text can be.
        OSError: it can't be read.
    """
    if not file.is_file():
        raise ValueError("it is not there, or no regular file")
    with file.open("rb") as stream:
        data = stream.read(max_size + 1)
    if len(data) > max_size:
        raise ValueError(f"it is larger than {max_size / 2**20:g} MiB")
    try:
        content = json.loads(data.decode(), parse_constant=_refused, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(content)
    return content


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            entry
            for node in level
            if isinstance(node, (dict, list))
            for entry in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def json_text(content: Any, indent: int | None = None) -> str:
    """`content` as JSON, ASCII; a number that is NaN or infinite becomes null, since JSON has none such."""
    return json.dumps(_without_infinities(content), indent=indent, allow_nan=False)


def write_json(file: Path, content: Any, indent: int | None = 2) -> None:
    """Writes `content` as `json_text` has it."""
    write_text(file, json_text(content, indent) + "\n")


def _without_infinities(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _without_infinities(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_infinities(value) for value in content]
    return content
