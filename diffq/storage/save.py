"""Models to files and back: `save` and `load`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeVar, overload, runtime_checkable

import torch
from torch import Tensor, nn

from diffq.attach.plan import named_tensors
from diffq.errors import ConfigError
from diffq.format.container import Codec, encode_parts
from diffq.format.reader import default_budget
from diffq.storage.filling import decode, fill
from diffq.storage.open import Readable, StoredModel, read_whole
from diffq.storage.packing import fill_packed
from diffq.storage.state import Snapshot, from_state
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
    packed: bool = False,
) -> Model: ...


def load(
    path: Readable,
    model: nn.Module | None = None,
    *,
    device: DeviceLike = None,
    strict: bool = True,
    budget: int | None = None,
    packed: bool = False,
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
        packed: keep the weights of linear, embedding and convolution layers as packed levels in
            memory, and decode them in each forward: less memory, more time, no training of these
            weights. Tensors of the model may be on the meta device, and then go to `device`. See
            docs/smaller.md.

    Returns:
        The model; or, without one, a state dict for `load_state_dict`, in which tied
        names share one tensor.

    Raises:
        FormatError: the file is damaged, hostile, or of another version.
        MismatchError: names, shapes or dtypes of file and model differ.
        ConfigError: `device` is none of this machine or not that of the model, or `strict`
            is False or `packed` True without one.
        OSError: the file cannot be read.
    """
    place = None if device is None else _resolve(device)
    if model is None:
        if not strict:
            raise ConfigError("strict=False compares names with a model, got none. Pass a model.")
        if packed:
            raise ConfigError("packed=True packs the layers of a model, got none. Pass a model.")
        with StoredModel(path, budget) as stored:
            return _state_dict(stored, place)
    if place is not None:
        _check_place(model, place, packed)
    data = read_whole(path)
    given = default_budget(len(data)) if budget is None else budget
    with StoredModel(io.BytesIO(data), max(given, _decoded_size(model))) as stored:
        if packed:
            return fill_packed(model, stored, strict, place)
        return fill(model, stored, strict)


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


def _check_place(model: nn.Module, wanted: torch.device, packed: bool) -> None:
    for site, tensor in named_tensors(model):
        if tensor.device != wanted and not (packed and tensor.is_meta):
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
    decoded = decode(stored, stored.entries)
    tensors = {name: tensor.to(device=device) for name, tensor in decoded.items()}
    return {name: tensors[stored.aliases.get(name, name)] for name in stored}
