"""Launches of kernels, and the addresses that they read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from diffq.kernels.weights import is_aligned

TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Launch:
    """A kernel with its constants.

    Triton looks at the kind and the alignment of every argument at each launch, in Python, which
    takes longer than small kernels run. The arguments of one launch are always alike, so the
    first launch is Triton's, and later ones go to what it compiled.

    Args:
        kernel: of Triton.
        constants: its last parameters.
        num_warps: warps of 32 threads in a program.
    """

    #: Whether what is compiled is launched directly; see `diffq.kernels.probe`.
    direct = False

    def __init__(self, kernel: Any, constants: Sequence[Any], num_warps: int = 4) -> None:
        self._kernel, self._constants, self._num_warps = kernel, tuple(constants), num_warps
        self._compiled: Any = None

    def __call__(self, programs: int, *arguments: Tensor | float) -> None:
        """Runs so many programs on the current stream of the current device."""
        if self._compiled is not None and self.direct:
            self._compiled[(programs, 1, 1)](*arguments, *self._constants)
        else:
            self._compiled = self._kernel[(programs,)](
                *arguments, *self._constants, num_warps=self._num_warps
            )


class Launches:
    """The launches of a batch. Those whose arguments differ in alignment are apart."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Launch] = {}

    def get(self, kernel: Any, constants: tuple[Any, ...], num_warps: int = 4) -> Launch:
        """The launch of a kernel with some constants.

        Args:
            kernel: of Triton.
            constants: its last parameters.
            num_warps: as `Launch`.
        """
        key = id(kernel), constants
        if key not in self._known:
            self._known[key] = Launch(kernel, constants, num_warps)
        return self._known[key]


class Addresses:
    """The table of addresses on the device, uploaded again when one of them changes.

    Attributes:
        table: see `diffq.kernels.device.columns`.
        aligned: whether all weights can be read 16 bytes at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[tuple[int, bool]] = []
        self.table = torch.empty(0, 2, dtype=torch.int64, device=device)
        self.aligned = False

    def update(self, weights: Sequence[Tensor], zeros: Sequence[bool]) -> None:
        """Takes the weights, and whether the zeros of each stay zero."""
        rows = [(w.data_ptr(), zero) for w, zero in zip(weights, zeros, strict=True)]
        if rows == self._rows:
            return
        self._rows = rows
        self.aligned = all(is_aligned(weight) for weight in weights)
        # From pinned memory, so that the host does not wait for the device.
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        pinned = table.pin_memory() if self._device.type == "cuda" else table
        self.table = pinned.to(self._device, non_blocking=True)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the current one, which Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
