"""JSON that others may have written: read within bounds; and JSON that every reader takes."""

import json
import os

import numpy as np
import pytest

from ibau_jax.json_files import json_text, read_json, write_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Infinity", "Infinity is no JSON number"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"1e400", "too large"),
        (b"9" * 5000, "4300 digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 60 + b"]" * 60, "nested too deeply"),
        (b"[" * 60 + b"1" + b"]" * 60, "nested too deeply"),
        (b"\xff", "decode"),
        (b"", "Expecting value"),
        (b" " * 101, "larger than"),
    ],
)
def test_what_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json", 100 if b" " in content[:1] else 10**6)


def test_a_pipe_and_a_missing_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing"):
        with pytest.raises(ValueError, match="no regular file"):
            read_json(tmp_path / name)


def test_what_is_written_is_read_by_strict_readers(tmp_path):
    content = {"a": [float("nan"), (float("inf"), np.float64(0.5))], "\udcff→": "x"}
    write_json(tmp_path / "x.json", content)

    def strictly(constant):
        raise AssertionError(constant)

    assert (tmp_path / "x.json").read_bytes().isascii()
    read = json.loads((tmp_path / "x.json").read_bytes(), parse_constant=strictly)
    assert read == read_json(tmp_path / "x.json") == {"a": [None, [None, 0.5]], "\udcff→": "x"}
    assert json.loads(json_text([1])) == [1]
