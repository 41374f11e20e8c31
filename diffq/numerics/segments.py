"""Consecutive parts of one flat tensor, and what each of them adds up to."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from diffq.torch_inside.graph import is_plain


class Segments:
    """How a flat tensor is cut in parts.

    NumPy reduces parts on a CPU, where a call of torch for each part would take longer than its
    work.

    Args:
        counts: elements of each part; some may be empty.

    Attributes:
        counts: as given.
        starts: the first element of each part.
        total: elements of all parts.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        *starts, self.total = accumulate(self.counts, initial=0)
        self.starts = tuple(starts)
        self._filled = [place for place, count in enumerate(self.counts) if count]
        self._constants = Constants()

    def spread(self, values: Tensor) -> Tensor:
        """Each part's value, repeated for its elements.

        Args:
            values: [parts].

        Returns:
            [total], or [1] where there is one part.
        """
        if len(self.counts) == 1:
            return values
        if not in_numpy(values):
            lengths = self._lengths_on(values.device)
            return torch.repeat_interleave(values, lengths, output_size=self.total)
        result = values.new_empty(self.total)
        array, start = result.numpy(), 0
        for value, count in zip(values.numpy(), self.counts, strict=True):
            array[start : start + count] = value
            start += count
        return result

    def sums(self, flat: Tensor) -> Tensor:
        """The sum of each part of a flat tensor, [parts]."""
        return self._reduced(flat, "sum", np.add, 0)

    def largest(self, flat: Tensor) -> Tensor:
        """The largest element of each part of a flat tensor, [parts]; -inf for empty ones."""
        return self._reduced(flat, "max", np.maximum, -torch.inf)

    def _reduced(self, flat: Tensor, name: str, ufunc: np.ufunc, empty: float) -> Tensor:
        if not in_numpy(flat):
            if is_plain() and len(self.counts) > 1 and not flat.requires_grad:
                # unsafe leaves out a check that would wait for the device.
                lengths = self._lengths_on(flat.device)
                return torch.segment_reduce(flat, name, lengths=lengths, unsafe=True, initial=empty)
            parts = torch.split(flat.view(-1), list(self.counts))
            whole = [getattr(p, name)() if len(p) else p.new_full((), empty) for p in parts]
            return torch.stack(whole)
        result = flat.new_full((len(self.counts),), empty)
        if self._filled:
            starts = [self.starts[place] for place in self._filled]
            result.numpy()[self._filled] = ufunc.reduceat(flat.numpy(), starts)
        return result

    def starts_on(self, device: torch.device) -> Tensor:
        """The first element of each part, int64 [parts] on a device."""
        return self._constants.get("starts", self.starts, torch.int64, device)

    def _lengths_on(self, device: torch.device) -> Tensor:
        return self._constants.get("lengths", self.counts, torch.int64, device)


def joined_slices(slices: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Slices of a tensor, each with its start and end, where neighbours are one."""
    found: list[tuple[int, int]] = []
    for start, end in slices:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


class Constants:
    """Numbers on a device, copied there once: to copy them in each step would wait for it."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}

    def get(
        self, name: Hashable, numbers: Sequence[float], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The numbers as a tensor, the same for one name."""
        key = name, dtype, device
        if torch.compiler.is_compiling():
            return torch.tensor(numbers, dtype=dtype, device=device)
        if key not in self._kept:
            with torch.inference_mode(False):
                self._kept[key] = torch.tensor(numbers, dtype=dtype, device=device)
        return self._kept[key]


def in_numpy(tensor: Tensor) -> bool:
    """Whether NumPy can compute with a tensor: numbers on a CPU, without graph or tracing."""
    if not is_plain():  # first: compilers of backwards know few attributes of tensors
        return False
    # Subclasses stand for tensors that hold no numbers, or others' numbers.
    kinds = (Tensor, torch.nn.Parameter)
    return tensor.is_cpu and type(tensor) in kinds and not tensor.requires_grad
