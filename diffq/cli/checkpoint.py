"""Models as they come: safetensors, torch checkpoints, and files of diffq."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffq.cli.common import coded_bits, mean_bits, missing
from diffq.errors import ConfigError, FormatError
from diffq.format.chunks import MAGIC

if TYPE_CHECKING:
    from torch import Tensor

# What torch puts into a state dict for modules that define `get_extra_state`.
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class OpenModel:
    """A model of any kind of file.

    Attributes:
        size: bytes of the file.
        names: every name, to the name under which its tensor is kept.
        tensors: those names to their tensors, which a file of diffq decodes on access.
        stored: the file, if it is one of diffq.
    """

    size: int
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    stored: Any = None

    def mean_bits(self, name: str) -> float | None:
        """Bits per weight of a tensor that is stored as levels."""
        return (
            None
            if self.stored is None
            else mean_bits([coded_bits(self.stored.reader.record(name))])
        )


@contextmanager
def open_model(path: str, key: str | None, budget: int | None) -> Iterator[OpenModel]:
    """Opens a model.

    Args:
        path: a file of diffq, safetensors or torch.
        key: see `read_state`.
        budget: see `diffq.open`.

    Raises:
        ConfigError, FormatError, OSError: as `read_state`.
    """
    from diffq.file import StoredModel
    from diffq.ptq import find_ties

    if kind_of(path) == "diffq":
        with StoredModel(path, budget) as stored:
            names = {name: stored.aliases.get(name, name) for name in stored}
            yield OpenModel(stored.size, names, stored, stored)
        return
    tensors, aliases = find_ties(drop_extra_state(read_state(path, key))[0])
    names = {**{name: name for name in tensors}, **aliases}
    yield OpenModel(os.path.getsize(path), names, tensors)


def kind_of(path: str) -> str:
    """What a file is by its first bytes: "diffq", "safetensors" or "torch"."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(MAGIC):
        return "diffq"
    # safetensors: the length of a JSON object, then the object.
    header = int.from_bytes(start[:8], "little")
    return "safetensors" if start[8:] == b"{" and header < os.path.getsize(path) else "torch"


def read_state(path: str, key: str | None = None) -> dict[str, Any]:
    """The state dict of a checkpoint, on the CPU; no code in the file is run.

    Args:
        path: safetensors, a torch checkpoint, or a file of diffq.
        key: the key of a torch checkpoint under which the state dict is; the checkpoint
            itself by default.

    Raises:
        ConfigError: no state dict is where it was said to be.
        FormatError: the file is damaged, or is not read without running its code.
        OSError: the file cannot be read.
    """
    kind = kind_of(path)
    if kind == "torch":
        return _find_state(path, _load_torch(path), key)
    if key is not None:
        raise ConfigError(f"Only torch checkpoints have keys, {path} is of {kind}: omit --key.")
    return _load_safetensors(path) if kind == "safetensors" else _load_diffq(path)


def drop_extra_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A state dict without the extra state of modules, and the names that it had."""
    from torch import Tensor

    extra = [
        name
        for name, value in state.items()
        if not isinstance(value, Tensor) and name.rpartition(".")[2] == _EXTRA_STATE
    ]
    return {name: value for name, value in state.items() if name not in extra}, extra


def _load_diffq(path: str) -> dict[str, Any]:
    from diffq.storage import load

    return load(path)


def _load_safetensors(path: str) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise missing("safetensors", f"Reading {path}") from error
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise FormatError(f"{path} is no sound safetensors file: {error}.") from error


def _load_torch(path: str) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # A damaged pickle can make the unpickler raise nearly anything.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FormatError(
            f"{path} is no checkpoint that torch.load reads with weights_only=True ({reason}). "
            "Load it where you trust it, and save model.state_dict()."
        ) from error


def _find_state(path: str, loaded: Any, key: str | None) -> dict[str, Any]:
    if not isinstance(loaded, Mapping):
        got = type(loaded).__name__
        raise ConfigError(f"{path} must hold a dict, got {got}. Save model.state_dict().")
    if loaded.get("format") == "diffq.state":
        raise ConfigError(
            f"{path} is a quantized state already. Write it as it is with "
            "diffq.save(torch.load(path), 'model.diffq')."
        )
    if key is not None and key in loaded and _is_state(loaded[key]):
        return dict(loaded[key])
    if key is None and _is_state(loaded):
        return dict(loaded)
    where = "at its top level" if key is None else f"under {key!r}"
    found = [name for name, value in loaded.items() if _is_state(value)]
    remedy = "Save model.state_dict()."
    if found:
        remedy = f"There are some under {', '.join(map(repr, found))}: pass --key {found[0]}."
    raise ConfigError(f"{path} has no state dict (name to tensor) {where}. {remedy}")


def _is_state(value: Any) -> bool:
    from torch import Tensor

    if not isinstance(value, Mapping) or not value:
        return False
    extra = (isinstance(name, str) and name.endswith(_EXTRA_STATE) for name in value)
    tensors = [isinstance(tensor, Tensor) for tensor in value.values()]
    names = all(isinstance(name, str) for name in value)
    return names and any(tensors) and all(t or e for t, e in zip(tensors, extra, strict=True))
