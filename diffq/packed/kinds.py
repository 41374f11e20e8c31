"""The kinds of records that can stay packed."""

from __future__ import annotations

from typing import Any

from diffq.format.kinds.levels import LevelRecord
from diffq.format.kinds.product import ProductRecord
from diffq.format.records import Record
from diffq.packed.codewords import PackedCodewords
from diffq.packed.levels import PackedLevels
from diffq.packed.weight import PackedWeight

_KINDS: tuple[tuple[Any, Any], ...] = (
    (LevelRecord, PackedLevels),
    (ProductRecord, PackedCodewords),
)


def stays_packed(kind: type[Record]) -> bool:
    """Whether weights of a kind of record can stay packed."""
    return any(issubclass(kind, each) for each, _ in _KINDS)


def pack(record: Record, by_rows: bool = False) -> PackedWeight:
    """The weight of a record of which `stays_packed` is true.

    Args:
        record: the record.
        by_rows: whether rows will be decoded alone, as an embedding does.
    """
    make = next(make for kind, make in _KINDS if isinstance(record, kind))
    packed: PackedWeight = make(record, by_rows)
    return packed
