"""Looks for files that break a reader, guided by coverage: `python -m tests.fuzz_coverage npz --seconds 600`.

Needs atheris (`pip install atheris`). The kinds of file are those of tests/fuzz_data.py, `array` (in a right npz file),
`checkpoint`, `pickle` (in a right archive), and `Flax`, a folder one of whose files is another. Each file must be read, or refused by an
IbauError of one line, as `tests.fuzz_reader` and `tests.fuzz_data` demand; libFuzzer prints what it finds and keeps it
as crash-HASH.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

warnings.simplefilter("ignore")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
with atheris.instrument_imports(include=["ibau_jax"]):
    import ibau_jax.checkpoints.inspection
    import ibau_jax.data
    import ibau_jax.triggers  # noqa: F401 - instrumented here, whoever imports them later
    from ibau_jax.checkpoints import load, save
    from ibau_jax.errors import IbauError
    from tests import fuzz_data, fuzz_reader
    from tests.cli.commands import EXAMPLE

Try = Callable[[bytes], None]


def of_data(kind: str, folder: Path) -> tuple[list[bytes], Try]:
    """Files of a kind of tests/fuzz_data.py, and what tries one."""
    name, contents, read = fuzz_data.kinds(folder)["npz" if kind == "array" else kind]
    if kind == "array":
        contents = fuzz_data.members()
    file, watch = folder / name, fuzz_data.DataWatch(folder)
    watch.allowed = str(file)
    signal.signal(signal.SIGPROF, fuzz_reader.expired)

    def packed(content: bytes) -> bytes:
        labels = fuzz_data.npy(fuzz_data.np.arange(6))
        return fuzz_data.zipped([("x.npy", content), ("y.npy", labels)], 0) if kind == "array" else content

    def attempt(content: bytes) -> None:
        file.write_bytes(packed(content))
        watch.seen.clear()
        fuzz_data.outcome(watch, kind, file, read)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hypothesis' examples are for looking at, which is what is done
        seeds = [bytes(contents.example()) for _ in range(30)]
    for seed in seeds:  # what is imported once is, now
        file.write_bytes(packed(seed))
        fuzz_data.with_error(read, file)
    return seeds, attempt


def of_checkpoints(folder: Path, packed: Callable[[bytes], bytes], seeds: list[bytes]) -> tuple[list[bytes], Try]:
    """Honest checkpoints, or parts of one that `packed` makes a file of, and what tries a file."""
    file = folder / "x.pth"
    watch = fuzz_reader.Watch(file)
    signal.signal(signal.SIGPROF, fuzz_reader.expired)

    def attempt(content: bytes) -> None:
        file.write_bytes(packed(content))
        watch.seen.clear()
        fuzz_reader.outcome(watch, file)

    for seed in seeds:
        file.write_bytes(packed(seed))
        with contextlib.suppress(IbauError):
            load(file)
    return seeds, attempt


def of_flax(folder: Path) -> tuple[list[bytes], Try]:
    """The first byte says which of a Flax folder's files the others are."""
    save(load(EXAMPLE), folder / "flax")
    files = sorted(file for file in (folder / "flax").rglob("*") if file.is_file())
    honest = [file.read_bytes() for file in files]

    def attempt(content: bytes) -> None:
        place = content[0] % len(files) if content else 0
        files[place].write_bytes(content[1:])
        fuzz_reader.limit_memory(2**31)
        try:
            load(folder / "flax")
        except IbauError as error:
            assert "\n" not in str(error), "the message has several lines"
        finally:
            fuzz_reader.limit_memory(None)
            files[place].write_bytes(honest[place])

    load(folder / "flax")
    return [bytes([place]) + content for place, content in enumerate(honest) if len(content) < 2**16], attempt


def zipped(pickle: bytes) -> bytes:
    return fuzz_data.zipped([("x/data.pkl", pickle), ("x/version", b"3\n"), ("x/data/0", bytes(8))], 0)


def prepared(kind: str, folder: Path) -> tuple[list[bytes], Try]:
    """Honest contents of a kind, and what tries one."""
    (folder / "classes" / "0").mkdir(parents=True)
    fuzz_data.Image.fromarray(fuzz_data.X[0]).save(folder / fuzz_data.HONEST)
    if kind == "checkpoint":
        return of_checkpoints(folder, bytes, fuzz_reader.HONEST)
    if kind == "pickle":
        return of_checkpoints(folder, zipped, [fuzz_reader.SMALL_TREE, *fuzz_reader.HOSTILE])
    return of_flax(folder) if kind == "Flax" else of_data(kind, folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        kinds = ["checkpoint", "pickle", "Flax", "array", *fuzz_data.kinds(Path(name))]
        parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
        parser.add_argument("kind", choices=kinds, help="what the file is")
        parser.add_argument("--seconds", type=int, default=600, help="how long (default: 600)")
        options = parser.parse_args()
        folder = Path(name) / "files"
        folder.mkdir()
        seeds, attempt = prepared(options.kind, folder)
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        limits = [f"-max_total_time={options.seconds}", "-timeout=60", "-rss_limit_mb=8000", "-max_len=200000"]
        atheris.Setup([sys.argv[0], *limits, str(corpus)], attempt)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
