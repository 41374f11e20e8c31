"""What both fuzzers run: arbitrary bytes give a value or a FormatError, nothing else."""

from contextlib import contextmanager

import numpy as np

from diffq.errors import FormatError
from diffq.format import chunks, reader
from diffq.format.container import decode, encode
from diffq.format.reader import Reader
from diffq.format.records import RawRecord
from diffq.format.source import MemorySource
from tests.format.craft import chunk, text

# Small enough that no input is slow.
BUDGET = 1 << 18


class AnyChecksum(int):
    """Equals every checksum."""

    def __ne__(self, other):
        """Never differs."""
        return False

    __eq__ = None
    __hash__ = None


class AllChecksumsRight:
    """Stands in for zlib where segments are checked."""

    @staticmethod
    def crc32(_):
        """A checksum that is right."""
        return AnyChecksum()


@contextmanager
def repaired_checksums():
    """Segments are read as if their checksums were right."""
    real, reader.zlib = reader.zlib, AllChecksumsRight
    try:
        yield
    finally:
        reader.zlib = real


def read(data):
    """Reads a file in every way; returns the reader and its records if the file is sound.

    Both ways to values must agree to the bit.
    """
    try:
        opened = Reader(data, BUDGET, threads=1)
        records = opened.records()
        values = opened.values_of()
    except FormatError:
        return None
    for name, record in records.items():
        opened.stored_bytes(name)
        if not isinstance(record, RawRecord):
            assert values[name].tobytes() == record.values().tobytes(), name
    return opened, records


def read_and_write(data):
    """What `read` does; what is read must encode to a file that holds the same."""
    sound = read(data)
    if sound is None:
        return False
    opened, records = sound
    for codec in ("zstd", "rans"):
        data = encode(records, opened.aliases, opened.metadata, codec)
        again, aliases, metadata = decode(data, 1 << 40)
        assert (list(again), aliases, metadata) == (list(records), opened.aliases, opened.metadata)
        for name, record in records.items():
            for key, value in vars(record).items():
                assert np.array_equal(getattr(again[name], key), value), (name, key)
    return True


def with_checksums(index, data, meta=None, minor=0):
    """A file of this index, data and metadata whose chunks have the right checksums."""
    parts = [chunk(b"INDX", text(index)), chunk(b"DATA", data), chunk(b"DONE")]
    if meta is not None:
        parts.insert(1, chunk(b"meta", text(meta)))
    return chunks.prologue(minor) + b"".join(parts)


def read_repaired(index, data, meta=None):
    """Whether a file of these parts, all of whose checksums are right, is sound in any version."""
    with repaired_checksums():
        files = [with_checksums(index, data, meta, minor) for minor in (0, 1)]
        return [read_and_write(file) for file in files] != [False, False]


def take_apart(data):
    """Index, data and metadata of a sound file, as `read_repaired` takes them."""
    found = chunks.read_chunks(MemorySource(data))
    meta, body = found.get(chunks.METADATA), found[chunks.DATA]
    return (
        bytes(chunks.read_text(found[chunks.INDEX].body, "")),
        data[body.start : body.stop],
        None if meta is None else bytes(chunks.read_text(meta.body, "")),
    )
