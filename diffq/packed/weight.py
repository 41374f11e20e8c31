"""A weight that is kept packed: what each kind of it has."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class PackedWeight(nn.Module):
    """A weight as integers in few bytes, in buffers that no state dict lists.

    Modules that tie a weight share one. Its tensors move like those of all modules. A cast
    changes the dtype that the weight is decoded to.

    Args:
        shape: of the weight.
        dtype: of the weight.

    Attributes:
        shape: of the weight.
    """

    like: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self._saved: ReferenceType[Tensor] | None = None
        # Without elements: a cast or move of the module changes its dtype and device.
        self.keep("like", torch.empty(0, dtype=dtype))

    def keep(self, name: str, tensor: Tensor) -> None:
        """Registers a buffer."""
        self.register_buffer(name, tensor, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all that is kept."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @abstractmethod
    def values(self) -> Tensor:
        """The float32 weights, in order and perhaps with padding at the end."""

    @property
    @abstractmethod
    def has_rows(self) -> bool:
        """Whether `row_values` can decode rows alone."""

    @abstractmethod
    def row_values(self, rows: Tensor) -> Tensor:
        """The float32 weights of rows, int64 [rows]; [rows, columns] once they are reshaped."""

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The weight, bit for bit that of the file: a new tensor, which needs no gradient."""
        numel = torch.Size(self.shape).numel()
        return self.values().reshape(-1)[:numel].view(self.shape).to(self.like.dtype)

    @torch.no_grad()
    def decode_rows(self, rows: Tensor) -> Tensor:
        """The same of some rows, int64 [rows]: [rows, ...]."""
        values = self.row_values(rows)
        return values.reshape(len(rows), *self.shape[1:]).to(self.like.dtype)

    def saved(self, entries: Iterable[Any]) -> Tensor:
        """The weight for a state dict: one tensor for tied names, given the entries so far."""
        known = None if self._saved is None else self._saved()
        if known is None or all(entry is not known for entry in entries):
            known = self.decode()
            self._saved = weakref.ref(known)
        return known

    def __getstate__(self) -> dict[str, Any]:
        # References to what was saved cannot be pickled.
        return {**self.__dict__, "_saved": None}

    def extra_repr(self) -> str:
        """Shape and size, for `print(model)`."""
        numel = torch.Size(self.shape).numel()
        return f"{list(self.shape)}, {8 * self.nbytes / numel:.2f} bits a weight in memory"


def kept_floats(values: NDArray[np.float32]) -> Tensor:
    """Floats as int32 of the same bits, so that a cast of a model leaves them exact."""
    return torch.from_numpy(np.array(values, np.float32)).view(torch.int32)


def floats(kept: Tensor) -> Tensor:
    """Inverse of `kept_floats`."""
    return kept.view(torch.float32)
