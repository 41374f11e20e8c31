"""Files on disk: opened lazily and verified. No torch needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffq.errors import ConfigError, FormatError
from diffq.format.kinds.base import Entry
from diffq.format.reader import Reader
from diffq.format.source import FileSource, MemorySource, Source
from diffq.reports.markup import joined, tag
from diffq.reports.notebook import fragment
from diffq.reports.summary import summarize
from diffq.reports.text import shape
from diffq.storage.writing import PathLike

if TYPE_CHECKING:
    from torch import Tensor

#: From where a model can be read: a path, or a binary file that is open for reading.
Readable = PathLike | IO[bytes]

_HEADER = ("tensor", "shape", "kind", "bytes")


class StoredModel(Mapping[str, "Tensor"]):
    """A file whose index is read, and whose tensors are decoded one by one when asked for.

    A mapping of every name, aliases of tied tensors included, to its decoded tensor.
    The file stays open; use it in a `with` block, or call `close()`. It must not be changed
    in place meanwhile. A new file that takes its place, as `save` writes it, does no harm.

    Args:
        path: a path, or a binary file, of which the rest is read into memory at once.
        budget: bytes that the tensors may decode to; by default 8 MB and 1024 times the
            size of the file, which is enough for every file that `save` wrote.
        threads: threads to decode with; one for each core by default.

    Attributes:
        path: the file; None if it was open already.
        reader: names, shapes, sizes, bits and metadata without torch.

    Raises:
        FormatError: the file is damaged, hostile, or of another version.
        ConfigError: neither a path nor a binary file was given.
        OSError: the file cannot be read.
    """

    def __init__(
        self, path: Readable, budget: int | None = None, threads: int | None = None
    ) -> None:
        self.path = Path(path) if isinstance(path, (str, os.PathLike)) else None
        self._closed = False
        source = _open_source(path)
        try:
            self.reader = Reader(source, budget, threads)
        except BaseException:
            source.close()
            raise

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Name to what the index says: kind, shape, dtype, and what only its kind has."""
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

    @property
    def _name(self) -> str:
        return "an open file" if self.path is None else str(self.path)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self._name} is closed; read its tensors before.")

    def __getitem__(self, name: str) -> Tensor:
        """Decodes one tensor: on the CPU, in the dtype of the model."""
        if name not in self:
            raise KeyError(name)
        self._check_open()
        from diffq.storage.state import record_tensor

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

    def _repr_html_(self) -> str:
        """A table for notebooks of what the index tells: no tensor is decoded."""
        tensors = summarize(self.reader, decode=False).tensors
        rows = [(t.name, shape(t.entry.shape), t.kind, f"{t.size:,}") for t in tensors]
        last = ("total", "", "", f"{self.size:,}")
        return joined(tag("p", repr(self)), fragment(_HEADER, rows, [last]))

    def __repr__(self) -> str:
        return f"StoredModel({self._name!r}, {len(self.entries)} tensors, {self.size} bytes)"


def open_file(path: Readable, budget: int | None = None, threads: int | None = None) -> StoredModel:
    """Opens a file lazily: names, shapes, bits and sizes at once, tensors when asked for.

    Args, attributes and errors are those of `StoredModel`.

    Examples:
        >>> with diffq.open("model.diffq") as stored:
        ...     weight = stored["encoder.weight"]
    """
    return StoredModel(path, budget, threads)


def verify(path: Readable, budget: int | None = None) -> None:
    """Checks every byte of a file: structure, checksums, and that every tensor decodes.

    Args:
        path: a path, or a binary file, which is read to its end.
        budget: see `StoredModel`.

    Raises:
        FormatError: something is damaged, hostile, or of another version.
        OSError: the file cannot be read.
    """
    with StoredModel(path, budget) as stored:
        stored.reader.verify()


def read_whole(file: Readable) -> bytes:
    """All bytes of a file.

    Raises:
        ConfigError: neither a path nor a binary file was given.
        FormatError: the file is empty.
        OSError: the file cannot be read.
    """
    if isinstance(file, (str, os.PathLike)):
        whole = Path(file).read_bytes()
        _check_filled(len(whole), file)
        return whole
    data = file.read() if hasattr(file, "read") else None
    if not isinstance(data, bytes):
        got = "a text file" if isinstance(data, str) else type(file).__name__
        raise ConfigError(
            f"A model is read from a path or a binary file, got {got}. "
            "Pass a path, a file opened with mode 'rb', or io.BytesIO(data)."
        )
    _check_filled(len(data), getattr(file, "name", "an open file"))
    return data


def _open_source(file: Readable) -> Source:
    """A regular file, to be read when its bytes are needed; all others are read at once."""
    if not isinstance(file, (str, os.PathLike)) or not os.path.isfile(file):
        return MemorySource(read_whole(file))
    _check_filled(os.path.getsize(file), file)
    return FileSource(file)


def _check_filled(size: int, name: object) -> None:
    if not size:
        raise FormatError(f"A file of diffq has a header, got an empty file: {name}.")
