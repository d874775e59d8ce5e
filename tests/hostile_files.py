"""Strategies of hostile files that damage alone does not find: opcodes that multiply, archives that lie, headers."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, replace

from hypothesis import strategies as st

PRIME = 2**61 - 1  # what Python's numbers are hashed by
PROTOCOLS = [b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"(dp0\n0", b"}q\x000"]  # the last two are of 0 and 1
COUNTS = [0, 1, 2, 3, 5, 9, 17, 40, 101, 300]
LARGE_COUNTS = [3_000, 20_000, 100_000, 500_000, 3_000_000]
MAX_PICKLE = 6 * 2**20  # bytes of a generated one


def text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content if len(content) < 256 else b"\x8b" + struct.pack("<I", len(content)) + content  # fmt: skip


def real(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tensor(key: str = "0", count: int = 1, size: tuple = (), stride: tuple = (), kind: str = "FloatStorage") -> bytes:
    storage = b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"
    shape = b"".join(b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride))
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(0) + shape + b"\x89}tR"


def zipped(pickled: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as torch.save writes it, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return file.getvalue()


def legacy(pickled: bytes, keys: tuple[str, ...] = (), content: bytes = b"") -> bytes:
    """A file as torch.save wrote it before 1.6, around any pickle."""
    head = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*head, pickled, pickle.dumps(list(keys), protocol=2), content])


def tar(members: dict[str, bytes], times: bool = True) -> bytes:
    """A tar archive as Python writes it; the times of real files take headers of their own."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1488000000.25 if times else 0
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def old_tar(pickled: bytes, tensors: list[tuple], storages: list[tuple], views: tuple = ()) -> dict[str, bytes]:
    """The members of a file of PyTorch before 0.1.10.

    Args:
        pickled: refers to tensors by their keys, which are text.
        tensors: key, key of the storage, sizes, strides, offset.
        storages: key, class, number of elements, content.
        views: key, key of the storage, offset, number of elements.
    """

    def described(key: int, second: bytes, kind: str) -> bytes:
        return b"\x80\x02" + number(key) + second + name("torch", kind) + b"\x87."

    def packed(*counts: int) -> bytes:
        return struct.pack(f"<{len(counts)}q", *counts)

    def plain(value: object) -> bytes:
        return pickle.dumps(value, protocol=2)

    stored = [described(key, text("cpu"), kind) + packed(count) + raw for key, kind, count, raw in storages]
    placed = [
        described(key, number(storage), "FloatTensor") + packed(len(sizes), *sizes, *strides, offset)
        for key, storage, sizes, strides, offset in tensors
    ]
    return {
        "sys_info": plain({"protocol_version": 1000, "little_endian": True}),
        "pickle": pickled,
        "tensors": plain(len(tensors)) + b"".join(placed),
        "storages": plain(len(storages)) + b"".join(stored) + plain(list(views)),
    }


# Programs: opcodes again and again, in containers, over something large in the memo.

KEYS = {
    "counting": number,
    "same hash": lambda i: number(i * PRIME),
    "same hash below 64 bits": lambda i: number(i % 8 * PRIME + i // 8),
    "multiples": lambda i: number(i << 20),
    "one orbit": lambda i: number(orbit(i)),
    "negative": lambda i: number(-i),
    "huge": lambda i: number(i << 4000),
    "floats": lambda i: real(float(i) * 2.0**40),
    "not numbers": lambda i: real(float("nan")),
    "texts": lambda i: text(str(i)),
    "tuples": lambda i: number(i * PRIME) + b"\x85",
    "pairs": lambda i: number(i) + number(-i) + b"\x86",
    "complex": lambda i: name("__builtin__", "complex") + real(float(i)) + real(0.0) + b"\x86R",
    "bytes": lambda i: b"C\x08" + struct.pack("<q", i),
}
_ORBIT = [1]


def orbit(index: int) -> int:
    """The index-th place that a table of 2**17 tries after another: keys there are tried one after the other."""
    while len(_ORBIT) <= index:
        _ORBIT.append((5 * _ORBIT[-1] + 1) % 2**17)
    return _ORBIT[index] if index % 3 else 1 + (index << 17)


PIECES = [
    b"N", b")", b"]", b"}", b"\x8f", b"(", b"0", b"1", b"2", b"\x94", b"a", b"s", b"t", b"l", b"d", b"u", b"e",
    b"\x90", b"\x91", b"\x85", b"\x86", b"\x87", b"R", b"b", b"\x81", b"K\x01", b"J\xff\xff\xff\x00", b"h\x00", b"h\x01",
    b"h\x02", b"h\x01h\x00\x85R", b"h\x01)R", b"h\x01)Rh\x00b", b"h\x00h\x00s", b"h\x00h\x01a", b"(h\x00t", b"(h\x00h\x00l",
    b"h\x00\x85\x85\x85", b"h\x01h\x00\x8c\x06latin1\x86R", b"\x8c\x02os\x8c\x06system\x93", b"G" + bytes(8), b"X\x01\x00\x00\x00a",
    b"\x8c\x03\xf0\x9f\x98", b"X\x04\x00\x00\x00\xf0\x9f\x98\x80", b"(NNe", b"(NNu", b"q\x05", b"r\xff\xff\xff\x00", b"I1\n", b"L9\n",
    b"\x8a\x01\x05", b"T\x02\x00\x00\x00ab", b"C\x01a", b"\x96\x01" + bytes(8), b"}h\x00N\x86s", b"Q", b"h\x02h\x00Q",
    b"P('storage', <class 'torch.FloatStorage'>, '0', 'cpu', 1)\n", b"I01\n", b"S'a\\x00'\n", b"Va\\u0100\n", b"p5\n", b"p99999\n",
    b"g0\n", b"F1e5\n", b"(d", b"(l", b"ccopy_reg\n_reconstructor\n(cx\nY\nc__builtin__\nobject\nNtR", b"h\x01h\x00h\x02\x87R",
]  # fmt: skip
LARGE = {
    "list": lambda n, keys: b"](" + b"".join(keys(i) for i in range(n)) + b"e",
    "tuple": lambda n, keys: b"(" + b"".join(keys(i) for i in range(n)) + b"t",
    "dict": lambda n, keys: b"}(" + b"".join(keys(i) + b"N" for i in range(n)) + b"u",
    "set": lambda n, keys: b"\x8f(" + b"".join(keys(i) for i in range(n)) + b"\x90",
    "frozenset": lambda n, keys: b"(" + b"".join(keys(i) for i in range(n)) + b"\x91",
    "pairs": lambda n, keys: b"](" + b"".join(keys(i) + b"N\x86" for i in range(n)) + b"e",
    "text": lambda n, _: text("a." * n),
    "wide text": lambda n, _: text("a" * n + "\U0001f600"),
    "control text": lambda n, _: text("\x01" * n),
    "line": lambda n, _: b"V" + b"a." * n + b"\n",
    "wide line": lambda n, _: b"V" + b"a" * n + b"\\U0001f600\n",
    "escaped line": lambda n, _: b"S'" + b"\\x00" * n + b"'\n",
    "number": lambda n, _: b"L" + b"9" * n + b"L\n",
    "bytes": lambda n, _: b"B" + struct.pack("<I", n) + bytes(n),
    "deep": lambda n, _: b"]" * n + b"a" * max(0, n - 1),
    "tensors": lambda n, _: b"}(" + tensor() + b"q\x03" + text("x") + b"h\x03" + b"".join(text(str(i)) + b"h\x03" for i in range(n)) + b"u",
}  # fmt: skip
NAMES = [
    ("__builtin__", "set"), ("builtins", "frozenset"), ("collections", "OrderedDict"), ("collections", "Counter"),
    ("collections", "defaultdict"), ("argparse", "Namespace"), ("_codecs", "encode"), ("__builtin__", "bytearray"),
    ("__builtin__", "complex"), ("torch", "Size"), ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
    ("numpy", "dtype"), ("numpy.core.numeric", "_frombuffer"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"), ("torch._tensor", "_rebuild_from_type_v2"), ("torch.storage", "_load_from_bytes"), ("os", "system"),
    ("copy_reg", "_reconstructor"), ("collections", "deque"), ("types", "SimpleNamespace"), ("__builtin__", "slice"), ("uuid", "UUID"),
    ("numpy.random._pickle", "__generator_ctor"), ("torch._utils", "_rebuild_sparse_tensor"),
]  # fmt: skip


@st.composite
def programs(draw) -> bytes:
    """A pickle: something in memo 0, a global in memo 1, pieces many times, a container around them."""
    counts = st.sampled_from(LARGE_COUNTS if draw(st.integers(0, 11)) == 0 else COUNTS)
    make, keys = LARGE[draw(st.sampled_from(sorted(LARGE)))], KEYS[draw(st.sampled_from(sorted(KEYS)))]
    first = (
        make(min(draw(counts), 60_000), keys)
        + b"q\x000"
        + name(*draw(st.sampled_from(NAMES)))
        + b"q\x010"
        + b"K\x01q\x020"
    )
    parts = [draw(st.sampled_from(PROTOCOLS)), first]
    opened, closed = draw(
        st.sampled_from([(b"(", b"t"), (b"](", b"e"), (b"}(", b"u"), (b"}" + text("net") + b"](", b"es"), (b"", b"")])
    )
    parts.append(opened)
    for _ in range(draw(st.integers(1, 4))):
        piece = b"".join(draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3)))
        if draw(st.integers(0, 3)) == 0:
            parts.append(
                b"".join(keys(i) + draw(st.sampled_from([b"", b"N"])) for i in range(min(draw(counts), 20_000)))
            )
        parts.append(piece * min(draw(counts), MAX_PICKLE // len(piece) // 4))
    return b"".join([*parts, closed, b"."])[:MAX_PICKLE]


@st.composite
def program_files(draw) -> bytes:
    """A program in each format; deflated it is as small as it is repetitive."""
    program = draw(programs())
    kind = draw(st.sampled_from(["stored", "deflated", "deflated", "legacy", "pickle", "nested", "tar"]))
    if kind == "tar":
        return tar(old_tar(program, [(5, 1, (2,), (1,), 0)], [(1, "FloatStorage", 2, bytes(8))]))
    if kind == "nested":
        content = legacy(program)
        nested = b"B" + struct.pack("<I", len(content)) + content
        return b"\x80\x03" + name("torch.storage", "_load_from_bytes") + nested + b"\x85R."
    if kind == "legacy":
        return legacy(program)
    compression = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
    return program if kind == "pickle" else zipped(program, {"0": bytes(8)}, compression)


# Archives, written field by field so that any may lie.


@dataclass(frozen=True)
class Member:
    """A member as one of the two places that describe it tells it."""

    name: bytes
    content: bytes
    method: int = 0
    flags: int = 0
    checksum: int = 0
    packed: int = 0
    unpacked: int = 0
    extra: bytes = b""
    offset: int = 0

    @classmethod
    def honest(cls, name: bytes, content: bytes, method: int = 0) -> "Member":
        squeeze = zlib.compressobj(1, zlib.DEFLATED, -15)
        packed = content if method == 0 else squeeze.compress(content) + squeeze.flush()
        return cls(name, packed, method, 0, zlib.crc32(content), len(packed), len(content))

    def local(self) -> bytes:
        fields = (20, self.flags, self.method, 0, 33, self.checksum, self.packed, self.unpacked)
        head = struct.pack("<4s5H3I2H", b"PK\3\4", *fields, len(self.name), len(self.extra))
        return head + self.name + self.extra + self.content

    def central(self) -> bytes:
        fields = (20, 20, self.flags, self.method, 0, 33, self.checksum, self.packed, self.unpacked)
        lengths = (len(self.name), len(self.extra), 0, 0, 0, 0, self.offset)
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields, *lengths) + self.name + self.extra


LIES = {
    "name": [b"archive/data.pkl", b"ARCHIVE/DATA.PKL", b"archive/data/0", b"archive/data.pkl\0x", b"/etc/passwd", b"../x", b"", b"\xff\xfe", b"archive/constants.pkl", b"archive/byteorder"],
    "method": [0, 8, 9, 12, 14, 93, 95, 65535],
    "flags": [0, 1, 2, 8, 0x800, 0x808, 0x2041, 0xFFFF],
    "checksum": [0, 1, 2**32 - 1],
    "packed": [0, 1, 7, 2**16, 2**31, 2**32 - 1],
    "unpacked": [0, 1, 64, 2**16, 2**26, 2**31, 2**32 - 1],
    "extra": [b"", b"FB\x04\0ZZZZ", b"\1\0\x10\0" + bytes(16), b"\1\0\x10\0" + b"\xff" * 16, b"\1\0\x08\0" + bytes(8), b"up\5\0\1abcd", b"\1\0\xff\xff", b"\1\0\0\0" * 2000],
    "offset": [0, 1, 30, 2**31, 2**32 - 1],
}  # fmt: skip


@st.composite
def archives(draw, tree: bytes) -> bytes:
    """An archive around a pickle of one storage, some of whose fields lie, in one of their places or in both."""
    zeros = draw(st.sampled_from([8, 64, 10**5, 3 * 10**7])) if draw(st.integers(0, 9)) == 0 else 8
    method = draw(st.sampled_from([0, 8]))
    contents = [(b"archive/data.pkl", tree), (b"archive/data/0", bytes(zeros)), (b"archive/version", b"3\n")]
    contents += [draw(st.sampled_from(contents))] * draw(st.sampled_from([0, 0, 0, 1]))
    contents += [(b"x/%d" % index, b"") for index in range(draw(st.sampled_from([0, 0, 0, 3, 5000])))]
    locals_ = [
        Member.honest(name, content, method if index < 4 else 0) for index, (name, content) in enumerate(contents)
    ]
    centrals = list(locals_)
    for _ in range(draw(st.integers(0, 3))):
        index, field = draw(st.integers(0, min(3, len(locals_) - 1))), draw(st.sampled_from(sorted(LIES)))
        lie = {field: draw(st.sampled_from(LIES[field]))}
        places = draw(st.sampled_from(["local", "central", "both"]))
        if places != "central" and field != "offset":
            locals_[index] = replace(locals_[index], **lie)
        if places != "local":
            centrals[index] = replace(centrals[index], **lie)
    body, directory = b"", b""
    gap = draw(st.sampled_from([b"", b"", b"", b"PK\3\4", bytes(100)]))
    for local, central in zip(locals_, centrals, strict=True):
        directory += (central if central.offset else replace(central, offset=len(body))).central()
        body += local.local() + (gap if draw(st.integers(0, 9)) == 0 else b"")
    count = len(centrals) + draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
    start = len(body) + draw(st.sampled_from([0, 0, 0, 0, 1, -46]))
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count % 65536, count % 65536, len(directory), start % 2**32, 0)
    if draw(st.integers(0, 4)) == 0:
        total = draw(st.sampled_from([count, count, 2**40, 0]))
        end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, total, total, len(directory), start % 2**32)
        end = end64 + struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + len(directory), 1) + end
    return body + directory + end * draw(st.sampled_from([1, 1, 1, 2])) + draw(st.sampled_from([b"", b"", b"", b"x"]))


# PyTorch's tar archives of before 0.1.10: numbers of tensors and storages are addresses, which a file may choose.

ADDRESSES = {
    "counting": lambda i: i,
    "same hash": lambda i: i % 8 * PRIME + i // 8,
    "multiples": lambda i: i << 20,
    "one orbit": lambda i: orbit(i),
}


@st.composite
def tars(draw) -> bytes:
    """An archive some of whose numbers lie, or with many storages, tensors and views, or with other members."""
    counts = st.sampled_from([0, 1, 2, 4, 24, 25, 2**31, 2**63 - 1])
    address = ADDRESSES[draw(st.sampled_from(sorted(ADDRESSES)))]
    many = range(1, draw(st.sampled_from([2, 2, 2, 3, 300, 5000])))
    first = (address(1), "FloatStorage", draw(counts), bytes(draw(st.sampled_from([0, 8, 96]))))
    storages = [first, *((address(index), "FloatStorage", 0, b"") for index in many[1:])]
    shape = draw(st.lists(counts, max_size=4))
    strides = draw(st.sampled_from([shape, shape[:1], [0] * len(shape)]))
    tensors = [(address(index), address(draw(st.integers(1, 2))), shape, strides, draw(counts)) for index in many[:3]]
    view = (address(draw(st.integers(1, 6000))), address(1), draw(counts), draw(counts))
    members = old_tar(
        PROTOCOLS[0] + text(str(address(1))) + b"Q.",
        tensors,
        storages,
        (view,) * draw(st.sampled_from([0, 0, 1, 5000])),
    )
    for name in draw(st.lists(st.sampled_from(sorted(members)), max_size=2)):
        members[draw(st.sampled_from([name, "x"]))] = members[draw(st.sampled_from(sorted(members)))]
    return tar(members, draw(st.booleans())) * draw(st.sampled_from([1, 1, 1, 2]))


# Indexes of checkpoints in several files.

PARTS = ("part-1.safetensors", "part-2.bin")
PLACES = [
    *PARTS,
    *PARTS,
    "x.pth",
    "link",
    "pipe",
    "folder",
    "..",
    "../x.pth",
    "/etc/passwd",
    "",
    "a\0b",
    3,
    None,
    "x" * 300,
]


@st.composite
def indexes(draw) -> bytes:
    """An index of PARTS, which have tensors called `a` and `b`, in right or wrong form."""
    places: dict[str, object] = {"a": PARTS[0], "b": PARTS[1]}
    places |= draw(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from(PLACES), max_size=2))
    many = draw(st.sampled_from([0, 0, 0, 20, 2000, 20_000]))
    same = draw(st.booleans())
    places |= {f"t{index}": PARTS[0] if same else f"f{index}" for index in range(many)}
    size = draw(st.sampled_from([1, 2**70, "x" * 10**6]))
    body = json.dumps({"metadata": {"total_size": size}, "weight_map": places})
    forms = [body] * 4 + [
        body[:-1],
        '{"weight_map": ' + "[" * 10**5,
        '{"weight_map": {}}' + " " * 2**21,
        '{"weight_map": 1' + "0" * 10**5 + "}",
        '{"weight_map": {' + ",".join(f'"{index}":"f"' for index in range(150_000)) + "}}",
    ]
    return draw(st.sampled_from(forms)).encode()


# safetensors


@st.composite
def safetensors_files(draw) -> bytes:
    """A header of right form with wrong numbers, or of wrong form."""
    numbers = st.sampled_from([0, 1, 2, 4, 8, 16, 64, 2**31, 2**63 - 1, 2**64, -1, 1.5, "4", None])
    small = st.sampled_from([0, 1, 2, 4, 8, 16])
    kinds = st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "XX", 4])  # fmt: skip
    header: dict = {}
    for index in range(draw(st.sampled_from([0, 1, 2, 3, 40, 5000]))):
        offsets = sorted([draw(small), draw(small)]) if index < 3 else [16, 16]
        header[draw(st.sampled_from(["w", "a.b", "x" * 500, "", f"t{index}", "\u2028"]))] = {
            "dtype": draw(kinds) if index < 3 else "F32",
            "shape": draw(st.lists(small, max_size=3)) if index < 3 else [0],
            "data_offsets": draw(st.lists(numbers, max_size=3)) if draw(st.integers(0, 9)) == 0 else offsets,
        }
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.sampled_from([{}, {"format": "pt"}, {"a": 1}, 7, {"x": "y" * 10**5}, {"a": {"b": {}}}])
        )
    forms = [
        json.dumps(header),
        json.dumps(header)[:-1] + ', "w": 1}',
        "{" + '"a":[' * draw(st.sampled_from([3, 10**5])),
    ]
    head = draw(st.sampled_from([forms[0], forms[0], *forms])).encode()
    head += b" " * draw(st.sampled_from([0, 1, 8, 0x80]))
    length = len(head) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 2**20, 2**63]))
    return struct.pack("<Q", max(0, length)) + head + bytes(draw(st.sampled_from([0, 4, 16, 16, 64])))
