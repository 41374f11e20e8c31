"""Models as they come: safetensors, torch checkpoints, and files of diffq."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffq.cli.common import coded_bits, is_out_of_memory, mean_bits
from diffq.cli.kinds import earlier, is_earlier, kind_of
from diffq.cli.layouts import Checkpoint, find_state, plain_names
from diffq.errors import ConfigError, FormatError, missing

if TYPE_CHECKING:
    from torch import Tensor


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
def open_model(
    path: str, key: str | None, budget: int | None, tell: Callable[[str], None]
) -> Iterator[OpenModel]:
    """Opens a model.

    Args:
        path: a file of diffq, safetensors or torch.
        key: see `read_state`.
        budget: see `diffq.open`.
        tell: called with each note on how the state dict was found.

    Raises:
        ConfigError, FormatError, OSError: as `read_state`.
    """
    from diffq.ptq.state import find_ties
    from diffq.storage.open import StoredModel

    if kind_of(path) == "diffq":
        with StoredModel(path, budget) as stored:
            names = {name: stored.aliases.get(name, name) for name in stored}
            yield OpenModel(stored.size, names, stored, stored)
        return
    checkpoint = read_state(path, key)
    for text in checkpoint.notes:
        tell(f"{path}: {text}")
    tensors, aliases = find_ties(checkpoint.state)
    names = {**{name: name for name in tensors}, **aliases}
    yield OpenModel(os.path.getsize(path), names, tensors)


def read_state(path: str, key: str | None = None) -> Checkpoint:
    """The state dict of a checkpoint, on the CPU; no code in the file is run.

    Args:
        path: safetensors, a torch checkpoint, or a file of diffq.
        key: where the state dict is in a torch checkpoint; see `find_state`.

    Raises:
        ConfigError: no state dict is where it was said to be.
        FormatError: the file is damaged, of another kind, or is not read without running
            its code.
        OSError: the file cannot be read.
    """
    kind = kind_of(path)
    if kind == "torch":
        return find_state(path, _load_torch(path), key)
    if key is not None:
        raise ConfigError(f"Only torch checkpoints have keys, {path} is of {kind}: omit --key.")
    if kind == "diffq":
        return Checkpoint(_load_diffq(path))
    return Checkpoint(*plain_names(path, _load_safetensors(path)))


def _load_diffq(path: str) -> dict[str, Any]:
    from diffq.storage.save import load

    return load(path)


def _load_safetensors(path: str) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise missing("safetensors", f"Reading {path}", "cli") from error
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise FormatError(f"{path} is no sound safetensors file: {error}.") from error


def _load_torch(path: str) -> Any:
    import torch

    if is_earlier(path):
        raise earlier(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # A damaged pickle can make the unpickler raise nearly anything.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise FormatError(
            f"{path} is no checkpoint that torch.load reads with weights_only=True "
            f"({_reason(path, error)}). Load it where you trust it, and save model.state_dict()."
        ) from error


def _reason(path: str, error: Exception) -> str:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        unsafe = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # As above; and only archives of zip can be searched.
        unsafe = []
    if not unsafe:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    whole = any(name.startswith("torch.nn.modules.") for name in unsafe)
    listed = ", ".join(unsafe[:3]) + ", ..." * (len(unsafe) > 3)
    return f"{'a whole pickled model; ' * whole}it would run code of {listed}"
