"""Files on disk: opened lazily and verified. No torch needed."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.entries import Entry
from diffq.format.reader import Reader
from diffq.writing import PathLike

if TYPE_CHECKING:
    from torch import Tensor


class StoredModel(Mapping[str, "Tensor"]):
    """A file whose index is read, and whose tensors are decoded one by one when asked for.

    A mapping of every name, aliases of tied tensors included, to its decoded tensor.
    The file is memory-mapped; use it in a `with` block, or call `close()`.

    Args:
        path: the file.
        budget: bytes that the tensors may decode to; by default 8 MB and 1024 times the
            size of the file, which is enough for every file that `save` wrote.
        threads: threads to decode with; one for each core by default.

    Attributes:
        path: the file.
        reader: names, shapes, sizes, bits and metadata without torch.

    Raises:
        FormatError: the file is damaged, hostile, or of another version.
        OSError: the file cannot be read.
    """

    def __init__(
        self, path: PathLike, budget: int | None = None, threads: int | None = None
    ) -> None:
        self.path = Path(path)
        self._closed = False
        self._buffer = _map(self.path)
        try:
            self.reader = Reader(self._buffer, budget, threads)
        except BaseException:
            _unmap(self._buffer)
            raise

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Name to what the index says: kind, shape, dtype, group size."""
        return self.reader.entries

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tied tensors, to the name of their tensor."""
        return self.reader.aliases

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The JSON object that the file was saved with."""
        return self.reader.metadata

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.reader.size

    def bits(self, name: str) -> NDArray[np.uint8]:
        """Bitwidth of each group of a quantized tensor, uint8 [groups]."""
        self._check_open()
        return self.reader.bits(name)

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes in the file."""
        return self.reader.stored_bytes(name)

    def close(self) -> None:
        """Closes the file; tensors that were decoded stay."""
        self._closed = True
        self.reader.close()
        _unmap(self._buffer)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.path} is closed; read its tensors before.")

    def __getitem__(self, name: str) -> Tensor:
        """Decodes one tensor: on the CPU, in the dtype of the model."""
        if name not in self:
            raise KeyError(name)
        self._check_open()
        from diffq.state import record_tensor

        return record_tensor(self.reader.record(name))

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        yield from self.entries
        yield from self.aliases

    def __len__(self) -> int:
        return len(self.entries) + len(self.aliases)

    def __enter__(self) -> StoredModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"StoredModel({str(self.path)!r}, {len(self.entries)} tensors, {self.size} bytes)"


def open_file(path: PathLike, budget: int | None = None, threads: int | None = None) -> StoredModel:
    """Opens a file lazily: names, shapes, bits and sizes at once, tensors when asked for.

    Args, attributes and errors are those of `StoredModel`.

    Example:
        >>> with diffq.open("model.diffq") as stored:
        ...     weight = stored["encoder.weight"]
    """
    return StoredModel(path, budget, threads)


def verify(path: PathLike, budget: int | None = None) -> None:
    """Checks every byte of a file: structure, checksums, and that every tensor decodes.

    Args:
        path: the file.
        budget: see `StoredModel`.

    Raises:
        FormatError: something is damaged, hostile, or of another version.
        OSError: the file cannot be read.
    """
    with StoredModel(path, budget) as stored:
        stored.reader.verify()


def _map(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FormatError(f"A file of diffq has a header, got an empty file: {path}.")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _unmap(buffer: mmap.mmap | bytes) -> None:
    if isinstance(buffer, mmap.mmap):
        # Views that an error's traceback still holds keep the map alive until it is gone.
        with suppress(BufferError):
            buffer.close()
