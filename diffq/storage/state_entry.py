"""Bounded reading of a tensor of a state dict, which may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq.attach.plan import dtype_name
from diffq.errors import StateError
from diffq.format.dtypes import TypedBytes


class StateEntry:
    """The fields of one tensor; see `diffq.format.kinds.base.Fields`.

    Args:
        name: the tensor's name.
        entry: what the state holds under it.

    Attributes:
        where: what to call it in errors.
        kind: the kind of the tensor in states.
        shape: the tensor's shape.
        dtype: the dtype to restore, by its torch name.

    Raises:
        StateError: kind, shape or dtype are missing, or the shape is none.
    """

    def __init__(self, name: str, entry: Mapping[str, Any]) -> None:
        self.where = f"the entry of {name!r}"
        self._entry = entry
        self.kind: str = self._read("kind", str)
        shape = self._read("shape", list)
        if not all(type(size) is int and 0 <= size < 2**62 for size in shape):
            raise StateError(
                f"{self.where} has shape {shape!r}; sizes must be whole numbers from 0."
            )
        self.shape: tuple[int, ...] = tuple(shape)
        self.dtype: str = self._read("dtype", str)

    def number(self, key: str) -> int:
        """A whole number of any size."""
        number: int = self._read(key, int)
        return number

    def flag(self, key: str) -> bool:
        """True or False."""
        flag: bool = self._read(key, bool)
        return flag

    def array(self, key: str, dims: int, *dtypes: str) -> NDArray[Any]:
        """A dense tensor of so many dimensions and one of these dtypes, as a NumPy array."""
        tensor = self._dense(key)
        if tensor.dim() != dims or dtype_name(tensor.dtype) not in dtypes:
            raise StateError(
                f"{self.where} needs {key!r} as a tensor of dtype {', '.join(dtypes)} and "
                f"{dims} dimensions, got {describe(tensor)}."
            )
        array: NDArray[Any] = tensor.detach().cpu().numpy()
        return array

    def typed(self, key: str) -> TypedBytes:
        """A dense tensor of any shape and dtype; a copy."""
        return typed_bytes(self._dense(key))

    def _dense(self, key: str) -> Tensor:
        """A dense tensor: an expanded one of few bytes must not be written out at its full size."""
        tensor: Tensor = self._read(key, Tensor)
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_contiguous():
            raise StateError(
                f"{self.where} needs {key!r} as a contiguous tensor, got {describe(tensor)}."
            )
        return tensor

    def _read(self, key: str, kind: type) -> Any:
        return read_typed(self._entry, key, kind, self.where)


def read_typed(entry: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of a key, which must be there and of this very kind.

    Raises:
        StateError: it is not.
    """
    value = entry.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise StateError(f"{where} needs {key!r} of type {kind.__name__}, got {describe(value)}.")
    return value


def typed_bytes(tensor: Tensor) -> TypedBytes:
    """The elements of a tensor; a copy, so that they do not follow the tensor."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    data = plain.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    return TypedBytes(tuple(tensor.shape), dtype_name(tensor.dtype), data)


def typed_tensor(typed: TypedBytes) -> Tensor:
    """Inverse of `typed_bytes`, without a copy."""
    dtype: torch.dtype = getattr(torch, typed.dtype)
    # NumPy's empty arrays have strides that torch cannot view.
    if not typed.data.size:
        return torch.empty(typed.shape, dtype=dtype, device="cpu")
    return torch.from_numpy(typed.data).view(dtype).view(typed.shape)


def describe(value: Any) -> str:
    """What was got, for an error, in a few words."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r:.60}"
