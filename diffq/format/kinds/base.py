"""A kind of record: the interface through which index, reader, writer, states and CLI ask it.

A kind is a module with two classes:

    Record    one tensor as integers and elements: what models, states and files are made of
    Entry     what the index of a file says about it, and how segments are decoded
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError
from diffq.format.dtypes import FLOAT_DTYPES, TypedBytes
from diffq.format.entropy import DecodedPiece, entropy_bits
from diffq.format.groups import split_groups, stream_counts
from diffq.format.layout import LEVELS, Part, Piece
from diffq.format.wire import Cursor

Bytes = NDArray[np.uint8]
Levels = NDArray[np.uint16]
Floats = NDArray[np.float32]

MAX_RANK = 32
#: The product of all sizes other than 0: what NumPy, torch and 63-bit byte counts can address.
MAX_ELEMENTS = 1 << 48


@dataclass(frozen=True, eq=False)
class Coded:
    """Integers that are entropy-coded: levels, or indices into a codebook.

    Attributes:
        levels: uint16 [levels].
        bits: uint8 [groups], the bitwidth of each group.
        group_size: levels per group; the last group may be short.
        columns: levels in a row of the tensor; 0 if it has no rows.
    """

    levels: Levels
    bits: Bytes
    group_size: int
    columns: int = 0

    def counts(self) -> dict[int, int]:
        """Number of levels at each bitwidth in use, by rising bitwidth."""
        return stream_counts(self.bits, self.group_size, self.levels.size)

    def streams(self) -> dict[int, Levels]:
        """The levels of each bitwidth in use, in their order, by rising bitwidth."""
        return split_groups(self.levels, self.bits, self.group_size)

    def entropy_bits(self) -> float:
        """Zeroth-order entropy of the levels of each bitwidth, and of the bitwidths."""
        levels = sum(entropy_bits(np.bincount(stream)) for stream in self.streams().values())
        return entropy_bits(np.bincount(self.bits)) + levels


class Fields(Protocol):
    """A tensor of a quantized state, which may come from anywhere, read within bounds.

    All methods raise StateError where the value of a key is missing or another.

    Attributes:
        kind: the kind of the tensor in states.
        shape: the tensor's shape.
        dtype: the dtype to restore, by its torch name.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str

    def number(self, key: str) -> int:
        """A whole number of any size."""

    def flag(self, key: str) -> bool:
        """True or False."""

    def array(self, key: str, dims: int, *dtypes: str) -> NDArray[Any]:
        """An array of so many dimensions and one of these dtypes."""

    def typed(self, key: str) -> TypedBytes:
        """An array of any shape and dtype; a copy."""


@dataclass(frozen=True, eq=False)
class Record(ABC):
    """One tensor as integers and elements, frozen, without the module that made it.

    Attributes:
        shape: the tensor's shape.
        dtype: the dtype to restore, by its torch name.

    Raises:
        FormatError: the parts contradict each other.
    """

    #: The kind in states; more than one if some tensors must not be read by earlier versions.
    state_kinds: ClassVar[tuple[str, ...]]

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def elements(self) -> Bytes:
        """The bytes that are stored as they are: a raw tensor, parameters or a codebook."""

    @property
    def coded(self) -> Coded | None:
        """The integers; None where the elements alone give the values."""
        return None

    @property
    def parameter_bits(self) -> int:
        """Bits of everything but the integers and their bitwidths."""
        return 8 * self.elements.size

    @property
    def least_parameter_bits(self) -> float:
        """What entropy coding can make of them: nothing, unless they repeat."""
        return self.parameter_bits

    def stored_bits(self) -> int:
        """Size of the tensor in bits, with integers at their bitwidth."""
        return self.parameter_bits

    @abstractmethod
    def decoded(self) -> TypedBytes:
        """The tensor's elements, to be converted to its dtype; a copy."""

    @abstractmethod
    def entry(self, name: str) -> Entry:
        """Describes the record for the index; raises FormatError if a file cannot hold it."""

    @abstractmethod
    def fields(self, packed: bool) -> dict[str, Any]:
        """What a state holds beside shape and dtype: numbers, arrays and `TypedBytes`.

        Args:
            packed: integers at their own width; otherwise one an element, easier to look into.
        """

    @classmethod
    @abstractmethod
    def from_fields(cls, fields: Fields) -> Record:
        """Inverse of `fields`.

        Raises:
            StateError: a field is missing or of another type.
            FormatError: the fields contradict each other.
        """

    def entropy_bound_bits(self) -> float:
        """Bits that no coder of single symbols can go below for this tensor.

        Coders that look at several symbols at once, as ours can, may end up a little below.
        """
        coded = self.coded.entropy_bits() if self.coded else 0.0
        return self.least_parameter_bits + coded


@dataclass(frozen=True, eq=False)
class QuantizedRecord(Record):
    """A tensor whose weights are computed from integers, in float32."""

    @abstractmethod
    def values(self) -> Floats:
        """The decoded weights: float32, in the tensor's shape."""

    def decoded(self) -> TypedBytes:
        """The decoded weights."""
        return TypedBytes(self.shape, "float32", self.values().reshape(-1).view(np.uint8))


@dataclass(frozen=True)
class Entry(ABC):
    """What the index says about one tensor (docs/format.md, section 4).

    Attributes:
        kind: the name of the kind.
        record_type: its record.
        minor: the minor version of the format since which there is the kind.
        name: the tensor's name.
        shape: the tensor's shape.
        dtype: the dtype to restore, by its torch name.

    Raises:
        FormatError: a rule of section 4 is broken.
    """

    kind: ClassVar[str]
    record_type: ClassVar[type[Record]]
    minor: ClassVar[int] = 0

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        try:
            self.check()
        except FormatError as error:
            raise FormatError(f"{self.where}: {error}") from error

    def check(self) -> None:
        """Raises FormatError if the description alone breaks a rule."""
        if len(self.shape) > MAX_RANK:
            raise FormatError(f"A tensor has at most {MAX_RANK} dimensions, got {len(self.shape)}.")
        if math.prod(size for size in self.shape if size) > MAX_ELEMENTS:
            raise FormatError(
                f"The product of all sizes other than 0 is at most 2**48, got {list(self.shape)}."
            )

    @classmethod
    @abstractmethod
    def read(cls, cursor: Cursor, where: str) -> dict[str, Any]:
        """Reads what only this kind's entries have: the arguments after name, shape and dtype."""

    @abstractmethod
    def write(self) -> bytes:
        """Inverse of `read`."""

    @property
    @abstractmethod
    def arrays(self) -> list[Part]:
        """What is stored, in the order of the file: elements and, of some kinds, integers."""

    @abstractmethod
    def record(self, elements: Bytes, levels: Levels, bits: Bytes) -> Record:
        """The record.

        Args:
            elements: the bytes of the elements.
            levels: the integers, or zeros where they are not stored.
            bits: the bitwidth of each of their groups; none where they are not stored.

        Raises:
            FormatError: they contradict each other.
        """

    @property
    def where(self) -> str:
        """The tensor, for errors."""
        return f"tensor {self.name!r}"

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def parts(self) -> list[Part]:
        """The arrays that exist: empty ones do not."""
        return [part for part in self.arrays if part.count]

    @property
    def element_bytes(self) -> int:
        """Bytes of the elements: a raw tensor, float parameters or a codebook."""
        return sum(part.item * part.count for part in self.arrays)

    @property
    def decoded_bytes(self) -> int:
        """Memory that the decoded tensor needs (section 11)."""
        return self.element_bytes


@dataclass(frozen=True)
class QuantizedEntry(Entry):
    """What the index says about a tensor whose weights are computed from integers."""

    def check(self) -> None:
        """Raises FormatError if the description alone breaks a rule."""
        super().check()
        check_quantized_dtype(self.dtype)

    @property
    @abstractmethod
    def integers(self) -> int:
        """Number of levels or indices of the record."""

    @property
    def stored_integers(self) -> Part | None:
        """Where the integers are; None if the elements alone give the values."""
        return next((part for part in self.parts if part.item == LEVELS), None)

    @property
    def decoded_bytes(self) -> int:
        """Memory that the decoded tensor needs (section 11)."""
        return 4 * self.numel + self.element_bytes

    @abstractmethod
    def check_elements(self, elements: Bytes) -> None:
        """Raises FormatError for elements that integers cannot be decoded with."""

    @abstractmethod
    def check_piece(self, decoded: DecodedPiece, elements: Bytes) -> None:
        """Raises FormatError for integers that break a rule of the kind."""

    @abstractmethod
    def decode(self, elements: Bytes, piece: Piece, decoded: DecodedPiece, out: Floats) -> None:
        """Writes the values of a piece to its part of `out`, the same that the record gives."""

    @abstractmethod
    def fill(self, elements: Bytes, out: Floats) -> None:
        """Writes all values where no integers are stored."""


def check_quantized_dtype(dtype: str) -> None:
    """Raises FormatError for a dtype that quantized weights are not converted to."""
    if dtype not in FLOAT_DTYPES:
        raise FormatError(
            f"Quantized levels decode to one of {', '.join(FLOAT_DTYPES)}, got {dtype}."
        )
