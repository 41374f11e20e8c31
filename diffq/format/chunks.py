"""The outermost layer of a file: signature, version and chunks (docs/format.md, section 3)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from diffq.errors import FormatError
from diffq.format import frames
from diffq.format.source import Source
from diffq.format.wire import Cursor, damaged, varint

#: A byte above 127, CR LF, Ctrl-Z and LF: any text-mode transfer changes one of them.
MAGIC = b"\x89DFQ\r\n\x1a\n"
#: The major version, and the highest minor one: files have the lowest that describes them.
VERSION, MINOR = 1, 1

INDEX, METADATA, DATA, END = b"INDX", b"meta", b"DATA", b"DONE"
KNOWN = (INDEX, METADATA, DATA, END)
#: Zeros that a reader skips; see docs/format.md, section 11.
FILL = b"fill"

HEADER_BYTES = 16
MAX_CHUNKS = 64
#: Bytes of the content of INDX or meta: an index of a million tensors.
MAX_TEXT = 1 << 26
_PROLOGUE_BYTES = len(MAGIC) + 2
# Chunks that a reader skips are checked in pieces of this many bytes.
_STEP = 1 << 20


def prologue(minor: int = 0) -> bytes:
    """The bytes that every file of a minor version starts with."""
    return MAGIC + bytes([VERSION, minor])


def chunk_header(tag: bytes, size: int, body: bytes | memoryview = b"") -> bytes:
    """What precedes a chunk's body: tag, size and CRC-32 of tag, size and body.

    The body of DATA stays out of its checksum: each segment has its own.
    """
    head = tag + size.to_bytes(8, "little")
    return head + zlib.crc32(body, zlib.crc32(head)).to_bytes(4, "little")


def text_body(content: bytes) -> bytes:
    """Content of INDX or meta, compressed where that is smaller and a reader accepts it.

    Raises:
        FormatError: the content is longer than any reader accepts.
    """
    if len(content) > MAX_TEXT:
        raise FormatError(
            f"An index or metadata has at most {MAX_TEXT} bytes, got {len(content)}. "
            "Split the model into several files."
        )
    frame = frames.compress([content], frames.SHORT)
    small = len(frame) < len(content) <= _most_content(len(frame))
    return varint(len(content)) + (frame if small else content)


def read_text(body: memoryview, where: str) -> bytes | memoryview:
    """Inverse of `text_body`.

    Raises:
        FormatError: the size is not believable or the frame not sound.
    """
    cursor = Cursor(body, where)
    size = cursor.varint("its size")
    stored = cursor.take(cursor.remaining, "its content")
    if size > _most_content(len(stored)):
        rule = f"{len(stored)} bytes hold at most {_most_content(len(stored))}"
        raise damaged(where, rule, size)
    return frames.expand(stored, size, where)


def _most_content(stored: int) -> int:
    """Names and JSON take many times their size in memory: a tiny file must not."""
    return min(64 * stored + 4096, MAX_TEXT)


@dataclass(frozen=True)
class Chunk:
    """Where the body of a chunk is.

    Attributes:
        tag: the four letters.
        start: first byte of the body in the file.
        stop: one past its last.
        body: the bytes, for INDX and meta.
    """

    tag: bytes
    start: int
    stop: int
    body: memoryview


def read_prologue(source: Source) -> int:
    """Checks signature and version.

    Args:
        source: the whole file.

    Returns:
        the minor version.

    Raises:
        FormatError: not a diffq file, or another version.
    """
    data = bytes(source.read(0, min(_PROLOGUE_BYTES, source.size)))
    _check_magic(data)
    _check_room(source, 0, _PROLOGUE_BYTES, "the signature")
    major, minor = data[len(MAGIC) :]
    if major != VERSION or minor > MINOR:
        known, got = f"{VERSION}.0 to {VERSION}.{MINOR}", f"{major}.{minor}"
        raise FormatError(
            f"This diffq reads versions {known} of the file format, got version {got}. "
            "Install a diffq that reads it."
        )
    return minor


def read_chunks(source: Source) -> dict[bytes, Chunk]:
    """Checks every chunk, and cuts the file.

    Args:
        source: the whole file, whose signature and version have been read.

    Returns:
        the known chunks by their tags.

    Raises:
        FormatError: damage outside the segments.
    """
    offset = _PROLOGUE_BYTES
    known: list[Chunk] = []
    for _ in range(MAX_CHUNKS):
        chunk = _read_chunk(source, offset)
        offset = chunk.stop
        if chunk.tag in KNOWN:
            known.append(chunk)
        if not known:
            raise damaged("The file", "the first chunk is INDX", chunk.tag.decode())
        if chunk.tag == END:
            if source.size > offset:
                raise damaged("The file", "no byte may be left over", source.size - offset)
            _check_order(known)
            return {chunk.tag: chunk for chunk in known}
    raise damaged("The file", f"there are at most {MAX_CHUNKS} chunks", "more")


def _check_order(known: list[Chunk]) -> None:
    """Checks that the known chunks come once each, in their order, and the last is empty."""
    tags = [chunk.tag for chunk in known]
    if tags not in ([INDEX, DATA, END], [INDEX, METADATA, DATA, END]):
        rule = "the chunks are INDX, meta if there is metadata, DATA and DONE"
        raise damaged("The file", rule, b", ".join(tags).decode())
    end = known[-1]
    if end.stop > end.start:
        raise damaged("Chunk DONE", "it must be empty", f"{end.stop - end.start} bytes")


def _check_magic(data: bytes) -> None:
    if not data.startswith(MAGIC):
        if MAGIC[1:4] in data[:7]:
            raise FormatError(
                f"A diffq file starts with {MAGIC!r}, got {data[: len(MAGIC)]!r}. A transfer in "
                "text mode changed it; transfer it again in binary mode."
            )
        raise FormatError(
            f"A diffq file starts with {MAGIC!r}, got {data[: len(MAGIC)]!r}. "
            "Check the path: this is another kind of file."
        )


def _read_chunk(source: Source, offset: int) -> Chunk:
    _check_room(source, offset, HEADER_BYTES, "the header of a chunk")
    start = offset + HEADER_BYTES
    header = bytes(source.read(offset, start))
    tag, size = header[:4], int.from_bytes(header[4:12], "little")
    if not tag.isalpha():
        raise damaged("The file", "the tag of a chunk is four letters", tag)
    _check_room(source, start, size, f"chunk {tag.decode()}")
    body = source.read(start, start + size if tag in (INDEX, METADATA) else start)
    crc = zlib.crc32(body, zlib.crc32(header[:12]))
    if tag not in (INDEX, METADATA, DATA):
        for step in range(start, start + size, _STEP):
            crc = zlib.crc32(source.read(step, min(step + _STEP, start + size)), crc)
    if crc != int.from_bytes(header[12:], "little"):
        raise damaged(f"Chunk {tag.decode()}", "its checksum must match", "another")
    if tag not in KNOWN and tag[:1].isupper():
        raise FormatError(
            f"Chunk {tag.decode()}: a reader must understand chunks whose tag starts with a "
            f"capital, and this diffq knows {b', '.join(KNOWN).decode()}. Upgrade diffq."
        )
    return Chunk(tag, start, start + size, body)


def _check_room(source: Source, start: int, size: int, what: str) -> None:
    if size > source.size - start:
        raise damaged("The file", f"{what} needs {size} more bytes", f"only {source.size - start}")
