"""Unit noise: random numbers from torch's generators, or faster ones seeded by them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.random import SFC64, Generator
from torch import Tensor

from diffq.numerics.segments import in_numpy

# Numbers that torch draws in less time than it takes to set up another way.
_FEW = 2**14

_CODES = 2**16

# Numbers that are drawn at a time, so that their codes take little memory.
_MOST = 2**20


def source(kind: str, count: int, like: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A source of unit noise, which fills the tensors that it is called with.

    On a CPU torch draws on one core only, by a slow generator, and that is most of what
    noise costs. So many numbers are drawn there from 16 random bits each, by inverse
    transform sampling: the 65,536 of them that are equally likely are the distribution's
    quantiles at (k + 1/2) / 65,536. The Gaussian ends at 4.3 deviations so. The bits come
    from a generator that is seeded from torch's own.

    Args:
        kind: the distribution: "gaussian" for N(0, 1), "uniform" for U(-1, 1).
        count: how many numbers are drawn in all.
        like: gives the device of the tensors, which are contiguous and of any shape.
        dtype: of the tensors.
    """
    if count <= _FEW or not in_numpy(like.detach()):
        return Tensor.normal_ if kind == "gaussian" else _uniform_
    seed = torch.randint(2**63 - 1, (), device="cpu").item()
    generator = Generator(SFC64(int(seed)))
    quantiles = _quantiles(kind, dtype)

    def fill(sample: Tensor) -> Tensor:
        for piece in torch.split(sample.view(-1), _MOST):
            torch.index_select(quantiles, 0, _codes(generator, piece.numel()), out=piece)
        return sample

    return fill


def _uniform_(sample: Tensor) -> Tensor:
    return sample.uniform_(-1, 1)


def _codes(generator: Generator, count: int) -> Tensor:
    """So many numbers of 16 random bits, int32."""
    words = generator.integers(2**64 - 1, dtype=np.uint64, size=-(-count // 4), endpoint=True)
    return torch.from_numpy(words.view(np.uint16)[:count]).to(torch.int32)


@lru_cache
def _quantiles(kind: str, dtype: torch.dtype) -> Tensor:
    """The number that each code stands for."""
    with torch.inference_mode(False):
        codes = torch.arange(_CODES, dtype=torch.float64, device="cpu")
        uniform = codes.add_(0.5).mul_(2 / _CODES).sub_(1)
        return (uniform.erfinv_().mul_(math.sqrt(2)) if kind == "gaussian" else uniform).to(dtype)
