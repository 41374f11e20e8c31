"""Reads files: all of the index at once, tensors when they are asked for."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffq.errors import ConfigError
from diffq.format import chunks, elements, entropy, frames, runs
from diffq.format.decoding import QuantizedTarget, Target, quantized_target
from diffq.format.entropy import DecodedPiece
from diffq.format.index import read_index
from diffq.format.kinds.base import Entry, QuantizedEntry, Record
from diffq.format.kinds.levels import LevelRecord
from diffq.format.metadata import read_metadata
from diffq.format.runs import RunCoding
from diffq.format.source import Buffer, MemorySource, Source
from diffq.format.threads import in_threads
from diffq.format.wire import damaged

# What a file may decode to unless the caller says otherwise: any small model, and what a
# gzip file of this size may hold. A writer fills files up to this (docs/format.md, section 11).
_BUDGET_BASE = 8 << 20
_BUDGET_RATIO = 1024

# Files below this many bytes are read by one thread: each takes the memory of a segment.
_SMALL = 1 << 16

# Decoded segments that are kept because several tensors share them.
_MOST_SHARED = 16

_Content: TypeAlias = "NDArray[np.uint8] | list[DecodedPiece]"


def default_budget(size: int) -> int:
    """Bytes that a file of `size` bytes may decode to: 8 MB and 1024 times its size."""
    return _BUDGET_BASE + _BUDGET_RATIO * size


def least_size(decoded: int) -> int:
    """The smallest size of a file that may decode to so many bytes: inverse of `default_budget`."""
    return max(0, -((_BUDGET_BASE - decoded) // _BUDGET_RATIO))


class Reader:
    """A file whose index has been read and checked.

    Names, shapes, kinds and sizes are there at once. Levels and elements are checked
    and decoded when they are asked for, each tensor alone. Methods can be called from
    several threads.

    Args:
        file: the whole file, as bytes or a source; it must stay unchanged as long as the
            reader is in use.
        budget: bytes that all tensors together may decode to (4 for a weight); by
            default 8 MB and 1024 times the size of the file. A larger file is refused
            before any memory is allocated.
        threads: threads to decode with; by default one for each core.

    Attributes:
        entries: name -> what the index says about the tensor, in the order of the file.
        aliases: further name -> name of the tensor, for tied tensors.
        metadata: the user's JSON object.
        size: bytes of the file.
        overhead: bytes that no tensor takes: signature, index, metadata, chunk headers.

    Raises:
        FormatError: the file is damaged, hostile or of another version, or the tensors
            exceed the budget.
    """

    def __init__(
        self, file: Buffer | Source, budget: int | None = None, threads: int | None = None
    ) -> None:
        self._source = MemorySource(file) if isinstance(file, Buffer) else file
        self.size = self._source.size
        self._threads = 1 if threads is None and self.size < _SMALL else threads
        minor = chunks.read_prologue(self._source)
        found = chunks.read_chunks(self._source)
        index = read_index(
            chunks.read_text(found[chunks.INDEX].body, "The index"),
            default_budget(self.size) if budget is None else budget,
            minor,
        )
        text = found.get(chunks.METADATA)
        self.metadata: dict[str, Any] = {}
        if text is not None:
            self.metadata = read_metadata(chunks.read_text(text.body, "The metadata"))
        self.entries: Mapping[str, Entry] = {entry.name: entry for entry in index.entries}
        self.aliases: Mapping[str, str] = index.aliases
        self._layout = index.layout
        self._storages = index.storages
        self._entries = index.entries
        self._numbers = {entry.name: number for number, entry in enumerate(index.entries)}
        data = found[chunks.DATA]
        sizes = (storage.size for storage in index.storages)
        self._starts = list(accumulate(sizes, initial=data.start))
        if self._starts[-1] != data.stop:
            rule = f"the segments of the index take {self._starts[-1] - data.start} bytes"
            raise damaged("Chunk DATA", rule, data.stop - data.start)
        self.overhead = self.size - (data.stop - data.start)
        self._shared: dict[int, _Content] = {}
        self._kept: dict[int, _Content] = {}
        self._keeps = False

    def record(self, name: str) -> Record:
        """Decodes one tensor, by its name or an alias.

        Raises:
            ConfigError: no tensor has this name.
            FormatError: what is stored of it is damaged.
        """
        return self.records([name])[name]

    def records(self, names: Iterable[str] | None = None) -> dict[str, Record]:
        """Decodes several tensors at once; all, without aliases, by default.

        Raises:
            ConfigError: no tensor has such a name.
            FormatError: what is stored of one is damaged.
        """
        chosen = self.entries if names is None else names
        numbers = {name: self._number(name) for name in chosen}
        targets = {number: self._target(number) for number in set(numbers.values())}
        self._decode(targets)
        return {name: targets[number].record() for name, number in numbers.items()}

    def values(self, name: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """What `record(name).values()` gives, bit for bit, without the record in between.

        Args:
            name: a quantized tensor, or an alias of one.
            out: C-contiguous float32 array of the tensor's shape to write to.

        Raises:
            ConfigError: no such tensor is stored as levels, or `out` does not fit.
            FormatError: what is stored of it is damaged.
        """
        return self.values_of([name], None if out is None else {name: out})[name]

    def values_of(
        self,
        names: Iterable[str] | None = None,
        out: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """What `values` gives for several tensors at once; by default all stored as levels.

        Takes arrays to write to by name; raises what `values` does.
        """
        if names is None:
            names = [n for n, entry in self.entries.items() if isinstance(entry, QuantizedEntry)]
        numbers = {name: self._number(name) for name in names}
        targets = {number: self._values_target(number) for number in set(numbers.values())}
        for name, array in (out or {}).items():
            target = targets[numbers[name]]
            target.out = _flat(array, target.entry)
        self._decode(targets)
        return {name: targets[number].values() for name, number in numbers.items()}

    def bits(self, name: str) -> NDArray[np.uint8]:
        """The bitwidth of each group of a tensor stored as levels.

        Raises:
            ConfigError: no such tensor is stored as levels.
            FormatError: what is stored of it is damaged.
        """
        record = self.record(name)
        if not isinstance(record, LevelRecord):
            raise ConfigError(f"Only tensors stored as levels have bitwidths, got {name!r}.")
        return record.bits

    def stored_bytes(self, name: str) -> int:
        """Bytes of the file's segments that a tensor takes; those shared, by its number of weights.

        Raises:
            ConfigError: no tensor has this name.
        """
        return self._stored_bytes[self._number(name)]

    def codings(self, name: str) -> list[str]:
        """How the segments of a tensor's integers, or else elements, are coded.

        Returns:
            Of "none", "rans" and "zstd" those in use.

        Raises:
            ConfigError: no tensor has this name.
        """
        last = self._layout.homes[self._number(name)][-1:]
        return sorted({self._storages[number].method for home in last for number in home})

    def verify(self, keep: bool = False) -> None:
        """Checks every byte of the file, without keeping what it decodes.

        Args:
            keep: keep levels in rANS, a byte or two each, until the reader is closed: they
                take longest to decode, and reading them next takes no time.

        Raises:
            FormatError: something is damaged.
        """
        self._keeps = keep
        targets = {
            number: quantized_target(entry, None)
            for number, entry in enumerate(self._entries)
            if isinstance(entry, QuantizedEntry)
        }
        self._decode(targets)
        for target in targets.values():
            target.check_bits()
        for name, entry in self.entries.items():
            if not isinstance(entry, QuantizedEntry):
                self.record(name)

    def close(self) -> None:
        """Closes the file, or releases the buffer."""
        self._shared.clear()
        self._kept.clear()
        self._source.close()

    @cached_property
    def _stored_bytes(self) -> list[int]:
        """`stored_bytes` of all tensors, in one pass: a segment can be shared by thousands."""
        totals = [0] * len(self._entries)
        for storage, segment in zip(self._storages, self._layout.segments, strict=True):
            before, size, count = 0, storage.size, segment.count
            for piece in segment.pieces:
                after = before + piece.count
                totals[piece.record] += size * after // count - size * before // count
                before = after
        return totals

    def _number(self, name: str) -> int:
        name = self.aliases.get(name, name)
        if name not in self._numbers:
            raise ConfigError(f"A tensor or alias of the file must be named, got {name!r}.")
        return self._numbers[name]

    def _target(self, number: int) -> Target:
        """Memory for the record of a tensor. The index has been checked against the budget."""
        entry = self._entries[number]
        if isinstance(entry, QuantizedEntry):
            return quantized_target(entry, np.uint16)
        return Target(entry, np.empty(entry.element_bytes, np.uint8))

    def _values_target(self, number: int) -> QuantizedTarget:
        """Memory for the values of a tensor, if it has any."""
        entry = self._entries[number]
        if isinstance(entry, QuantizedEntry):
            return quantized_target(entry, np.float32)
        rule = "Only tensors stored as levels have values"
        raise ConfigError(f"{rule}; read the record of {entry.name!r} instead.")

    def _decode(self, targets: Mapping[int, Target]) -> None:
        """Fills the targets: parameters and raw elements first, then levels."""
        homes = {segment for number in targets for segment in self._homes(number)}
        levels = {number for number in homes if self._storages[number].coding}
        work = partial(self._decode_segment, targets=targets)
        in_threads(work, sorted(homes - levels), self._threads)
        for target in targets.values():
            if isinstance(target, QuantizedTarget):
                target.check_elements()
        in_threads(work, sorted(levels), self._threads)

    def _homes(self, number: int) -> list[int]:
        """The segments that hold something of a tensor."""
        return [segment for home in self._layout.homes[number] for segment in home]

    def _decode_segment(self, number: int, targets: Mapping[int, Target]) -> None:
        content, start = self._content(number), 0
        for place, piece in enumerate(self._layout.segments[number].pieces):
            target = targets.get(piece.record)
            if target is not None and isinstance(content, np.ndarray):
                target.add_elements(piece, content[start : start + piece.count])
            elif isinstance(target, QuantizedTarget):
                target.add_levels(piece, content[place])
            start += piece.count

    def _content(self, number: int) -> _Content:
        """What a segment holds: uint8 [elements, item], or levels piece by piece."""
        if self._keeps and isinstance(self._storages[number].coding, RunCoding):
            if number not in self._kept:
                self._kept[number] = self._read_content(number)
            return self._kept[number]
        if len(self._layout.segments[number].pieces) == 1:
            return self._read_content(number)
        # Short tensors read one by one must not decode what they share each time.
        content = self._shared.get(number)
        if content is None:
            if len(self._shared) >= _MOST_SHARED:
                self._shared.clear()
            content = self._shared[number] = self._read_content(number)
        return content

    def _read_content(self, number: int) -> _Content:
        """The checked and decoded content of a segment."""
        storage, where = self._storages[number], self._where(number)
        segment, coding = self._layout.segments[number], storage.coding
        stored = self._source.read(self._starts[number], self._starts[number + 1])
        if zlib.crc32(stored) != storage.crc:
            raise damaged(where, "the checksum must match", "another")
        if isinstance(coding, RunCoding):
            return runs.decode(stored, coding, segment.pieces, where)
        if coding:
            payload = frames.expand(stored, storage.payload, where)
            return entropy.decode(payload, coding, segment.pieces, where)
        return elements.decode(stored, segment.item, storage.payload, where)

    def _where(self, number: int) -> str:
        pieces = self._layout.segments[number].pieces
        first = self._entries[pieces[0].record].name
        others = f" and {len(pieces) - 1} more" if len(pieces) > 1 else ""
        return f"Segment {number} (tensor {first!r}{others})"


def _flat(array: NDArray[np.float32], entry: Entry) -> NDArray[np.float32]:
    if array.dtype != np.float32 or array.shape != entry.shape or not array.flags.c_contiguous:
        raise ConfigError(
            f"The values of {entry.name!r} go to a C-contiguous float32 array of shape "
            f"{entry.shape}, got {array.dtype} {array.shape}."
        )
    return array.reshape(-1)
