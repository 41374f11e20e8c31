"""Frozen records to the state dict of `get_quantized_state`, and back.

The state holds tensors and plain containers only, so that
`torch.load(weights_only=True)` reads it:

    {"format": "diffq.state", "version": 1,
     "tensors": {name: {"kind": ..., "shape": [...], "dtype": ..., ...}},
     "aliases": {name: name of the tensor that it is tied to}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq.attach.plan import dtype_name
from diffq.errors import FormatError, StateError
from diffq.format import bitpack
from diffq.format.groups import group_count, merge_levels, stream_counts
from diffq.format.kinds.base import Record
from diffq.format.kinds.grid import GridRecord
from diffq.format.kinds.levels import MAX_BITS, LevelRecord, map_width
from diffq.format.kinds.product import ProductRecord
from diffq.format.kinds.raw import RawRecord
from diffq.format.kinds.scaled import ScaledRecord
from diffq.storage.state_entry import (
    as_tensor,
    describe,
    read_array,
    read_dense,
    read_floating,
    read_shape,
    read_typed,
)
from diffq.storage.state_product import product_entry, read_product

FORMAT = "diffq.state"
VERSION = 1

#: A bit map tells the bitwidths 1 to 15 apart.
MAX_MAP_WIDTH = 4


@dataclass(frozen=True)
class Header:
    """What a stored model consists of, known before anything is decoded.

    Attributes:
        tensors: name to shape and dtype name, in the order of the model's state dict.
        aliases: further names of tied tensors, to the name of their tensor.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class Snapshot:
    """A whole model as records.

    Attributes:
        records: name to record, in the order of the model's state dict.
        aliases: further names of tied tensors, to the name of their record.
    """

    records: Mapping[str, Record]
    aliases: Mapping[str, str]


def raw_record(tensor: Tensor, stored: torch.dtype | None = None) -> RawRecord:
    """A tensor bit for bit, or in the dtype `stored`."""
    kept = tensor.detach().to("cpu", stored or tensor.dtype).resolve_conj().resolve_neg()
    # A copy, so that the record does not follow the tensor.
    flat = kept.reshape(-1).clone(memory_format=torch.contiguous_format)
    data = flat.view(torch.uint8).numpy()
    return RawRecord(tuple(tensor.shape), dtype_name(tensor.dtype), dtype_name(kept.dtype), data)


def record_tensor(record: Record) -> Tensor:
    """The tensor that a record decodes to, on the CPU."""
    dtype: torch.dtype = getattr(torch, record.dtype)
    decoded = record.decoded()
    return _typed_view(decoded.data, getattr(torch, decoded.dtype), record.shape).to(dtype)


def to_state(snapshot: Snapshot, packed: bool = True) -> dict[str, Any]:
    """Builds the state dict of a snapshot.

    Args:
        snapshot: the model.
        packed: store levels and bit maps at their own width; otherwise one int16
            a level and one byte a bitwidth, easier to look into.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "tensors": {name: _to_entry(record, packed) for name, record in snapshot.records.items()},
        "aliases": dict(snapshot.aliases),
    }


def read_header(state: Any) -> Header:
    """Reads names, shapes and dtypes of a state dict, which may come from anywhere.

    Raises:
        StateError: it is no state dict, of another version, or an entry is malformed.
    """
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise StateError(
            "A quantized state is what get_quantized_state() returns, a dict whose 'format' is "
            f"{FORMAT!r}; got {describe(state)}."
        )
    version = state.get("version")
    if type(version) is not int or version != VERSION:
        raise StateError(
            f"This diffq reads version {VERSION} of quantized states, "
            f"got {describe(version)}. Install the version that wrote it."
        )
    entries, aliases = (read_typed(state, key, dict, "the state") for key in ("tensors", "aliases"))
    for name, entry in entries.items():
        if not isinstance(name, str) or not isinstance(entry, Mapping):
            raise StateError(
                f"Tensors are stored as name to dict, got {describe(name)} to {describe(entry)}."
            )
    for name, target in aliases.items():
        known = isinstance(target, str) and target in entries
        if not isinstance(name, str) or name in entries or not known:
            raise StateError(
                "An alias must be a new name for a stored tensor, "
                f"got {describe(name)} for {describe(target)}."
            )
    return Header({name: _read_kind(name, entry) for name, entry in entries.items()}, aliases)


def from_state(state: Any) -> Snapshot:
    """Decodes a state dict, which may come from anywhere, to records.

    Raises:
        StateError: an entry is missing, damaged or of an unknown kind or version.
    """
    aliases = read_header(state).aliases
    records = {name: _from_entry(name, entry) for name, entry in state["tensors"].items()}
    return Snapshot(records, aliases)


def _to_entry(record: Record, packed: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape": list(record.shape), "dtype": record.dtype}
    if isinstance(record, RawRecord):
        stored: torch.dtype = getattr(torch, record.stored_dtype)
        return {**entry, "kind": "raw", "data": _typed_view(record.data, stored, record.shape)}
    if isinstance(record, ProductRecord):
        return {**entry, "kind": "product", "packed": packed, **product_entry(record, packed)}
    if not isinstance(record, GridRecord | ScaledRecord):
        raise TypeError
    entry |= {"group_size": record.group_size, "min_bits": record.min_bits, "packed": packed}
    entry |= _pack_levels(record) if packed else _spell_levels(record)
    if isinstance(record, GridRecord):
        kind = "grid with zero point" if record.zero_point else "grid"
        return {**entry, "kind": kind, "ranges": as_tensor(record.ranges)}
    return {**entry, "kind": "scaled", "scale": as_tensor(record.scale)}


def _read_kind(name: str, entry: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    where = _where(name)
    return read_shape(entry, where), read_typed(entry, "dtype", str, where)


def _from_entry(name: str, entry: Mapping[str, Any]) -> Record:
    where = _where(name)
    kind = read_typed(entry, "kind", str, where)
    if kind not in _READERS:
        raise StateError(f"{where} has kind {kind!r}; known kinds are {', '.join(_READERS)}.")
    try:
        return _READERS[kind](entry, where)
    except FormatError as error:
        raise StateError(f"{where} is damaged: {error}") from error


def _where(name: str) -> str:
    return f"the entry of {name!r}"


def _read_raw(entry: Mapping[str, Any], where: str) -> RawRecord:
    shape, dtype = read_shape(entry, where), read_typed(entry, "dtype", str, where)
    data = read_dense(entry, "data", where)
    if tuple(data.shape) != shape:
        raise StateError(f"{where} has shape {list(shape)}, but its data has {list(data.shape)}.")
    record = raw_record(data)
    return RawRecord(shape, dtype, record.stored_dtype, record.data)


def _read_grid(entry: Mapping[str, Any], where: str, zero_point: bool = False) -> GridRecord:
    ranges = read_array(entry, "ranges", torch.float32, where)
    if ranges.ndim != 2 or ranges.shape[1] != 2:
        raise StateError(f"{where} needs 'ranges' of shape [n, 2], got {list(ranges.shape)}.")
    constant = bool((ranges[:, 0] == ranges[:, 1]).all())
    return GridRecord(**_read_levels(entry, where, constant), ranges=ranges, zero_point=zero_point)


def _read_scaled(entry: Mapping[str, Any], where: str) -> ScaledRecord:
    scale = read_array(entry, "scale", torch.float32, where)
    return ScaledRecord(**_read_levels(entry, where, constant=False), scale=scale)


_READERS: dict[str, Callable[[Mapping[str, Any], str], Record]] = {
    "raw": _read_raw,
    "grid": _read_grid,
    "grid with zero point": partial(_read_grid, zero_point=True),
    "scaled": _read_scaled,
    "product": read_product,
}


def _pack_levels(record: LevelRecord) -> dict[str, Any]:
    coded = record.coded.streams() if record.coded else {}
    streams = [bitpack.pack(levels, width) for width, levels in coded.items()]
    width = 0 if record.constant else map_width(record.bits, record.min_bits)
    offsets = record.bits - np.uint8(record.min_bits)
    return {
        "map_width": width,
        "bit_map": as_tensor(bitpack.pack(offsets, width) if width else offsets[:0]),
        # Without a map, all groups share one bitwidth.
        "bits": int(record.bits[0]) if record.bits.size else record.min_bits,
        "levels": as_tensor(np.concatenate([*streams, np.empty(0, np.uint8)])),
    }


def _spell_levels(record: LevelRecord) -> dict[str, Any]:
    return {"bit_map": as_tensor(record.bits), "levels": as_tensor(record.levels.astype(np.int16))}


def _read_levels(entry: Mapping[str, Any], where: str, constant: bool) -> dict[str, Any]:
    """The fields that all kinds of level records share."""
    shape = read_shape(entry, where)
    group_size, min_bits = (
        read_typed(entry, key, int, where) for key in ("group_size", "min_bits")
    )
    numel = int(np.prod(shape, dtype=object))
    if not 1 <= group_size <= max(numel, 1) or not 1 <= min_bits <= MAX_BITS:
        raise StateError(
            f"{where} has group_size {group_size} and min_bits {min_bits}; they must be "
            f"from 1 to {max(numel, 1)} and from 1 to {MAX_BITS}."
        )
    read = _unpack_levels if read_typed(entry, "packed", bool, where) else _unspell_levels
    bits, levels = read(entry, where, group_size, numel, min_bits, constant)
    return {
        "shape": shape,
        "dtype": read_floating(entry, where),
        "group_size": group_size,
        "min_bits": min_bits,
        "bits": bits,
        "levels": levels,
    }


_Levels = tuple[NDArray[np.uint8], NDArray[np.uint16]]


def _unpack_levels(
    entry: Mapping[str, Any], where: str, group_size: int, numel: int, min_bits: int, constant: bool
) -> _Levels:
    width, shared = (read_typed(entry, key, int, where) for key in ("map_width", "bits"))
    bit_map, packed = (read_array(entry, key, torch.uint8, where) for key in ("bit_map", "levels"))
    groups = group_count(numel, group_size)
    if not constant and 8 * packed.size < numel:
        raise StateError(f"{where} has {packed.size} bytes of levels, too few for {numel} weights.")
    if not 0 <= width <= MAX_MAP_WIDTH:
        raise StateError(f"{where} has map_width {width}; it must be from 0 to {MAX_MAP_WIDTH}.")
    if width:
        bits = (bitpack.unpack(bit_map, groups, width) + min_bits).astype(np.uint8)
    else:
        bits = np.full(groups, _bitwidth(shared, where), np.uint8)
    streams, offset = {}, 0
    for bitwidth, count in {} if constant else stream_counts(bits, group_size, numel).items():
        size = bitpack.packed_size(count, bitwidth)
        streams[bitwidth] = bitpack.unpack(packed[offset : offset + size], count, bitwidth)
        offset += size
    if offset != packed.size:
        raise StateError(f"{where} needs {offset} bytes of levels, got {packed.size}.")
    return bits, merge_levels(streams, bits, group_size, numel)


def _unspell_levels(
    entry: Mapping[str, Any], where: str, group_size: int, numel: int, min_bits: int, constant: bool
) -> _Levels:
    bits = read_array(entry, "bit_map", torch.uint8, where)
    levels = read_array(entry, "levels", torch.int16, where).view(np.uint16)
    if bits.size != group_count(numel, group_size) or levels.size != numel:
        raise StateError(
            f"{where} has {bits.size} bitwidths and {levels.size} levels for {numel} weights."
        )
    limits = np.repeat(np.uint32(1) << bits.astype(np.uint32), group_size)[:numel]
    if (levels >= limits).any():
        raise StateError(f"{where} has a level that does not fit its bitwidth.")
    return bits, levels


def _bitwidth(bits: int, where: str) -> int:
    if not 1 <= bits <= MAX_BITS:
        raise StateError(f"{where} has bits {bits}; they must be from 1 to {MAX_BITS}.")
    return bits


def _typed_view(data: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Bytes as a tensor; NumPy's empty arrays have strides that torch cannot view."""
    if not data.size:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.from_numpy(data).view(dtype).view(shape)
