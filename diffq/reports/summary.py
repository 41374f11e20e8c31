"""A file in numbers: what is stored of each tensor, and of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffq.format.container import Codec, encode
from diffq.format.dtypes import ITEM_SIZES
from diffq.format.kinds.base import Entry, QuantizedEntry, Record
from diffq.format.kinds.levels import LevelRecord
from diffq.format.reader import Reader

#: Told what is being done, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]

# Memory of the tensors that are decoded at once, unless a single one has more.
_BATCH_BYTES = 1 << 24

#: What some kinds of tensors have, and the value of others.
DETAILS = {
    "stored_dtype": None,
    "group_size": None,
    "groups": 0,
    "zero_point": False,
    "block_size": None,
    "codewords": None,
}


# Share of a file below which a tensor with one scale is no layer of its own in pictures.
_LEAST_SHARE = 0.005


def level_counts(record: Record) -> dict[int, int]:
    """Weights at each bitwidth, by rising bitwidth; none without levels, or without bitwidths."""
    chosen = isinstance(record, LevelRecord) and not record.by_entropy
    levels = record.coded if chosen else None
    return levels.counts() if levels else {}


def coded_bits(record: Record) -> tuple[int, int]:
    """Bits of all levels or indices of a tensor, and the number of weights they stand for."""
    if record.coded is None:
        return 0, 0
    if isinstance(record, LevelRecord) and record.by_entropy:
        return math.ceil(record.coded.entropy_bits()), record.numel
    counts = record.coded.counts()
    return sum(width * count for width, count in counts.items()), record.numel


def mean_bits(coded: Iterable[tuple[int, int]]) -> float | None:
    """Bits per weight of what `coded_bits` counted for some tensors; None without weights."""
    pairs = list(coded)
    weights = sum(count for _, count in pairs)
    return sum(bits for bits, _ in pairs) / weights if weights else None


@dataclass(frozen=True)
class Decoded:
    """What only the decoded levels or indices of a tensor tell.

    Attributes:
        counts: weights at each bitwidth, by rising bitwidth; none where no levels are stored.
        coded: bits of all levels or indices, and the number of weights they stand for.
        bound_bytes: the entropy of the tensor.
    """

    counts: Mapping[int, int]
    coded: tuple[int, int]
    bound_bytes: float

    @classmethod
    def of(cls, record: Record) -> Decoded:
        """Counts the levels or indices of a record."""
        return cls(level_counts(record), coded_bits(record), record.entropy_bound_bits() / 8)


@dataclass(frozen=True)
class Tensor:
    """One stored tensor.

    Attributes:
        entry: what the index says about it.
        tied: its further names.
        codings: how its integers, or else its elements, are coded.
        size: bytes of the file that it takes.
        decoded: what its levels tell; None if they were not decoded.
    """

    entry: Entry
    tied: tuple[str, ...]
    codings: tuple[str, ...]
    size: int
    decoded: Decoded | None

    @property
    def name(self) -> str:
        """The name under which it is stored."""
        return self.entry.name

    @property
    def quantized(self) -> bool:
        """Whether its weights are computed from integers."""
        return isinstance(self.entry, QuantizedEntry)

    @property
    def counts(self) -> Mapping[int, int]:
        """Weights at each bitwidth, if there are levels and they were decoded."""
        return self.decoded.counts if self.decoded else {}

    @property
    def mean_bits(self) -> float | None:
        """Bits per weight, if there are levels or indices and they were decoded."""
        return mean_bits([self.decoded.coded]) if self.decoded else None

    @property
    def float32_bytes(self) -> int:
        """Bytes in a float32 checkpoint; integers and the like as they are."""
        entry = self.entry
        return entry.numel * (4 if "float" in entry.dtype else ITEM_SIZES[entry.dtype])

    @property
    def kind(self) -> str:
        """The kind, with what is special: a zero point, a codebook, the dtype of its elements."""
        words, detail = [self.entry.kind], self.detail
        if detail["codewords"]:
            words.append(f"{detail['codewords']}x{detail['block_size']}")
        if detail["zero_point"]:
            words.append("zero-point")
        # A raw tensor can be stored in another dtype than it is restored to.
        if detail["codewords"] or detail["stored_dtype"] not in (None, self.entry.dtype):
            words.append(detail["stored_dtype"])
        return " ".join(words)

    @property
    def detail(self) -> dict[str, Any]:
        """What only some kinds of tensors have."""
        return {key: getattr(self.entry, key, absent) for key, absent in DETAILS.items()}


@dataclass(frozen=True)
class Summary:
    """A stored model.

    Attributes:
        tensors: in the order of the file.
        size: bytes of the file.
        metadata: the JSON object that the file was saved with.
    """

    tensors: tuple[Tensor, ...]
    size: int
    metadata: Mapping[str, Any]

    @property
    def quantized(self) -> list[Tensor]:
        """The tensors that are computed from integers."""
        return [tensor for tensor in self.tensors if tensor.quantized]

    @property
    def layers(self) -> list[Tensor]:
        """Tensors with levels or indices, without biases and norms that have one scale each.

        Those would fill the pictures with bars of one bitwidth.
        """
        bits = [tensor for tensor in self.quantized if tensor.mean_bits is not None]
        least = _LEAST_SHARE * self.size
        large = [t for t in bits if t.entry.kind != "scaled" or t.size >= least]
        return large or bits

    @property
    def raw(self) -> list[Tensor]:
        """The tensors that are stored as elements."""
        return [tensor for tensor in self.tensors if not tensor.quantized]

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(tensor.entry.numel for tensor in self.quantized)

    @property
    def overhead(self) -> int:
        """Bytes of the index, the metadata and all else that is no tensor."""
        return self.size - sum(tensor.size for tensor in self.tensors)

    @property
    def float32_bytes(self) -> int:
        """Bytes of a float32 checkpoint."""
        return sum(tensor.float32_bytes for tensor in self.tensors)

    @property
    def bound_bytes(self) -> float | None:
        """The entropy of all tensors, which no coder of single symbols can beat."""
        decoded = [tensor.decoded for tensor in self.tensors]
        known = [each.bound_bytes for each in decoded if each is not None]
        return sum(known) if len(known) == len(decoded) else None

    @property
    def mean_bits(self) -> float | None:
        """Bits per weight of all levels and indices."""
        return mean_bits(tensor.decoded.coded for tensor in self.tensors if tensor.decoded)

    @property
    def counts(self) -> dict[int, int]:
        """Weights at each bitwidth, by rising bitwidth."""
        total: dict[int, int] = {}
        for tensor in self.tensors:
            for width, count in tensor.counts.items():
                total[width] = total.get(width, 0) + count
        return dict(sorted(total.items()))


def largest(tensors: Sequence[Tensor], most: int) -> tuple[list[Tensor], tuple[int, int]]:
    """The largest tensors in the order of the file, and the number and bytes of the others."""
    chosen = {id(t) for t in sorted(tensors, key=lambda t: -t.size)[:most]}
    shown = [tensor for tensor in tensors if id(tensor) in chosen]
    rest = sum(tensor.size for tensor in tensors) - sum(tensor.size for tensor in shown)
    return shown, (len(tensors) - len(shown), rest)


def quiet(what: str, done: int, total: int) -> None:
    """Tells nobody of the progress."""


def summarize(
    reader: Reader,
    decode: bool = True,
    report: Progress = quiet,
    look: Callable[[str, Record], None] = lambda name, record: None,
) -> Summary:
    """Summarizes a file.

    Args:
        reader: the file.
        decode: decode the levels, some tensors at a time, for bitwidths and entropy.
        report: told about the progress.
        look: gets each record that is decoded, for what a caller needs besides.

    Raises:
        FormatError: a tensor is damaged.
    """
    tied: dict[str, list[str]] = {name: [] for name in reader.entries}
    for alias, name in reader.aliases.items():
        tied[name].append(alias)
    decoded: dict[str, Decoded] = {}
    for names in _batches(reader.entries) if decode else ():
        report("reading levels", len(decoded), len(tied))
        for name, record in reader.records(names).items():
            decoded[name] = Decoded.of(record)
            look(name, record)
    tensors = (
        Tensor(entry, tuple(tied[name]), tuple(reader.codings(name)), reader.stored_bytes(name),
               decoded.get(name))
        for name, entry in reader.entries.items()
    )  # fmt: skip
    return Summary(tuple(tensors), reader.size, reader.metadata)


def _batches(entries: Mapping[str, Entry]) -> Iterator[list[str]]:
    """Tensors to decode at once: thousands of small ones share a segment."""
    batch: list[str] = []
    memory = 0
    for name, entry in entries.items():
        if batch and memory + entry.decoded_bytes > _BATCH_BYTES:
            yield batch
            batch, memory = [], 0
        batch.append(name)
        memory += entry.decoded_bytes
    if batch:
        yield batch


def reader_of(
    records: Mapping[str, Record], aliases: Mapping[str, str], codec: Codec = "rans"
) -> Reader:
    """Reads the file that a snapshot of a model would be written to."""
    return Reader(encode(records, aliases, codec=codec))
