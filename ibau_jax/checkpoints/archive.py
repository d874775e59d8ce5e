"""A zip archive as torch.save writes it, read strictly: what two readers could take for two contents is refused.

`zipfile` reads the directory. It is lenient beyond that (it believes sizes, skips what no entry claims, and takes the
last of two entries of one name), so the bounds of each entry are checked here, and its bytes are read here.
"""

import struct
import zipfile
import zlib
from typing import IO

from ibau_jax.checkpoints.budget import Budget
from ibau_jax.errors import CheckpointError, quoted, shortened

END, END64, LOCATOR64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
LOCAL = struct.Struct("<4s5H3I2H")
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED, DESCRIPTOR, UTF8 = 0x1 | 0x40 | 0x2000, 0x8, 0x800
FLAGS = 0x6 | DESCRIPTOR | UTF8  # 0x6: how hard DEFLATE tried
ZIP64, UNICODE_PATH = 0x0001, 0x7075  # kinds of extra field
FOLDER = 0x10  # attribute that PyTorch takes for a folder's, of which it reads nothing
ENTRY = 20  # what the directory takes in memory, as a multiple of its bytes
PIECE = 2**16
AMBIGUOUS = "the zip archive can be read in two ways"


class Archive:
    """The members of an archive by name; case does not matter, as it does not to PyTorch.

    Raises:
        CheckpointError: it is damaged, encrypted, compressed by anything but DEFLATE, or ambiguous.
    """

    def __init__(self, file: IO[bytes], budget: Budget) -> None:
        self._file, self._budget = file, budget
        directory, entries = _end(file, budget)
        try:
            members = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise damaged(shortened(error)) from error
        if len(members) != entries:
            raise damaged("it has not as many entries as it says")
        self._members = {_lower(member.filename): member for member in members}
        if len({name.casefold() for name in self._members}) != len(members):
            raise CheckpointError(f"{AMBIGUOUS}: two members have the same name, or names that differ in case: refused")
        self._starts = _checked_starts(file, members, directory)
        self._has_checksums = any(member.CRC for member in members)  # torch.save can be told to leave them out

    def names(self) -> list[str]:
        """All members' names, in lower case."""
        return list(self._members)

    def __contains__(self, name: str) -> bool:
        return _lower(name) in self._members

    def original(self, name: str) -> str:
        """The member's name as the archive spells it."""
        return self._member(name).filename

    def size(self, name: str) -> int:
        """How many bytes the member holds."""
        return self._member(name).file_size

    def read(self, name: str) -> bytes | bytearray:
        """The member's content, charged to the budget.

        Raises:
            CheckpointError: there is none, or it is damaged or larger than the directory says.
        """
        member = self._member(name)
        self._budget.take(member.file_size)
        self._file.seek(self._starts[member.header_offset])
        if member.compress_type == zipfile.ZIP_STORED:
            content: bytes | bytearray = self._file.read(member.file_size)
        else:
            content = _inflated(self._file, member)
        if self._has_checksums and zlib.crc32(content) != member.CRC:
            raise damaged(f"the checksum of {quoted(name)} is wrong")
        return content

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self:
            raise damaged(f"it lacks {quoted(name)}")
        return self._members[_lower(name)]


def _lower(name: str) -> str:
    """The name as PyTorch compares it: only letters of ASCII have cases."""
    return name.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")


def damaged(what: str) -> CheckpointError:
    """The error for an archive that is no longer what was written."""
    return CheckpointError(f"the zip archive is damaged or truncated ({what})")


def _end(file: IO[bytes], budget: Budget) -> tuple[int, int]:
    """Where the directory begins and how many entries it has; everything up to the file's end is accounted for."""
    size = file.seek(0, 2)
    tail = _read_at(file, max(0, size - END.size - LOCATOR64.size - END64.size))
    if len(tail) < END.size or tail[-END.size :][:4] != b"PK\5\6":
        raise damaged("its end is missing, or something follows it")
    _, *disks, here, entries, length, start, comment = END.unpack(tail[-END.size :])
    end = size - END.size
    locator = tail[-END.size - LOCATOR64.size : -END.size]
    if locator[:4] == b"PK\6\7":
        end -= LOCATOR64.size + END64.size
        signature, rest, _, _, *disks64, here64, entries64, length64, start64 = END64.unpack(tail[: END64.size])
        if (signature, rest) != (b"PK\6\6", END64.size - 12) or LOCATOR64.unpack(locator)[1:] != (0, end, 1):
            raise damaged("its 64-bit end is wrong")
        short, full = (*disks, here, entries, length, start), (*disks64, here64, entries64, length64, start64)
        limits = (0xFFFF,) * 4 + (0xFFFFFFFF,) * 2
        if any(one not in (other, limit) for one, other, limit in zip(short, full, limits, strict=True)):
            raise CheckpointError(f"{AMBIGUOUS}: its two ends do not agree: refused")
        disks, here, entries, length, start = disks64, here64, entries64, length64, start64
    if comment or any(disks) or here != entries:
        raise damaged("its end is not as torch.save writes it")
    if start + length != end:
        raise damaged("its directory does not reach from where it begins to its end")
    budget.take(ENTRY * length)
    return start, entries


def _checked_starts(file: IO[bytes], members: list[zipfile.ZipInfo], directory: int) -> dict[int, int]:
    """Where each member's bytes begin, by where its header does; no byte of the file is left over."""
    starts, place = {}, 0
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.header_offset != place:
            raise CheckpointError(f"{AMBIGUOUS}: its members overlap, or there are bytes between them: refused")
        starts[place], place = _checked_span(file, member)
        if place > directory:
            raise damaged(f"{quoted(member.filename)} reaches beyond the members' end")
    if place != directory:
        raise CheckpointError(f"{AMBIGUOUS}: there are bytes between its members and its directory: refused")
    return starts


def _checked_span(file: IO[bytes], member: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a member's bytes begin, and where all that belongs to it ends."""
    name = shortened(member.filename)
    if member.flag_bits & ENCRYPTED:
        raise CheckpointError(f"the archive's member {name!r} is encrypted; unpack it and save it again")
    if member.compress_type not in METHODS:
        raise CheckpointError(f"the archive's member {name!r} is compressed by something else than DEFLATE: refused")
    if member.file_size and (member.external_attr & FOLDER or member.filename.endswith("/")):
        raise CheckpointError(f"{AMBIGUOUS}: the member {name!r} is marked as a folder and has a content: refused")
    header = _read_at(file, member.header_offset, LOCAL.size)
    if len(header) != LOCAL.size or not header.startswith(b"PK\3\4"):
        raise damaged(f"{name!r} has no header")
    _, _, flags, method, _, _, checksum, packed, unpacked, name_length, extra_length = LOCAL.unpack(header)
    raw_name, extra = file.read(name_length), file.read(extra_length)
    fields, fields64 = _extra_fields(extra), _extra_fields(member.extra)
    if flags & ~FLAGS or b"\0" in raw_name or UNICODE_PATH in (*fields, *fields64):
        raise CheckpointError(f"the archive's member {name!r} uses what torch.save does not write: refused")
    if ZIP64 in fields and unpacked == packed == 0xFFFFFFFF and len(fields[ZIP64]) >= 16:
        unpacked, packed = struct.unpack("<2Q", fields[ZIP64][:16])
    there = (member.CRC, member.compress_size, member.file_size)
    later = bool(flags & DESCRIPTOR)
    told = all(
        one == other or (later and not one) for one, other in zip((checksum, packed, unpacked), there, strict=True)
    )
    same_name = raw_name.decode("utf-8" if flags & UTF8 else "cp437") == member.orig_filename
    if not told or not same_name or (flags, method) != (member.flag_bits, member.compress_type):
        raise CheckpointError(f"{AMBIGUOUS}: its directory says other than the header of {name!r}: refused")
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        raise CheckpointError(f"{AMBIGUOUS}: {name!r} has two sizes: refused")
    start = member.header_offset + LOCAL.size + name_length + extra_length
    end = start + member.compress_size
    return start, end + (_descriptor_length(_read_at(file, end, 24), there, name) if later else 0)


def _descriptor_length(content: bytes, there: tuple[int, int, int], name: str) -> int:
    """How long what follows a member is, where its sizes follow it."""
    for form in ("<4s3I", "<4sI2Q", "<3I", "<I2Q"):
        parts = struct.unpack_from(form, content) if len(content) >= struct.calcsize(form) else ()
        if parts in (there, (b"PK\7\x08", *there)):
            return struct.calcsize(form)
    raise CheckpointError(f"{AMBIGUOUS}: the sizes behind {name!r} are not those of its directory: refused")


def _extra_fields(extra: bytes) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind in fields and kind == ZIP64:
            raise CheckpointError(f"{AMBIGUOUS}: a member has its sizes twice: refused")
        fields[kind] = extra[place + 4 : place + 4 + length]
        place += 4 + length
    return fields


def _inflated(file: IO[bytes], member: zipfile.ZipInfo) -> bytearray:
    """What DEFLATE makes of a member, which is as many bytes as the directory says and no more."""
    content, place, left = bytearray(member.file_size), 0, member.compress_size
    inflater, piece = zlib.decompressobj(-zlib.MAX_WBITS), b""
    while not inflater.eof:
        if not piece:
            piece = file.read(min(left, PIECE))
            left -= len(piece)
        try:
            chunk = inflater.decompress(piece, PIECE)
        except zlib.error as error:
            raise damaged(shortened(error)) from error
        if place + len(chunk) > len(content) or not (piece or chunk):
            break
        content[place : place + len(chunk)] = chunk
        place, piece = place + len(chunk), inflater.unconsumed_tail
    if not inflater.eof or place != len(content) or left or inflater.unused_data:
        raise damaged(f"{quoted(member.filename)} is not as large as it says")
    return content


def _read_at(file: IO[bytes], place: int, size: int = -1) -> bytes:
    file.seek(place)
    return file.read(size)
