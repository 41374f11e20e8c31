"""Builds files by hand, with sound checksums around contents that need not be.

Written from docs/format.md without the writer of diffq, so that each rule can be broken
alone and the checks behind the checksums are reached.
"""

import zlib
from dataclasses import dataclass, field

import numpy as np
import zstandard

MAGIC = b"\x89DFQ\r\n\x1a\n"
FLOAT32 = 11


def leb(number, length=0):
    """A varint of any size, filled up to `length` bytes."""
    out = bytearray()
    while number > 0x7F or len(out) + 1 < length:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def chunk(tag, body=b"", covered=None, size=None, crc=None):
    """A chunk with a sound checksum unless told otherwise."""
    head = tag + (len(body) if size is None else size).to_bytes(8, "little")
    covered = (b"" if tag == b"DATA" else body) if covered is None else covered
    crc = zlib.crc32(head + covered) if crc is None else crc
    return head + crc.to_bytes(4, "little") + body


def frame(content, **parameters):
    """A zstd frame that states its content size."""
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(**parameters)
    ).compress(content)


def text(content, size=None, compressed=None):
    """The body of INDX or meta: as it is, or the given compressed bytes."""
    stored = content if compressed is None else compressed
    return leb(len(content) if size is None else size) + stored


def name(value):
    """A name of the index."""
    value = value.encode() if isinstance(value, str) else value
    return leb(len(value)) + value


def raw(shape=(2,), dtype=FLOAT32, stored=None, place=0, kind=0):
    """A raw tensor of the index."""
    sizes = b"".join(leb(size) for size in shape)
    stored = dtype if stored is None else stored
    return bytes([kind, dtype, len(shape)]) + sizes + bytes([stored]) + leb(place)


def grid(shape=(8,), group_size=8, min_bits=2, flags=0, places=(0, 0), dtype=FLOAT32):
    """A grid of the index."""
    sizes = b"".join(leb(size) for size in shape)
    head = bytes([1, dtype, len(shape)]) + sizes + leb(group_size)
    return head + bytes([min_bits, flags]) + b"".join(leb(place) for place in places)


def scaled(shape=(8,), group_size=8, min_bits=2, places=(0, 0)):
    """A scaled tensor of the index."""
    sizes = b"".join(leb(size) for size in shape)
    head = bytes([2, FLOAT32, len(shape)]) + sizes + leb(group_size)
    return head + bytes([min_bits]) + b"".join(leb(place) for place in places)


def stepped(shape=(8,), group_size=8, min_bits=2, places=(0, 0)):
    """A stepped tensor of the index."""
    return b"\x04" + scaled(shape, group_size, min_bits, places)[1:]


def product(shape=(8,), block_size=2, codewords=4, places=(0, 0), stored=FLOAT32, scale=b""):
    """A product-quantized tensor of the index; `scale` holds the bytes of scale and zero point."""
    sizes = b"".join(leb(size) for size in shape)
    head = bytes([3, FLOAT32, len(shape)]) + sizes + bytes([stored])
    head += leb(block_size) + leb(codewords) + scale
    return head + b"".join(leb(place) for place in places)


@dataclass
class Elements:
    """A segment of elements."""

    stored: bytes
    size: int | None = None
    crc: int | None = None

    def described(self):
        """Its description in the index."""
        size = len(self.stored) if self.size is None else self.size
        crc = zlib.crc32(self.stored) if self.crc is None else self.crc
        return leb(size) + crc.to_bytes(4, "little")


@dataclass
class Levels(Elements):
    """A segment of levels; by default 8 levels of 2 bits without a bit map."""

    payload: int | None = None
    used: int = 1 << 2
    map_width: int = 0
    widths: tuple = (2,)

    def described(self):
        """Its description in the index."""
        payload = len(self.stored) if self.payload is None else self.payload
        tail = self.used.to_bytes(2, "little") + bytes([self.map_width, *self.widths])
        return super().described() + leb(payload) + tail


@dataclass
class Runs(Elements):
    """A segment of levels in rANS, of the given bitwidths in use."""

    used: int = 1 << 2

    def described(self):
        """Its description in the index."""
        return super().described() + leb(0) + self.used.to_bytes(2, "little")


TOTAL = 1 << 16


def frequencies(table):
    """The frequencies of a run: a dict of symbols, rising, each with an entry."""
    first, last = min(table), max(table)
    entries = b""
    gap = 0
    for symbol in range(first, last + 1):
        if symbol in table:
            entries += (leb(0) + leb(gap - 1) if gap else b"") + leb(table[symbol])
            gap = 0
        else:
            gap += 1
    return leb(first) + entries


def in_runs(
    *runs,
    lanes=1,
    bounds=(0, 0),
    columns=(0,),
    marks=((0,), {0: TOTAL}),
    states=None,
    words=None,
    tables=None,
    tail=b"",
):
    """The stored bytes of a segment in rANS, coded as docs/format.md, section 14, says.

    Args:
        runs: symbols and their frequencies, run by run, after the marks.
        lanes: number of lanes.
        bounds: lowest and highest class.
        columns: of each piece.
        marks: symbols and frequencies of the marks.
        states, words, tables: what to write instead.
        tail: what to write at the end.
    """
    runs, put = (marks, *runs), []
    x = [TOTAL] * lanes
    for symbols, table in reversed(runs):
        for number in reversed(range(len(symbols))):
            lane, frequency = number % lanes, table[symbols[number]]
            if x[lane] >= frequency * TOTAL:
                put.append(x[lane] % TOTAL)
                x[lane] //= TOTAL
            start = sum(f for symbol, f in table.items() if symbol < symbols[number])
            x[lane] = x[lane] // frequency * TOTAL + x[lane] % frequency + start
    states = x if states is None else states
    words = put[::-1] if words is None else words
    tables = [frequencies(table) for _, table in runs] if tables is None else tables
    head = leb(len(states)) + leb(len(words))
    head += np.array(states, "<u4").tobytes() + np.array(words, "<u2").tobytes()
    return head + bytes(bounds) + b"".join([*map(leb, columns), *tables, tail])


def steps(*numbers):
    """The numbers of steps."""
    return np.array(numbers, "<i2").tobytes()


def floats(*numbers):
    """float32 parameters."""
    return np.array(numbers, "<f4").tobytes()


@dataclass
class File:
    """A file whose every part can be replaced; by default one grid of 8 levels of 2 bits."""

    names: tuple = ("w",)
    aliases: tuple = ()
    targets: tuple = ()
    tensors: tuple = (grid(),)
    segments: tuple = (Elements(floats(0, 3)), Levels(b"\xe4\x1b"))
    counts: tuple | None = None
    index: bytes | None = None
    index_tail: bytes = b""
    index_body: bytes | None = None
    meta: bytes | None = None
    data: bytes | None = None
    version: tuple = (1, 0)
    magic: bytes = MAGIC
    chunks: tuple | None = None
    before: tuple = ()
    extra: tuple = ()
    tail: bytes = b""
    parts: dict = field(init=False, default_factory=dict)

    def build(self):
        """The bytes."""
        names = [name(n) for n in (*self.names, *self.aliases)]
        counts = (len(self.names), len(self.aliases)) if self.counts is None else self.counts
        targets = [leb(target) for target in self.targets]
        described = [segment.described() for segment in self.segments]
        rows = [*map(leb, counts), *names, *targets, *self.tensors, *described, self.index_tail]
        index = b"".join(rows) if self.index is None else self.index
        data = b"".join(s.stored for s in self.segments) if self.data is None else self.data
        self.parts = {
            "INDX": chunk(b"INDX", text(index) if self.index_body is None else self.index_body),
            "meta": b"" if self.meta is None else chunk(b"meta", self.meta),
            "DATA": chunk(b"DATA", data),
            "DONE": chunk(b"DONE"),
        }
        order = ("INDX", "meta", "extra", "DATA", "DONE") if self.chunks is None else self.chunks
        extra = {"extra": b"".join(self.extra)}
        body = b"".join((self.parts | extra).get(key, key) for key in order)
        start = self.magic + bytes(self.version) + b"".join(self.before)
        return start + body + self.tail
