"""Entries of a legacy state: levels, bits and ranges of one tensor, checked and decoded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq.checks import MAX_BITS
from diffq.errors import FormatError, MismatchError, StateError
from diffq.format.records import GridRecord, ScaledRecord, check_ranges, check_scale
from diffq.storage.legacy.layout import KINDS, LegacyState, describe
from diffq.storage.legacy.planes import unpack_shorts, unpack_words
from diffq.storage.legacy.unpickle import StandInArray


@dataclass(frozen=True, eq=False)
class GridEntry:
    """Levels on the grid from `low` to `high`.

    Attributes:
        levels: uint16 [weights].
        bits: uint8 [groups].
        group_size: weights per group.
        min_bits: the lowest bitwidth that could be learned.
        low: the tensor's minimum.
        high: the tensor's maximum.
    """

    levels: NDArray[np.uint16]
    bits: NDArray[np.uint8]
    group_size: int
    min_bits: int
    low: float
    high: float

    def values(self) -> NDArray[np.float32]:
        """In float32, in this very order: level * (1 / (2**bits - 1)) * (high - low) + low."""
        top = ((1 << self.bits.astype(np.uint32)) - 1).astype(np.float32)
        values = self.levels.astype(np.float32).reshape(-1, self.group_size)
        values *= (np.float32(1) / top)[:, None]
        values *= np.float32(self.high - self.low)
        values += np.float32(self.low)
        return values.reshape(-1)

    def record(self, shape: tuple[int, ...], dtype: str) -> GridRecord:
        """The same levels, bits and range as a record of ours."""
        ranges = np.array([[self.low, self.high]], np.float32)
        least = min(self.min_bits, int(self.bits.min()))
        return GridRecord(shape, dtype, self.group_size, least, self.bits, self.levels, ranges)


@dataclass(frozen=True, eq=False)
class ScaledEntry:
    """Indices around zero times a scale.

    Attributes:
        index: int16 [weights], from -2**(bits - 1) to 2**(bits - 1) - 1.
        bits: the bitwidth.
        scale: the learned step; it may be negative.
    """

    index: NDArray[np.int16]
    bits: int
    scale: np.float32

    def values(self) -> NDArray[np.float32]:
        """In float32: index * scale."""
        return self.index.astype(np.float32) * self.scale

    def record(self, shape: tuple[int, ...], dtype: str) -> ScaledRecord:
        """The same levels and scale as a record of ours."""
        levels = (self.index + np.int16(1 << self.bits - 1)).view(np.uint16)
        bits, scale = np.full(1, self.bits, np.uint8), np.full(1, self.scale)
        return ScaledRecord(shape, dtype, levels.size, self.bits, bits, levels, scale)


LevelEntry = GridEntry | ScaledEntry


def read_entry(state: LegacyState, entry: Any, shape: tuple[int, ...], where: str) -> LevelEntry:
    """Decodes the levels of one quantized parameter and checks them.

    Args:
        state: the state that it is from.
        entry: the parameter's tuple.
        shape: the parameter's shape.
        where: what to call it in errors.

    Raises:
        StateError: the entry is damaged.
        MismatchError: it belongs to a parameter of another size.
    """
    kind = _kind_of(entry)
    expected = kind if state.kind is None else KINDS[state.kind]
    if kind is None or kind != expected:
        raise StateError(
            f"{where} must be a tuple of levels and ranges as {expected or 'DiffQ'} stores them, "
            f"got {describe(entry)}."
        )
    try:
        return _READERS[kind](state, entry, shape, where)
    except FormatError as error:
        raise StateError(f"{where} is damaged: {error}") from error


def _kind_of(entry: Any) -> str | None:
    if not isinstance(entry, list | tuple) or len(entry) not in (2, 3):
        return None
    if len(entry) == 3:
        return "DiffQ"
    return "uniform" if isinstance(entry[1], list | tuple) else "LSQ"


def _read_diffq(state: LegacyState, entry: Any, shape: tuple[int, ...], where: str) -> GridEntry:
    stored, limits, stored_bits = entry
    low, high = _range(limits, where)
    if state.packed:
        group_size = state.settings.group_size or math.prod(shape)
        bits = _unpack_bits(state, stored_bits, math.prod(shape), group_size, where)
        levels = _merge(state, stored, bits, group_size, where)
    else:
        levels, bits = _levels(stored, where), _integers(stored_bits, where, torch.uint8).ravel()
        group_size = levels.shape[1] if levels.ndim == 2 else 0
        _match_size(levels.size, shape, where)
        if levels.shape != (bits.size, group_size):
            raise StateError(
                f"{where} needs levels of shape [groups, group_size] and a bitwidth for each "
                f"group, got {list(levels.shape)} and {bits.size} bitwidths."
            )
    if not 1 <= bits.min() <= bits.max() <= MAX_BITS:
        raise StateError(f"{where} has bitwidths beyond 1 to {MAX_BITS}.")
    levels = levels.reshape(-1)
    _check_levels(levels, np.repeat(bits, group_size), where)
    return GridEntry(levels, bits, group_size, state.settings.min_bits, low, high)


def _read_uniform(state: LegacyState, entry: Any, shape: tuple[int, ...], where: str) -> GridEntry:
    bits = state.settings.whole_bits(where)
    low, high = _range(entry[1], where)
    if state.packed:
        words = _words(state, entry[0], where)
        levels = _unpack(state, words, math.prod(shape), bits, where)
    else:
        levels = _levels(entry[0], where)
        _match_shape(levels.shape, shape, where)
        levels = levels.reshape(-1)
    widths = np.full(1, bits, np.uint8)
    _check_levels(levels, widths, where)
    return GridEntry(levels, widths, levels.size, bits, low, high)


def _read_lsq(state: LegacyState, entry: Any, shape: tuple[int, ...], where: str) -> ScaledEntry:
    bits = state.settings.whole_bits(where)
    lowest = -(1 << bits - 1)
    scale = np.float32(_number(entry[1], where))
    check_scale(scale.reshape(1), bits)
    if state.packed:
        words = _words(state, entry[0], where)
        levels = _unpack(state, words, math.prod(shape), bits, where)
        index = (levels.astype(np.int32) + lowest).astype(np.int16)
    else:
        index = _integers(entry[0], where, torch.int16)
        _match_shape(index.shape, shape, where)
        index = index.reshape(-1)
    if not lowest <= index.min() <= index.max() < -lowest:
        raise StateError(f"{where} has an index that does not fit {bits} bits.")
    return ScaledEntry(index, bits, scale)


_READERS: dict[str, Callable[[LegacyState, Any, tuple[int, ...], str], LevelEntry]] = {
    "DiffQ": _read_diffq,
    "uniform": _read_uniform,
    "LSQ": _read_lsq,
}


def _unpack_bits(
    state: LegacyState, stored: Any, numel: int, group_size: int, where: str
) -> NDArray[np.uint8]:
    if numel % group_size:
        raise MismatchError(
            f"{where} has {numel} weights, which do not divide into groups of {group_size}. "
            "Make the model as it was when it was stored."
        )
    offsets = _unpack_planes(state, _words(state, stored, where), numel // group_size, where)
    bits = offsets + np.uint16(state.settings.min_bits)
    checked: NDArray[np.uint8] = np.minimum(bits, 255).astype(np.uint8)
    return checked


def _merge(
    state: LegacyState, slots: Any, bits: NDArray[np.uint8], group_size: int, where: str
) -> NDArray[np.uint16]:
    """Levels [groups, group_size] from one stream for each bitwidth."""
    if not isinstance(slots, list | tuple):
        raise StateError(f"{where} needs a list of packed levels, got {describe(slots)}.")
    streams = [_words(state, slot, where) for slot in slots if slot is not None]
    axis = 0 if state.torch_pack else 1
    by_bits = {words.shape[axis]: words for words in streams if words.size}
    if len(by_bits) != sum(words.size > 0 for words in streams):
        raise StateError(f"{where} has two streams of levels of one bitwidth.")
    levels = np.zeros((bits.size, group_size), np.uint16)
    for width in np.unique(bits).tolist():
        if width not in by_bits:
            raise StateError(_lost(where, width, int((bits == width).sum())))
        count = int((bits == width).sum()) * group_size
        levels[bits == width] = _unpack(state, by_bits.pop(width), count, width, where).reshape(
            -1, group_size
        )
    if by_bits:
        raise StateError(f"{where} has levels of {min(by_bits)} bits, but no group of that width.")
    return levels


def _lost(where: str, width: int, groups: int) -> str:
    if width == MAX_BITS:
        return (
            f"{where} has {groups} groups of 15 bits, whose levels the earlier package leaves out "
            "of packed states: it gives back random numbers for them. Nothing was changed. Save "
            "the state again from the trained model, with get_quantized_state(packed=False)."
        )
    return f"{where} has {groups} groups of {width} bits, but no levels for them."


def _unpack(
    state: LegacyState, words: NDArray[Any], count: int, bits: int, where: str
) -> NDArray[np.uint16]:
    planes = words.shape[0 if state.torch_pack else 1]
    if planes != bits:
        raise StateError(f"{where} has {planes} planes of levels for {bits} bits.")
    return _unpack_planes(state, words, count, where)


def _unpack_planes(
    state: LegacyState, words: NDArray[Any], count: int, where: str
) -> NDArray[np.uint16]:
    try:
        return (unpack_shorts if state.torch_pack else unpack_words)(words, count)
    except FormatError as error:
        raise MismatchError(
            f"{where} is of another size in the model, or damaged: {error} "
            "Make the model as it was when it was stored."
        ) from error


def _words(state: LegacyState, stored: Any, where: str) -> NDArray[Any]:
    """Packed words [lines, planes, 32] or [planes, width]."""
    if isinstance(stored, StandInArray):
        stored = stored.words()
    if isinstance(stored, np.ndarray) and stored.dtype == np.uint64 and not state.torch_pack:
        words: NDArray[Any] = stored
    else:
        words = _integers(stored, where, torch.int16 if state.torch_pack else torch.int64)
    if words.ndim != (2 if state.torch_pack else 3):
        raise StateError(f"{where} has packed words of shape {list(words.shape)}.")
    return words


def _levels(stored: Any, where: str) -> NDArray[np.uint16]:
    levels = _integers(stored, where, torch.uint8, torch.int16)
    if levels.size and levels.min() < 0:
        raise StateError(f"{where} has a negative level.")
    return levels.astype(np.uint16)


def _integers(stored: Any, where: str, *dtypes: torch.dtype) -> NDArray[Any]:
    sound = isinstance(stored, Tensor) and stored.dtype in dtypes
    if not sound or not is_dense(stored):
        raise StateError(
            f"{where} needs a contiguous tensor of {' or '.join(map(str, dtypes))}, "
            f"got {describe(stored)}."
        )
    array: NDArray[Any] = stored.detach().cpu().numpy()
    return array


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has its data, once for each element."""
    return tensor.layout == torch.strided and not tensor.is_meta and tensor.is_contiguous()


def _range(limits: Any, where: str) -> tuple[float, float]:
    if not isinstance(limits, list | tuple) or len(limits) != 2:
        raise StateError(f"{where} needs a minimum and a maximum, got {describe(limits)}.")
    low, high = (_number(limit, where) for limit in limits)
    check_ranges(np.array([[low, high]], np.float64).astype(np.float32))
    return low, high


def _number(value: Any, where: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        value = value.item()
    if not isinstance(value, float) or not abs(value) <= float(np.finfo(np.float32).max):
        raise StateError(f"{where} needs a finite float32 number, got {describe(value)}.")
    return value


def _check_levels(levels: NDArray[np.uint16], bits: NDArray[np.uint8], where: str) -> None:
    if (levels >> bits).any():
        raise StateError(f"{where} has a level that does not fit its bitwidth.")


def _match_size(numel: int, shape: tuple[int, ...], where: str) -> None:
    if numel != math.prod(shape):
        raise MismatchError(
            f"{where} has {math.prod(shape)} weights in the model, but {numel} in the state. "
            "Make the model as it was when it was stored."
        )


def _match_shape(stored: tuple[int, ...], shape: tuple[int, ...], where: str) -> None:
    if stored != shape:
        raise MismatchError(
            f"{where} has shape {list(shape)} in the model, but {list(stored)} in the state. "
            "Make the model as it was when it was stored."
        )
