"""Records to the bytes of a file and back: the front door of `diffq.format`.

    encode: records -> entries -> segments -> index -> chunks
    decode: the same backwards, by `Reader`

docs/format.md specifies every byte. The same records give the same bytes on every
machine and with any number of threads, as long as zstd has the same version.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from diffq.errors import ConfigError, FormatError
from diffq.format import chunks, elements, entropy, runs
from diffq.format.index import Storage, least_minor, write_index
from diffq.format.kinds.base import Coded, Entry, Record
from diffq.format.layout import LEVELS, Piece, Segment
from diffq.format.metadata import write_metadata
from diffq.format.pooling import Pooling
from diffq.format.reader import Reader, least_size
from diffq.format.source import Buffer
from diffq.format.threads import in_threads

#: How levels are coded: quickly, in the fewest bytes, or at their bitwidth.
Codec = Literal["zstd", "rans", "packed"]


class _Source(NamedTuple):
    """What segments are made of."""

    entry: Entry
    elements: NDArray[np.uint8]
    coded: Coded | None


def encode(
    records: Mapping[str, Record],
    aliases: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    codec: Codec = "rans",
    threads: int | None = None,
) -> bytes:
    """The bytes of a file.

    Args:
        records: name -> record, in the order that the file keeps.
        aliases: further name -> name of a record, for tied tensors.
        metadata: a JSON object.
        codec: "rans" takes for each segment of levels the smaller of zstd and rANS, which needs
            version 1.1 of the format; "zstd" compresses all segments with zstd, which takes less
            time; "packed" stores all levels at their bitwidth.
        threads: threads to use; by default one for each core.

    Raises:
        ConfigError: an unknown codec.
        FormatError: a name, an alias, a record or the metadata is not one that a file can hold.
    """
    return b"".join(encode_parts(records, aliases, metadata, codec, threads))


def encode_parts(
    records: Mapping[str, Record],
    aliases: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    codec: Codec = "rans",
    threads: int | None = None,
) -> list[bytes]:
    """What `encode` returns, in parts to be written one after the other.

    A large file is then never held twice. Takes and raises what `encode` does.
    """
    if codec not in get_args(Codec):
        raise ConfigError(f"The codec is 'zstd', 'rans' or 'packed', got {codec!r}.")
    _check_aliases(records, aliases or {})
    sources = [_Source(r.entry(name), r.elements, r.coded) for name, r in records.items()]
    entries = [source.entry for source in sources]
    texts = {}
    if metadata is not None and metadata != {}:
        texts[chunks.METADATA] = write_metadata(metadata)
    pooling = Pooling(codec != "packed")
    backs = [pooling.add(source.entry, source.coded) for source in sources]
    work = partial(_encode_segment, sources=sources, codec=codec)
    segments = in_threads(work, pooling.layout.segments, threads)
    index = write_index(entries, aliases or {}, backs, [storage for storage, _ in segments])
    minor = least_minor(entries, [storage for storage, _ in segments])
    stored = [stored for _, stored in segments]
    parts = [chunks.prologue(minor), *_chunks({chunks.INDEX: index, **texts}, stored)]
    return _fill_up(parts, sum(entry.decoded_bytes for entry in entries))


def decode(
    buffer: Buffer, budget: int | None = None, threads: int | None = None
) -> tuple[dict[str, Record], dict[str, str], dict[str, Any]]:
    """Inverse of `encode`: records, aliases and metadata.

    Args:
        buffer: the whole file.
        budget: see `Reader`.
        threads: threads to use; by default one for each core.

    Raises:
        FormatError: the file is damaged, hostile, or of another version.
    """
    reader = Reader(buffer, budget, threads)
    return reader.records(), dict(reader.aliases), reader.metadata


def _check_aliases(records: Mapping[str, Record], aliases: Mapping[str, str]) -> None:
    for name, target in aliases.items():
        if name in records:
            raise FormatError(f"The alias {name!r} must be a new name, got that of a tensor.")
        if target not in records:
            raise FormatError(f"The alias {name!r} must name a stored tensor, got {target!r}.")


def _chunks(texts: Mapping[bytes, bytes], segments: Sequence[bytes]) -> list[bytes]:
    """The chunks of a file but the last (docs/format.md, section 3)."""
    parts = []
    for tag, text in texts.items():
        body = chunks.text_body(text)
        parts += [chunks.chunk_header(tag, len(body), body), body]
    size = sum(len(segment) for segment in segments)
    return [*parts, chunks.chunk_header(chunks.DATA, size), *segments]


def _fill_up(parts: list[bytes], decoded: int) -> list[bytes]:
    """Ends a file, long enough that a reader's default budget allows what it decodes to."""
    end = chunks.chunk_header(chunks.END, 0)
    missing = least_size(decoded) - sum(map(len, parts)) - len(end)
    if missing <= 0:
        return [*parts, end]
    body = bytes(max(0, missing - chunks.HEADER_BYTES))
    return [*parts, chunks.chunk_header(chunks.FILL, len(body), body), body, end]


def _encode_segment(
    segment: Segment, sources: Sequence[_Source], codec: Codec
) -> tuple[Storage, bytes]:
    compress = codec != "packed"
    if segment.item == LEVELS:
        pieces = [_levels(piece, sources[piece.record]) for piece in segment.pieces]
        coding, payload, stored = entropy.encode(pieces, compress)
        if codec == "rans":
            found = runs.encode(pieces, len(stored) - 1)
            if found:
                run_coding, coded = found
                return Storage(len(coded), zlib.crc32(coded), 0, run_coding), coded
        return Storage(len(stored), zlib.crc32(stored), payload, coding), stored
    parts = [_elements(piece, sources[piece.record]) for piece in segment.pieces]
    data = np.concatenate(parts)
    stored = elements.encode(data, segment.item, compress)
    return Storage(len(stored), zlib.crc32(stored), data.size), stored


def _levels(piece: Piece, source: _Source) -> entropy.LevelPiece:
    # Only tensors of integers have parts of them.
    coded = cast(Coded, source.coded)
    levels, bits = coded.levels[piece.start : piece.stop], coded.bits[piece.groups]
    where, columns = source.entry.where, coded.columns
    return entropy.LevelPiece(where, bits, levels, piece.group_size, piece.start, columns)


def _elements(piece: Piece, source: _Source) -> NDArray[np.uint8]:
    item = piece.part.item
    return source.elements[piece.start * item : piece.stop * item]
