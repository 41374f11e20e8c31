"""Legacy states into plain models, by position, all or nothing; or into records of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffq.attach.attachment import is_attached
from diffq.attach.plan import QUANTIZABLE, dtype_name, named_tensors
from diffq.errors import MismatchError, StateError
from diffq.format.records import Record
from diffq.storage.legacy.entries import LevelEntry, is_dense, read_entry
from diffq.storage.legacy.layout import LegacyState, Settings, describe, read_state
from diffq.storage.legacy.unpickle import PathLike, read_file
from diffq.storage.state import Snapshot, raw_record
from diffq.torch_inside.modules import is_lazy

Source = PathLike | Mapping[str, Any]


@dataclass(frozen=True)
class _Place:
    """A parameter of the model under the name by which the earlier package selects it."""

    name: str
    parameter: nn.Parameter


@dataclass(frozen=True, eq=False)
class _Stored:
    """What a state holds for one parameter."""

    place: _Place
    content: LevelEntry | Tensor
    half: bool = False

    def value(self) -> Tensor:
        """The value that the earlier package restores, on the CPU."""
        if isinstance(self.content, Tensor):
            return self.content
        return torch.from_numpy(self.content.values()).view(self.place.parameter.shape)

    def record(self) -> Record:
        """The same as a record of ours."""
        parameter = self.place.parameter
        shape, dtype = tuple(parameter.shape), parameter.dtype
        if not isinstance(self.content, Tensor):
            return self.content.record(shape, dtype_name(dtype))
        half = self.half and dtype in QUANTIZABLE
        return raw_record(self.content.to(dtype), torch.float16 if half else None)


def load_legacy(
    source: Source,
    model: nn.Module,
    *,
    key: str | None = None,
    settings: Mapping[str, Any] | None = None,
    stand_ins: Iterable[str] = (),
) -> nn.Module:
    """Fills a plain model with a state of the earlier diffq package, versions 0.1 to 0.2.4.

    The model gets the very values that the earlier package would restore. Such states
    have no names: the model must list its parameters as it did when it was stored.
    Buffers are not in them and stay as they are. A file is read without running
    anything that it holds. Everything is checked before anything is changed.

    Args:
        source: a file that `torch.save` wrote, or the state in memory.
        model: a model of the same architecture, without a quantizer.
        key: where the state is inside of what was saved, such as "state" in packages
            of Demucs; a path has dots.
        settings: `min_size`, `exclude`, `group_size`, `bits`, `min_bits` or
            `detect_bound` of the earlier quantizer, for states of version 0.1, which
            do not hold them; the defaults are the earlier ones.
        stand_ins: full names of further classes in the file, to be replaced by empty
            ones; see `docs/legacy.md`.

    Returns:
        The same model.

    Raises:
        StateError: the file or the state is damaged, hostile, or of another kind.
        MismatchError: the state belongs to another model, or was selected otherwise.
        ConfigError: a setting is unknown or breaks a rule.
        OSError: the file cannot be read.
    """
    stored = _read(source, model, key, settings, stand_ins)
    with torch.no_grad():
        for item in stored:
            item.place.parameter.copy_(item.value())
    return model


def legacy_snapshot(
    source: Source,
    model: nn.Module,
    *,
    key: str | None = None,
    settings: Mapping[str, Any] | None = None,
    stand_ins: Iterable[str] = (),
) -> Snapshot:
    """The records of a legacy state: its levels, bits and ranges, with the model's names.

    Buffers, which legacy states lack, are taken from the model. The model stays as it
    is. The values of a record differ from the earlier package's in the last bits; see
    `docs/legacy.md`.

    Args:
        source: as in `load_legacy`.
        model: as in `load_legacy`.
        key: as in `load_legacy`.
        settings: as in `load_legacy`.
        stand_ins: as in `load_legacy`.

    Raises:
        StateError: as in `load_legacy`.
        MismatchError: as in `load_legacy`, or the model has parametrizations.
        ConfigError: as in `load_legacy`.
        OSError: as in `load_legacy`.
    """
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise MismatchError(
                "Legacy states are converted with a plain model, "
                f"but {path or 'the model'!r} has parametrizations. "
                "Use load_legacy, then remove_parametrizations(), and quantize again."
            )
    stored = {
        id(item.place.parameter): item for item in _read(source, model, key, settings, stand_ins)
    }
    records: dict[str, Record] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for site, tensor in named_tensors(model):
        name = names.setdefault(id(tensor), site.name)
        if name != site.name:
            aliases[site.name] = name
        elif id(tensor) in stored:
            records[name] = stored[id(tensor)].record()
        else:
            records[name] = raw_record(tensor)
    return Snapshot(records, aliases)


def _read(
    source: Source,
    model: nn.Module,
    key: str | None,
    settings: Mapping[str, Any] | None,
    stand_ins: Iterable[str],
) -> list[_Stored]:
    """Pairs every parameter with what is stored for it, checked to the last level."""
    saved = source if isinstance(source, Mapping) else read_file(source, stand_ins)
    state = read_state(_inside(saved, key), settings)
    chosen, others = _places(model, state.settings)
    _check_counts(state, chosen, others)
    quantized = [
        _Stored(place, _levels(state, entry, place))
        for place, entry in zip(chosen, state.quantized, strict=True)
    ]
    raw = [
        _Stored(place, _raw(state, tensor, place), state.half)
        for place, tensor in zip(others, state.raw, strict=True)
    ]
    # Where a tied parameter is stored both ways, the levels count.
    return raw + quantized


def _inside(saved: Any, key: str | None) -> Any:
    for part in key.split(".") if key else ():
        if not isinstance(saved, Mapping) or part not in saved:
            raise StateError(f"There is no {part!r} of key {key!r} in {describe(saved)}.")
        saved = saved[part]
    return saved


def _places(model: nn.Module, settings: Settings) -> tuple[list[_Place], list[_Place]]:
    """The model's quantized and other parameters, in the order of the earlier package.

    A tied parameter that is excluded under its first name but not under another is both.
    """
    if is_attached(model):
        raise MismatchError(
            "Legacy states are loaded into a plain model, but this one has a quantizer. "
            "Call quantizer.detach() first."
        )
    chosen: dict[Any, _Place] = {}
    others: dict[Any, _Place] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            _check_place(full, parameter)
            # Without detect_bound, each module has its own copy of a tied parameter.
            key = id(parameter) if settings.detect_bound else full
            if settings.select(full, parameter.numel()):
                chosen.setdefault(key, _Place(full, parameter))
            elif key not in chosen:
                others.setdefault(key, _Place(full, parameter))
    return list(chosen.values()), list(others.values())


def _check_place(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter) or parameter.is_meta:
        raise MismatchError(
            f"{name} has no data yet. Run one forward of a lazy module first; call "
            "model.to_empty(device=...) on a model that is on the meta device."
        )


def _check_counts(state: LegacyState, chosen: Sequence[_Place], others: Sequence[_Place]) -> None:
    for what, stored, places in (
        ("quantized", state.quantized, chosen),
        ("not quantized", state.raw, others),
    ):
        if len(stored) != len(places):
            raise MismatchError(
                f"The state holds {len(stored)} parameters that are {what}, but the model has "
                f"{len(places)} by the rule of {state.settings}. Make the model as it was when it "
                "was stored; if the state does not hold the quantizer's arguments, pass them: "
                "settings={'min_size': ...}."
            )


def _levels(state: LegacyState, entry: Any, place: _Place) -> LevelEntry:
    shape, dtype = tuple(place.parameter.shape), place.parameter.dtype
    if dtype not in QUANTIZABLE:
        raise MismatchError(
            f"{place.name} is quantized in the state, but has {dtype} in the model."
        )
    return read_entry(state, entry, shape, place.name)


def _raw(state: LegacyState, tensor: Any, place: _Place) -> Tensor:
    if not isinstance(tensor, Tensor) or not is_dense(tensor):
        raise StateError(f"{place.name} needs a contiguous tensor, got {describe(tensor)}.")
    if state.half and tensor.dtype != torch.float16:
        raise StateError(f"{place.name} must be stored as float16, got {describe(tensor)}.")
    parameter = place.parameter
    if tensor.shape != parameter.shape or tensor.is_complex() != parameter.is_complex():
        raise MismatchError(
            f"{place.name} has shape {list(parameter.shape)} and {parameter.dtype} in the model, "
            f"but the state has {describe(tensor)}. Make the model as it was when it was stored."
        )
    return tensor.detach()
