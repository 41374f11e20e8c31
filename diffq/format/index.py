"""The index of a file: names, tensors and segments (docs/format.md, section 4).

It alone says what a file holds and where, so a reader knows every shape and size
before it touches the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from diffq.errors import FormatError
from diffq.format import bitpack
from diffq.format.dtypes import DTYPES
from diffq.format.entropy import WIDER, Coding
from diffq.format.kinds.base import Entry
from diffq.format.layout import LEVELS, Layout, Segment
from diffq.format.records import KINDS
from diffq.format.runs import RunCoding
from diffq.format.wire import REMEDY, Cursor, damaged, varint

MAX_NAME_BYTES = 1024

_WHERE = "The index"
# Bytes that the description of a segment takes at least.
_LEAST_STORAGE = 5
# The streams of a segment end on whole bytes: at most 1 + 16 of them, of at most 4 fields.
_MOST_PADDING = 68


@dataclass(frozen=True)
class Storage:
    """Where the bytes of one segment are, and what they must be.

    Attributes:
        size: stored bytes.
        crc: CRC-32 of the stored bytes.
        payload: bytes once decompressed; 0 for levels in rANS.
        coding: how the levels are coded, for levels.
    """

    size: int
    crc: int
    payload: int
    coding: Coding | RunCoding | None = None

    @property
    def method(self) -> str:
        """How the bytes are coded: "none", "rans" or "zstd"."""
        if isinstance(self.coding, RunCoding):
            return "rans"
        return "zstd" if self.size < self.payload else "none"


@dataclass(frozen=True)
class Index:
    """Everything that the index says.

    Attributes:
        entries: the tensors, in their order.
        aliases: further name -> name of the tensor.
        layout: which segment holds what.
        storages: one for each segment.
    """

    entries: tuple[Entry, ...]
    aliases: Mapping[str, str]
    layout: Layout
    storages: tuple[Storage, ...]


def write_index(
    entries: Sequence[Entry],
    aliases: Mapping[str, str],
    backs: Sequence[Sequence[int]],
    storages: Sequence[Storage],
) -> bytes:
    """The bytes of an index.

    Args:
        entries: the tensors.
        aliases: further name -> name of the tensor.
        backs: for each tensor and each of its parts, what `Layout.place` takes.
        storages: the segments.
    """
    names = [check_name(name) for name in (*(entry.name for entry in entries), *aliases)]
    numbers = {entry.name: number for number, entry in enumerate(entries)}
    out = [varint(len(entries)), varint(len(aliases))]
    out += [varint(len(name)) + name for name in names]
    out += [varint(numbers[target]) for target in aliases.values()]
    for entry, back in zip(entries, backs, strict=True):
        out += [_write_entry(entry), *(varint(number) for number in back)]
    out += [_write_storage(storage) for storage in storages]
    return b"".join(out)


def _write_entry(entry: Entry) -> bytes:
    head = [KINDS.index(type(entry)), DTYPES.index(entry.dtype), len(entry.shape)]
    return b"".join([bytes(head), *(varint(size) for size in entry.shape), entry.write()])


def _write_storage(storage: Storage) -> bytes:
    out = varint(storage.size) + storage.crc.to_bytes(4, "little")
    if storage.coding is None:
        return out
    coding = storage.coding
    used = sum(1 << width % 16 for width in coding.widths)
    out += varint(storage.payload) + used.to_bytes(2, "little")
    if isinstance(coding, RunCoding):
        return out
    return out + bytes([coding.map_width, *coding.stored_widths.values()])


def read_index(data: bytes | memoryview, budget: int, minor: int) -> Index:
    """Inverse of `write_index`.

    Args:
        data: the bytes of the index.
        budget: the most bytes that all tensors together may decode to.
        minor: the minor version of the file.

    Raises:
        FormatError: a rule of section 4 is broken, or the tensors exceed the budget.
    """
    cursor = Cursor(data, _WHERE)
    counts = [cursor.varint("the number of names") for _ in range(2)]
    if sum(counts) > cursor.remaining:
        rule = f"it can hold at most {cursor.remaining} names"
        raise damaged(_WHERE, rule, sum(counts))
    names = _read_names(cursor, sum(counts))
    tensors, others = names[: counts[0]], names[counts[0] :]
    aliases = {name: tensors[_read_target(cursor, name, counts[0])] for name in others}
    layout, entries, left = Layout(), [], budget
    for name in tensors:
        entry = _read_entry(cursor, name, minor)
        left -= entry.decoded_bytes
        if left < 0:
            raise FormatError(
                f"The tensors up to {name!r} decode to {budget - left} bytes, more than the "
                f"budget of {budget}. If you trust the file, pass a larger budget."
            )
        entries.append(entry)
        _place(cursor, entry, layout)
    storages = []
    for number, segment in enumerate(layout.segments):
        first = entries[segment.pieces[0].record].name
        where = f"Segment {number} (tensor {first!r})"
        storages.append(_read_storage(cursor, segment, minor, where))
    cursor.end()
    if minor != least_minor(entries, storages):
        needs = "a segment of levels in rANS or a stepped tensor"
        raise damaged(_WHERE, f"a file of version 1.1 has {needs}", "none")
    return Index(tuple(entries), aliases, layout, tuple(storages))


def least_minor(entries: Iterable[Entry], storages: Iterable[Storage]) -> int:
    """The lowest minor version that can describe a file (section 3)."""
    in_runs = any(isinstance(storage.coding, RunCoding) for storage in storages)
    return max((int(in_runs), *(entry.minor for entry in entries)))


def check_name(name: str) -> bytes:
    """The UTF-8 bytes of a name that a file can hold (section 4).

    Control characters are refused because names end up on terminals and in paths.

    Raises:
        FormatError: the name is empty, too long, no valid text or has control characters.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"A name must be valid Unicode, got {name!r}.") from error
    if not 1 <= len(encoded) <= MAX_NAME_BYTES:
        raise FormatError(
            f"A name has from 1 to {MAX_NAME_BYTES} bytes in UTF-8, got {len(encoded)}."
        )
    if any(character < " " or character == "\x7f" for character in name):
        raise FormatError(f"A name has no control characters, got {name!r}.")
    return encoded


def _read_names(cursor: Cursor, count: int) -> list[str]:
    names: dict[str, None] = {}
    for _ in range(count):
        data = bytes(cursor.take(cursor.varint("the length of a name"), "a name"))
        try:
            name = data.decode()
            check_name(name)
        except (UnicodeDecodeError, FormatError) as error:
            raise damaged(_WHERE, "names must be sound", error) from error
        if name in names:
            raise damaged(_WHERE, "every name must occur once", f"{name!r} twice")
        names[name] = None
    return list(names)


def _read_target(cursor: Cursor, name: str, count: int) -> int:
    number = cursor.varint("the target of an alias")
    if number >= count:
        raise damaged(_WHERE, f"the alias {name!r} must name one of {count} tensors", number)
    return number


def _read_entry(cursor: Cursor, name: str, minor: int) -> Entry:
    where = f"tensor {name!r}"
    kind = KINDS[cursor.code(len(KINDS), "kind", where)]
    if kind.minor > minor:
        rule = f"a {kind.kind} tensor needs a file of version 1.{kind.minor}"
        raise damaged(where, rule, f"version 1.{minor}")
    dtype = DTYPES[cursor.code(len(DTYPES), "dtype", where)]
    rank = cursor.fixed(1, "a rank")
    shape = tuple(cursor.varint("a size") for _ in range(rank))
    own = kind.read(cursor, where)
    try:
        return kind(name, shape, dtype, **own)
    except FormatError as error:
        raise FormatError(f"{error} {REMEDY}") from error


def _place(cursor: Cursor, entry: Entry, layout: Layout) -> None:
    """Reads where the parts of a tensor are (section 5)."""
    parts = entry.parts
    backs = [cursor.varint("a place") for _ in parts]
    for part, back in zip(parts, backs, strict=True):
        most = cursor.remaining // _LEAST_STORAGE
        if not back and part.cut_count() > most:
            rule = f"the rest of the index describes at most {most} segments"
            raise damaged(entry.where, rule, part.cut_count())
    layout.place(parts, backs, entry.where)


def _read_storage(cursor: Cursor, segment: Segment, minor: int, where: str) -> Storage:
    size = cursor.varint("a stored size")
    crc = cursor.fixed(4, "a checksum")
    payload = most = segment.item * segment.count
    coding: Coding | RunCoding | None = None
    if segment.item == LEVELS:
        payload = cursor.varint("a payload size")
        widths = _read_widths(cursor, where)
        groups = sum(piece.group_count for piece in segment.pieces)
        most = groups + 2 * segment.count + _MOST_PADDING
        if payload > most:
            rule = f"{segment.count} levels in {groups} groups take at most {most} bytes"
            raise damaged(where, rule, payload)
        in_runs = minor and not payload
        coding = RunCoding(tuple(widths)) if in_runs else _read_coding(cursor, widths, where)
        most = most if in_runs else payload
    if not 1 <= size <= most:
        raise damaged(where, f"a segment of {most} bytes is stored in 1 to as many", size)
    return Storage(size, crc, payload, coding)


def _read_widths(cursor: Cursor, where: str) -> list[int]:
    """The bitwidths in use, rising."""
    used = cursor.fixed(2, "the bitwidths in use")
    if not used:
        raise damaged(where, "a segment of levels uses some of the bitwidths 1 to 16", "none")
    return [width for width in range(1, bitpack.MAX_BITS + 1) if used >> width % 16 & 1]


def _read_coding(cursor: Cursor, widths: Sequence[int], where: str) -> Coding:
    map_width = _read_width(cursor, (widths[-1] - widths[0]).bit_length(), where)
    return Coding(map_width, {width: _read_width(cursor, width, where) for width in widths})


def _read_width(cursor: Cursor, needed: int, where: str) -> int:
    """The width at which symbols of `needed` bits are packed (section 6)."""
    width = cursor.fixed(1, "the width of a stream")
    if width != needed and not (0 < needed < width and width in WIDER):
        rule = f"symbols of {needed} bits are packed at {needed} or at wider 2, 4 or 8 bits"
        raise damaged(where, rule, width)
    return width
