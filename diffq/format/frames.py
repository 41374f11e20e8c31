"""Bytes to one zstd frame and back, or as they are where that is no longer.

Which of the two it is follows from the sizes: a frame is always shorter than its
content (docs/format.md, section 3).

The parameters come from measurement. Levels have no repetitions worth finding:
what shortens them is the Huffman stage, so `LEVELS` makes false matches rare and
cheap. None of the strategies here depends on the processor: zstd's `greedy`,
`lazy` and `lazy2` find other matches where SIMD is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zstandard

from diffq.format.wire import damaged

_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"

#: The largest window that a reader must provide (docs/format.md, section 3).
MAX_WINDOW = 1 << 23


def _parameters(**chosen: int) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters(
        write_content_size=True, write_checksum=False, write_dict_id=False, **chosen
    )


LEVELS = _parameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
)
#: For long raw data: finds repetitions at little cost.
LONG = _parameters(
    strategy=zstandard.STRATEGY_DFAST,
    window_log=21,
    hash_log=17,
    chain_log=16,
    search_log=1,
    min_match=5,
    target_length=0,
)
#: For short data: names, shapes, metadata, small tensors.
SHORT = _parameters(
    strategy=zstandard.STRATEGY_BTULTRA2,
    window_log=18,
    hash_log=16,
    chain_log=17,
    search_log=8,
    min_match=3,
    target_length=256,
)


def compress(parts: Sequence[Any], parameters: zstandard.ZstdCompressionParameters) -> bytes:
    """One frame of all parts' bytes; each part starts a block, with statistics of its own."""
    size = sum(memoryview(part).nbytes for part in parts)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=size)
    pieces = []
    for index, part in enumerate(parts):
        if index:
            pieces.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        pieces.append(frame.compress(part))
    pieces.append(frame.flush())
    return b"".join(pieces)


def expand(stored: memoryview, size: int, where: str) -> bytes | memoryview:
    """The content of stored bytes, of which `size` is known.

    Args:
        stored: one frame, or the content itself where it has `size` bytes.
        size: bytes of the content; the caller has checked that so many are acceptable.
        where: what it is, for errors.

    Raises:
        FormatError: not exactly one sound frame with a content of `size` bytes.
    """
    if len(stored) == size:
        return stored
    if len(stored) > size:
        raise damaged(where, f"{size} bytes must be stored in as many or fewer", len(stored))
    if stored[:4] != _FRAME_MAGIC:
        # Skippable frames among others, which some versions of zstandard read as empty.
        raise damaged(where, "a zstd frame must start with 28 b5 2f fd", stored[:4].hex(" "))
    try:
        _check_frame(zstandard.get_frame_parameters(stored), size, where)
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        return decompressor.decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise damaged(where, "the stored bytes must be one zstd frame", error) from error


def _check_frame(frame: zstandard.FrameParameters, size: int, where: str) -> None:
    """Checks the frame's own header before anything is allocated (section 3)."""
    if frame.content_size != size:
        raise damaged(where, f"the zstd frame must announce {size} bytes", frame.content_size)
    if frame.window_size > MAX_WINDOW:
        rule = f"a zstd frame's window may have {MAX_WINDOW} bytes"
        raise damaged(where, rule, frame.window_size)
    if frame.dict_id:
        raise damaged(where, "a zstd frame must need no dictionary", f"one of id {frame.dict_id}")
