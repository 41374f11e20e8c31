"""Bounded reading of the entries of a state dict, which may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq.errors import StateError
from diffq.format.dtypes import FLOAT_DTYPES


def read_typed(entry: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of a key, which must be there and of this very kind.

    Raises:
        StateError: it is not.
    """
    value = entry.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise StateError(f"{where} needs {key!r} of type {kind.__name__}, got {describe(value)}.")
    return value


def read_shape(entry: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The shape of a tensor.

    Raises:
        StateError: a size is no whole number, negative or absurd.
    """
    shape = read_typed(entry, "shape", list, where)
    if not all(type(size) is int and 0 <= size < 2**62 for size in shape):
        raise StateError(f"{where} has shape {shape!r}; sizes must be whole numbers from 0.")
    return tuple(shape)


def read_floating(entry: Mapping[str, Any], where: str) -> str:
    """The dtype of a quantized tensor.

    Raises:
        StateError: it is not floating point.
    """
    name: str = read_typed(entry, "dtype", str, where)
    if name not in FLOAT_DTYPES:
        raise StateError(f"{where} has dtype {name!r}; quantized tensors are floating point.")
    return name


def read_array(entry: Mapping[str, Any], key: str, dtype: torch.dtype, where: str) -> NDArray[Any]:
    """A dense tensor of one dtype as a NumPy array.

    Raises:
        StateError: it is another.
    """
    tensor = read_dense(entry, key, where)
    if tensor.dtype != dtype:
        raise StateError(f"{where} needs {key!r} as a {dtype} tensor, got {describe(tensor)}.")
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def read_dense(entry: Mapping[str, Any], key: str, where: str) -> Tensor:
    """A dense tensor: an expanded one of few bytes must not be written out at its full size.

    Raises:
        StateError: it is no tensor, or one without memory of its own for each element.
    """
    tensor: Tensor = read_typed(entry, key, Tensor, where)
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_contiguous():
        raise StateError(f"{where} needs {key!r} as a contiguous tensor, got {describe(tensor)}.")
    return tensor


def as_tensor(array: NDArray[Any]) -> Tensor:
    """An array as a tensor, to be stored."""
    return torch.from_numpy(np.ascontiguousarray(array))


def describe(value: Any) -> str:
    """What was got, for an error, in a few words."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r:.60}"
