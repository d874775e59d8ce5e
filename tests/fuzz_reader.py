"""Throws damaged and hostile files at the reader: `python -m tests.fuzz_reader --examples 20000`.

Each file must give a model or a CheckpointError of one line, within what docs/security.md promises of memory and of processor
time for its size, and nothing may be executed, imported, opened for writing or sent. Python's own audit events are the witness of that.
Files are made with Hypothesis: honest ones damaged (flipped bits, truncations, members of one archive in another, pickles cut, joined
and given huge numbers), opcodes that multiply (`tests/hostile_files.py`), archives whose fields lie, headers of safetensors, indexes of several files.
A failing file is made small by Hypothesis and kept as fuzz-failure.bin, and a part of it as fuzz-failure.part.
"""

import argparse
import collections
import contextlib
import functools
import io
import os
import pickle
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from ibau_jax.checkpoints import load
from ibau_jax.checkpoints.inspection import inspect_file
from ibau_jax.checkpoints.recognition import Request
from ibau_jax.checkpoints.shards import index_in
from ibau_jax.errors import CheckpointError
from tests.hostile_files import (
    PARTS,
    PROTOCOLS,
    archives,
    indexes,
    old_tar,
    program_files,
    programs,
    safetensors_files,
    tar,
    tars,
    tensor,
    text,
)
from tests.oracles.cifar_models import torch_oracle
from tests.promise import measured, memory_promised, seconds_promised

MEMORY = 2**31  # bytes of address space beyond which an example is stopped, whatever was promised
MAX_MESSAGE = 20_000  # characters
CHUNK = 1000  # examples of one Hypothesis run, which remembers them all
FAILURE = Path("fuzz-failure.bin")
# Events of Python's audit hooks that reading a file has no business to raise.
FORBIDDEN = (
    "exec",
    "import",
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pickle.find_class",
    "code.__new__",
)
HARMLESS = ("os.listdir", "os.scandir", "os.fspath")


def saved(tree, **options) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file, **options)
    return file.getvalue()


def folded_states(state) -> dict[str, torch.Tensor]:
    """A state dict whose tensors are in other forms: masked, normed, apart and twice."""
    small = {"a.b.q_proj.weight": torch.ones(2, 2), "a.b.k_proj.weight": torch.ones(2, 2)}
    small |= {"a.b.v_proj.weight": torch.ones(2, 2), "c.weight_g": torch.ones(2, 1), "c.weight_v": torch.ones(2, 3)}
    small |= {"d.weight_orig": torch.ones(2, 3), "d.weight_u": torch.ones(2), "d.weight_v": torch.ones(3)}
    small |= {"model.e.bias": torch.ones(2), "attacker.model.e.bias": torch.ones(2)}
    masked = {name: value for name, value in state.items() if name != "conv1.weight"}
    masked |= {"conv1.weight_orig": state["conv1.weight"], "conv1.weight_mask": torch.ones_like(state["conv1.weight"])}
    return masked | small


def honest_files() -> list[bytes]:
    """One of each format, and of what goes into them."""
    torch.manual_seed(0)
    state = torch_oracle("wide_resnet10_1", 10, 32).state_dict()
    cargo = {"poison_indicator": np.arange(5.0), "names": np.asarray(["a", "b"]), "img_size": [32, 32, 3]}
    result = {
        "model_name": "wide_resnet10_1",
        "num_classes": 10,
        "clean_data": "cifar10",
        "bd_test": {"x": {1: (2, "y")}},
    }
    module = torch_oracle("wide_resnet10_1", 10, 32)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    little_module = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    little = {"a.weight": torch.ones(2, 3), "b": torch.ones(3).bfloat16(), "n": None, "s": {1, 2}}
    return [
        saved({"net": state, "acc": 80.0}),
        saved({"model": state, **result, **cargo}),
        saved({"net": state}, _use_new_zipfile_serialization=False),
        pickle.dumps({"net": {name: tensor for name, tensor in list(state.items())[:4]}, **cargo}),
        save_safetensors(dict(state)),
        saved(little),
        saved(little, _use_new_zipfile_serialization=False),
        pickle.dumps(little),
        save_safetensors({"a": torch.ones(3)}),
        saved(folded_states(state)),
        save_safetensors(folded_states(state)),
        saved({"model": module, "optimizer": optimizer}),
        saved(little_module),
        saved(little_module, _use_new_zipfile_serialization=False),
        pickle.dumps({"a": little_module}),
        pickle.dumps({"a": little_module, "rng": np.random.default_rng(0)}, 0),
        pickle.dumps({"net": {name: tensor.numpy() for name, tensor in state.items()}, "n": {1}}, 0),
        pickle.dumps({"net": state, "when": deque([1], 3), "slice": slice(1)}, 1),
        saved(little, pickle_protocol=0),
        saved(little_module, pickle_protocol=1, _use_new_zipfile_serialization=False),
        tar(old_tar(b"\x80\x02}" + text("w") + text("5") + b"Qs.", [(5, 2, (2, 2), (2, 1), 0)],
            [(1, "FloatStorage", 8, bytes(32))], ((2, 1, 4, 4),))),
    ]  # fmt: skip


def parts() -> list[bytes]:
    """The files that indexes name, one of each kind."""
    return [save_safetensors({"a": torch.ones(3)}), saved({"b": torch.ones(3)})]


HONEST = honest_files()
NUMBERS = [0, 1, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]
HOSTILE = [
    b"cposix\nsystem\nX\x02\x00\x00\x00id\x85R",
    b"c__builtin__\neval\nX\x01\x00\x00\x001\x85R",
    b"\x8c\x02os\x8c\x06system\x93",
    b"cx\nY\n)\x81",
    b"cx\nY\n)\x81}b",
    b"cfunctools\npartial\nctorch.hub\nload\n\x85R",
    b"]q\xf0h\xf0a",
    b"}q\xf1X\x01\x00\x00\x00ah\xf1s",
    b"]" * 500 + b"a" * 499,
    b")" + b"\x85" * 500,
    b"(" * 200,
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch.storage\n_load_from_bytes\n",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cnumpy\ndtype\nX\x04\x00\x00\x00f999\x85R",
    b"c__builtin__\nbytearray\n\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85R",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"r\xff\xff\xff\xff",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"I" + b"9" * 300 + b"\n",
    b"2" * 300,
    b"\x82\x01",
]
NAMES = ["archive/data.pkl", "/etc/passwd", "../../outside", "archive/data/0", "archive/data/../../x", "data.pkl", "x" * 300, "archive/version", "\x00", "archive/byteorder", "archive/constants.pkl"]  # fmt: skip


def places(content: bytes) -> st.SearchStrategy[int]:
    """Anywhere, but mostly near the ends, where headers and directories are."""
    last = max(len(content) - 1, 0)
    return st.one_of(st.integers(0, last), st.integers(0, min(last, 600)), st.integers(max(0, last - 600), last))


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes flipped, cut out, repeated, replaced by numbers or by hostile pickle."""
    array = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(places(bytes(array)))
        kind = draw(st.sampled_from(["flip", "flip", "number", "cut", "repeat", "hostile", "truncate"]))
        if kind == "flip" and array:
            array[min(place, len(array) - 1)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            width = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from(NUMBERS)) % 256**width
            array[place : place + width] = number.to_bytes(width, draw(st.sampled_from(["little", "big"])))
        elif kind == "cut":
            del array[place : place + draw(st.integers(1, 300))]
        elif kind == "repeat":
            piece = array[place : place + draw(st.integers(1, 300))]
            array[place:place] = piece * draw(st.integers(1, 20))
        elif kind == "hostile":
            array[place:place] = draw(st.sampled_from(HOSTILE))
        elif kind == "truncate":
            del array[place:]
    return bytes(array)


@st.composite
def rezipped(draw, content: bytes) -> bytes:
    """The archive with its pickle damaged, or members renamed, doubled, swapped, compressed or lost: checksums are right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    changes = draw(st.sets(st.sampled_from(["pickle", "rename", "double", "swap", "lose", "storage"]), min_size=1))
    if "pickle" in changes:
        members = [(name, draw(damaged(data)) if name.endswith(".pkl") else data) for name, data in members]
    place = draw(st.integers(0, len(members) - 1))
    if "rename" in changes:
        members[place] = (draw(st.sampled_from(NAMES)), members[place][1])
    if "double" in changes:
        members.append((members[place][0], draw(damaged(members[place][1][:4096]))))
    if "swap" in changes:
        other = draw(st.integers(0, len(members) - 1))
        members[place], members[other] = (members[place][0], members[other][1]), (members[other][0], members[place][1])
    if "storage" in changes:
        members[place] = (members[place][0], members[place][1][: draw(st.integers(0, 64))])
    if "lose" in changes:
        del members[place]
    file = io.BytesIO()
    compression = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


SMALL_TREE = PROTOCOLS[0] + b"}" + text("w") + tensor("0", 2, (2,), (1,)) + b"s."


@st.composite
def damaged_files(draw) -> bytes:
    content = draw(st.sampled_from(HONEST))
    if content[:2] == b"PK" and draw(st.integers(0, 2)):
        content = draw(rezipped(content))
        return content if draw(st.booleans()) else draw(damaged(content))
    if draw(st.integers(0, 9)) == 0:
        other = draw(st.sampled_from(HONEST))
        content = content[: draw(places(content))] + other[draw(places(other)) :]
    return draw(damaged(content))


class Content(bytes):
    """Bytes that Hypothesis does not print, and those of the first of PARTS, where it is not honest."""

    part: bytes | None = None

    def __repr__(self) -> str:
        return f"<{len(self)} bytes, in {FAILURE}>"


@st.composite
def hostile_files(draw) -> Content:
    kind = draw(st.integers(0, 11))
    if kind < 4:
        return Content(draw(program_files()))
    if kind == 4:
        return Content(draw(archives(draw(programs()) if draw(st.integers(0, 4)) == 0 else SMALL_TREE)))
    if kind == 5:
        return Content(draw(tars()))
    if kind == 6:
        content = Content(draw(indexes()))
        content.part = draw(st.one_of(st.none(), damaged(parts()[0]), program_files()))
        return content
    return Content(draw(safetensors_files() if kind == 7 else damaged_files()))


class Watch:
    """Notes forbidden audit events while it is on."""

    def __init__(self, allowed: Path) -> None:
        self.on, self.seen, self.allowed = False, [], str(allowed)
        self.beside = [str(allowed.with_name(name)) for name in PARTS]
        for codec in ("cp437", "raw_unicode_escape", "unicode_escape", "ascii", "latin1"):  # zipfile's and pickletools'
            b"x".decode(codec)  # Python imports each when it is first used
        sys.addaudithook(self.hook)

    def watching(self, look: Callable[[Path], object], file: Path) -> object:
        """What `look` gives for the file, while the watch is on."""
        self.on = True
        try:
            return look(file)
        finally:
            self.on = False

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or not (isinstance(arguments[0], int) or str(arguments[0]) in (self.allowed, *self.beside)):
                self.seen.append((event, str(arguments[:3])))
        elif event.startswith(FORBIDDEN) and event not in HARMLESS:
            self.seen.append((event, str(arguments)[:100]))


def expired(*_: object) -> None:
    raise TimeoutError("stopped: much more than was promised")


def outcome(watch: Watch, file: Path) -> str:
    """What a file gives: `model`, or the error's first words."""
    size = file.stat().st_size
    if index_in(io.BytesIO(file.read_bytes())) is not None:
        size += sum(file.with_name(name).stat().st_size for name in PARTS if file.with_name(name).exists())
    words = []
    for look in (load, lambda file: inspect_file(file, Request())):
        limit_memory(MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 5 * seconds_promised(size))
        try:
            result, seconds, memory = measured(functools.partial(watch.watching, look, file))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            limit_memory(None)
        assert not watch.seen, f"audit events: {watch.seen}"
        assert seconds <= seconds_promised(size), f"{seconds:.2f} s for {size} bytes"
        assert memory <= memory_promised(size), f"{memory / 2**20:.0f} MiB for {size} bytes"
        words.append(outcome_of(result, file))
    return words[0]


def outcome_of(result: object, file: Path) -> str:
    """The same of what loading or inspecting it returned or raised."""
    if isinstance(result, Exception) and not isinstance(result, CheckpointError):
        raise result
    if not isinstance(result, CheckpointError):
        return f"model {result.architecture.name}" if hasattr(result, "architecture") else "report"
    message = str(result)
    assert "\n" not in message, "the message has several lines"
    assert len(message) < MAX_MESSAGE, f"the message has {len(message)} characters"
    assert "more memory than there is" not in message, "the limit on memory was reached"
    return re.split(r"[:'(\d]", message.removeprefix(f"{file}: "))[0].strip()[:70]


def fuzz(examples: int, seed: int) -> collections.Counter:
    """Runs the examples and counts what they gave.

    Raises:
        Exception: whatever an example raised that is no CheckpointError.
    """
    outcomes: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.pth"
        watch = Watch(file)
        write_beside(file.parent)
        for content in HONEST:  # everything that is imported or built once is, now
            file.write_bytes(content)
            for look in (load, lambda file: inspect_file(file, Request())):
                with contextlib.suppress(CheckpointError):
                    look(file)
        signal.signal(signal.SIGPROF, expired)
        for start in range(0, examples, CHUNK):
            chunk(watch, file, outcomes, min(CHUNK, examples - start), seed * 10**6 + start)
            print(f"{sum(outcomes.values())} files", flush=True)
    return outcomes


def chunk(watch: Watch, file: Path, outcomes: collections.Counter, examples: int, seed: int) -> None:
    @hypothesis_seed(seed)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile_files())
    def one(content: Content) -> None:
        file.write_bytes(content)
        file.with_name(PARTS[0]).write_bytes(parts()[0] if content.part is None else content.part)
        watch.seen.clear()
        try:
            outcomes[outcome(watch, file)] += 1
        except BaseException:
            FAILURE.write_bytes(content)
            if content.part is not None:
                FAILURE.with_suffix(".part").write_bytes(content.part)
            raise

    one()


def write_beside(folder: Path) -> None:
    """What lies beside the file: parts of a checkpoint in several files, and what is none."""
    for name, content in zip(PARTS, parts(), strict=True):
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe")


def limit_memory(more: int | None) -> None:
    """Lets the process take `more` bytes than it has now; None lifts the limit."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = resource.RLIM_INFINITY if more is None else pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=20_000, help="how many files (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other files (default: 0)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    outcomes = fuzz(options.examples, options.seed)
    for words, count in outcomes.most_common(25):
        print(f"{count:7d}  {words}")
    models = sum(count for words, count in outcomes.items() if words.startswith("model"))
    total = sum(outcomes.values())
    print(
        f"{total} files in {time.perf_counter() - start:.0f} s: {models} gave a model, {total - models} a CheckpointError"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
