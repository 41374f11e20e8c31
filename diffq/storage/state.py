"""Frozen records to the state dict of `get_quantized_state`, and back.

The state holds tensors and plain containers only, so that
`torch.load(weights_only=True)` reads it:

    {"format": "diffq.state", "version": 1,
     "tensors": {name: {"kind": ..., "shape": [...], "dtype": ..., ...}},
     "aliases": {name: name of the tensor that it is tied to}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffq.attach.plan import dtype_name
from diffq.errors import FormatError, StateError
from diffq.format.dtypes import TypedBytes
from diffq.format.records import KINDS, RawRecord, Record
from diffq.storage.state_entry import StateEntry, describe, read_typed, typed_bytes, typed_tensor

FORMAT = "diffq.state"
VERSION = 1

# Kinds of tensors, as they are named in states.
_KINDS = {name: kind.record_type for kind in KINDS for name in kind.record_type.state_kinds}


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
    kept = typed_bytes(tensor.detach().to("cpu", stored or tensor.dtype))
    return RawRecord(kept.shape, dtype_name(tensor.dtype), kept.dtype, kept.data)


def record_tensor(record: Record) -> Tensor:
    """The tensor that a record decodes to, on the CPU."""
    dtype: torch.dtype = getattr(torch, record.dtype)
    return typed_tensor(record.decoded()).to(dtype)


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
    entries, aliases = _read_entries(state)
    return Header({name: (entry.shape, entry.dtype) for name, entry in entries.items()}, aliases)


def from_state(state: Any) -> Snapshot:
    """Decodes a state dict, which may come from anywhere, to records.

    Raises:
        StateError: an entry is missing, damaged or of an unknown kind or version.
    """
    entries, aliases = _read_entries(state)
    return Snapshot({name: _read_record(entry) for name, entry in entries.items()}, aliases)


def _read_entries(state: Any) -> tuple[dict[str, StateEntry], Mapping[str, str]]:
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
    return {name: StateEntry(name, entry) for name, entry in entries.items()}, aliases


def _read_record(entry: StateEntry) -> Record:
    if entry.kind not in _KINDS:
        raise StateError(
            f"{entry.where} has kind {entry.kind!r}; known kinds are {', '.join(_KINDS)}."
        )
    try:
        return _KINDS[entry.kind].from_fields(entry)
    except FormatError as error:
        raise StateError(f"{entry.where} is damaged: {error}") from error


def _to_entry(record: Record, packed: bool) -> dict[str, Any]:
    head = {"shape": list(record.shape), "dtype": record.dtype}
    return head | {key: _to_stored(value) for key, value in record.fields(packed).items()}


def _to_stored(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    return typed_tensor(value) if isinstance(value, TypedBytes) else value
