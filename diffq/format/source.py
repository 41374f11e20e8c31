"""The bytes of a file: in memory, or read from the disk piece by piece.

A file on the disk is not memory-mapped, because a process that touches a map of a file
that was cut in the meantime is killed.
"""

from __future__ import annotations

import os
import threading
from mmap import mmap
from typing import Protocol

from diffq.format.wire import damaged

#: The bytes of a whole file.
Buffer = bytes | bytearray | memoryview | mmap


class Source(Protocol):
    """The bytes of a file. `read` can be called from several threads.

    Attributes:
        size: number of bytes.
    """

    size: int

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes from `start` to before `stop`, which are within the file.

        Raises:
            FormatError: the file has become shorter.
        """

    def close(self) -> None:
        """Ends reading."""


class MemorySource:
    """A file in memory, which must stay unchanged; see `Source`."""

    def __init__(self, buffer: Buffer) -> None:
        self._view = memoryview(buffer).cast("B")
        self.size = len(self._view)

    def read(self, start: int, stop: int) -> memoryview:
        """A view of the bytes."""
        return self._view[start:stop]

    def close(self) -> None:
        """Releases the buffer."""
        self._view.release()


class FileSource:
    """A regular file on the disk, open until `close`; see `Source`.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, stop: int) -> memoryview:
        """A copy of the bytes."""
        data, filled = memoryview(bytearray(stop - start)), 0
        while filled < len(data):
            count = self._read_into(data[filled:], start + filled)
            if not count:
                rule = "a file must stay as it is while it is open"
                raise damaged("The file", rule, f"an end at byte {start + filled} of {self.size}")
            filled += count
        return data

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read_into(self, data: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [data], start)
        with self._lock:
            self._file.seek(start)
            piece = self._file.read(len(data))
        data[: len(piece)] = piece
        return len(piece)
