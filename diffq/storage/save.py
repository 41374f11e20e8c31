"""Models to files and back: `save` and `load`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, TypeVar, overload, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffq.attach.plan import named_tensors
from diffq.errors import ConfigError
from diffq.format.container import Codec, encode_parts
from diffq.format.kinds.base import QuantizedEntry
from diffq.format.reader import default_budget
from diffq.storage.open import Readable, StoredModel, read_whole
from diffq.storage.restore import match, unique_targets
from diffq.storage.state import Header, Snapshot, from_state
from diffq.storage.writing import Target, check_target, write_file
from diffq.torch_inside.modules import is_lazy

Model = TypeVar("Model", bound=nn.Module)
DeviceLike = torch.device | str | int | None


@runtime_checkable
class Storable(Protocol):
    """What can be written to a file: a quantizer."""

    def snapshot(self) -> Snapshot:
        """The whole model as frozen records."""


def save(
    source: Storable | Mapping[str, Any],
    path: Target,
    codec: Codec = "rans",
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes a quantized model to one file, atomically.

    The file holds no code and no class names; docs/format.md specifies every byte.
    Pipes and character devices get the bytes as a stream.

    Args:
        source: a quantizer, or what its `get_quantized_state` returned.
        path: where to; an old file stays intact until the new one is whole. A binary file
            that is open for writing gets the bytes where it stands, and need not seek.
        codec: "rans" makes the smallest file: it codes levels in zstd or in rANS. "zstd" takes
            less time to save and load, and earlier versions of diffq read the file. "packed" only
            packs levels.
        metadata: a JSON object to store along, such as the model's configuration.

    Returns:
        Bytes of the file.

    Raises:
        WeightError: a weight to quantize or a bitwidth is not finite.
        StateError: a state is damaged.
        FormatError: the metadata is no JSON object, or a name is not storable.
        ConfigError: neither a path nor a binary file was given.
        OSError: the file cannot be written; a folder, socket or block device is refused
            before the model is encoded.
    """
    check_target(path)
    snapshot = _snapshot(source)
    parts = encode_parts(snapshot.records, snapshot.aliases, metadata, codec)
    return write_file(path, parts)


@overload
def load(
    path: Readable,
    model: None = None,
    *,
    device: DeviceLike = None,
    strict: Literal[True] = True,
    budget: int | None = None,
) -> dict[str, Tensor]: ...


@overload
def load(
    path: Readable,
    model: Model,
    *,
    device: DeviceLike = None,
    strict: bool = True,
    budget: int | None = None,
) -> Model: ...


def load(
    path: Readable,
    model: nn.Module | None = None,
    *,
    device: DeviceLike = None,
    strict: bool = True,
    budget: int | None = None,
) -> nn.Module | dict[str, Tensor]:
    """Reads a file, into a plain model or as a dict of tensors.

    With a model, the file is read into memory, and everything is checked and decoded once
    before anything is changed.

    Args:
        path: a file that `save` wrote, or a binary file open for reading; it may come from
            anywhere.
        model: a plain model of the same architecture; its tensors keep their place.
        device: where the tensors of the dict go, by default the CPU. A model has its own.
        strict: with False, only the names that file and model share are loaded, and a
            warning lists the others. Shared names must still agree in shape and dtype.
        budget: bytes that the tensors may decode to; see `diffq.open`. With a model,
            its own size is allowed in any case.

    Returns:
        The model; or, without one, a state dict for `load_state_dict`, in which tied
        names share one tensor.

    Raises:
        FormatError: the file is damaged, hostile, or of another version.
        MismatchError: names, shapes or dtypes of file and model differ.
        ConfigError: `device` is none of this machine or not that of the model, or `strict`
            is False without one.
        OSError: the file cannot be read.
    """
    place = None if device is None else _resolve(device)
    if model is None:
        if not strict:
            raise ConfigError("strict=False compares names with a model, got none. Pass a model.")
        with StoredModel(path, budget) as stored:
            return _state_dict(stored, place)
    if place is not None:
        _check_place(model, place)
    data = read_whole(path)
    given = default_budget(len(data)) if budget is None else budget
    with StoredModel(io.BytesIO(data), max(given, _decoded_size(model))) as stored:
        return _fill(model, stored, strict)


def _resolve(device: torch.device | str | int) -> torch.device:
    """The device with its number, once a tensor could be made there."""
    rule = f"device must be one of this machine, such as 'cpu' or 'cuda:0', got {device!r}"
    remedy = "Omit device for the CPU, or for where the model is."
    # Tensor.to takes a dtype, a number or another tensor too, and casts.
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise ConfigError(f"{rule}. {remedy}")
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # Each backend raises its own.
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ConfigError(f"{rule}: {reason}. {remedy}") from error


def _check_place(model: nn.Module, wanted: torch.device) -> None:
    for site, tensor in named_tensors(model):
        if tensor.device != wanted:
            raise ConfigError(
                f"A model's tensors keep their place, but {site.name!r} is on {tensor.device} "
                f"and device is {wanted}. Call model.to({str(wanted)!r}), or omit device."
            )


def _decoded_size(model: nn.Module) -> int:
    """The most bytes that an honest file of a model can need in memory."""
    # At worst each weight is its own group: a value, a range and a bitwidth.
    tensors = (tensor for _, tensor in named_tensors(model) if not is_lazy(tensor))
    return sum(max(4 + 8 + 1, tensor.element_size()) * tensor.numel() for tensor in tensors)


def _snapshot(source: Storable | Mapping[str, Any]) -> Snapshot:
    if isinstance(source, Storable):
        return source.snapshot()
    if isinstance(source, Mapping):
        return from_state(source)
    raise ConfigError(
        f"save needs a quantizer or a state of get_quantized_state(), got {type(source).__name__}. "
        "Write what quantize_checkpoint() returned with its own save(path)."
    )


def _state_dict(stored: StoredModel, device: torch.device | None) -> dict[str, Tensor]:
    decoded = _decode(stored, stored.entries)
    tensors = {name: tensor.to(device=device) for name, tensor in decoded.items()}
    return {name: tensors[stored.aliases.get(name, name)] for name in stored}


def _fill(model: nn.Module, stored: StoredModel, strict: bool) -> nn.Module:
    header = Header(
        {name: (entry.shape, entry.dtype) for name, entry in stored.entries.items()},
        stored.aliases,
    )
    targets = match(model, header, strict)
    stored.reader.verify(keep=True)
    unique = unique_targets(targets, header, lambda name: stored[name])
    # Large tensors are decoded where they belong, without a copy in between.
    direct = {name: target for name, target in unique if _decodes_into(stored, name, target)}
    out = {name: target.detach().numpy() for name, target in direct.items()}
    decoded = _decode(stored, dict(unique), out)
    with torch.no_grad():
        for name, target in unique:
            if direct.get(name) is not target:
                target.copy_(decoded[name])
    return model


def _decodes_into(stored: StoredModel, name: str, target: Tensor) -> bool:
    quantized = isinstance(stored.entries[name], QuantizedEntry)
    plain = target.device.type == "cpu" and target.dtype == torch.float32
    return quantized and plain and target.is_contiguous()


def _decode(
    stored: StoredModel, names: Iterable[str], out: Mapping[str, NDArray[np.float32]] | None = None
) -> dict[str, Tensor]:
    """Tensors of a file; those in `out` are written there."""
    chosen = list(names)
    quantized = [name for name in chosen if isinstance(stored.entries[name], QuantizedEntry)]
    values = stored.reader.values_of(quantized, out)
    dtypes = {name: getattr(torch, stored.entries[name].dtype) for name in quantized}
    tensors = {name: torch.from_numpy(values[name]).to(dtypes[name]) for name in quantized}
    return {name: tensors[name] if name in tensors else stored[name] for name in chosen}
