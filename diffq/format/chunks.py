"""The outermost layer of a file: signature, version and chunks (docs/format.md, section 3)."""

from __future__ import annotations

import zlib

from diffq.errors import FormatError
from diffq.format import frames
from diffq.format.wire import Cursor, damaged, varint

#: A byte above 127, CR LF, Ctrl-Z and LF: any text-mode transfer changes one of them.
MAGIC = b"\x89DFQ\r\n\x1a\n"
VERSION = 1

INDEX, METADATA, DATA, END = b"INDX", b"meta", b"DATA", b"DONE"
KNOWN = (INDEX, METADATA, DATA, END)
#: Zeros that a reader skips; see docs/format.md, section 11.
FILL = b"fill"

HEADER_BYTES = 16
MAX_CHUNKS = 64
#: Bytes of the content of INDX or meta: an index of a million tensors.
MAX_TEXT = 1 << 26


def prologue() -> bytes:
    """The bytes that every file starts with."""
    return MAGIC + VERSION.to_bytes(2, "little")


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


def read_chunks(data: memoryview) -> dict[bytes, memoryview]:
    """Checks signature, version and every chunk, and cuts the file.

    Args:
        data: the whole file.

    Returns:
        the bodies of the known chunks.

    Raises:
        FormatError: not a diffq file, another version, or damage outside the segments.
    """
    _check_prologue(bytes(data[: len(MAGIC) + 2]))
    cursor = Cursor(data, "The file")
    cursor.take(len(MAGIC) + 2, "the signature")
    known: list[tuple[bytes, memoryview]] = []
    for _ in range(MAX_CHUNKS):
        tag, body = _read_chunk(cursor)
        if tag in KNOWN:
            known.append((tag, body))
        if not known:
            raise damaged("The file", "the first chunk is INDX", tag.decode())
        if tag == END:
            cursor.end()
            _check_order([tag for tag, _ in known], len(body))
            return dict(known)
    raise damaged("The file", f"there are at most {MAX_CHUNKS} chunks", "more")


def _check_order(tags: list[bytes], end: int) -> None:
    """Checks that the known chunks come once each, in their order, and the last is empty."""
    if tags not in ([INDEX, DATA, END], [INDEX, METADATA, DATA, END]):
        rule = "the chunks are INDX, meta if there is metadata, DATA and DONE"
        raise damaged("The file", rule, b", ".join(tags).decode())
    if end:
        raise damaged("Chunk DONE", "it must be empty", f"{end} bytes")


def _check_prologue(data: bytes) -> None:
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
    version = int.from_bytes(data[len(MAGIC) :], "little")
    if len(data) == len(MAGIC) + 2 and version != VERSION:
        raise FormatError(
            f"This diffq reads version {VERSION} of the file format, got version {version}. "
            "Install a diffq that reads it."
        )


def _read_chunk(cursor: Cursor) -> tuple[bytes, memoryview]:
    header = bytes(cursor.take(HEADER_BYTES, "the header of a chunk"))
    tag, size = header[:4], int.from_bytes(header[4:12], "little")
    if not tag.isalpha():
        raise damaged("The file", "the tag of a chunk is four letters", tag)
    body = cursor.take(size, f"chunk {tag.decode()}")
    if header != chunk_header(tag, size, b"" if tag == DATA else body):
        raise damaged(f"Chunk {tag.decode()}", "its checksum must match", "another")
    if tag not in KNOWN and tag[:1].isupper():
        raise FormatError(
            f"Chunk {tag.decode()}: a reader must understand chunks whose tag starts with a "
            f"capital, and this diffq knows {b', '.join(KNOWN).decode()}. Upgrade diffq."
        )
    return tag, body
