"""Values of a batch of tensors: noisy, rounded, or rounded in part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffq.kernels.device.columns import GAUSSIAN, ROUNDING, UNIFORM
from diffq.kernels.device.noise import sample_kernel
from diffq.kernels.device.scan import scan_kernel
from diffq.kernels.launch import TYPES, Addresses, Launches, on
from diffq.kernels.layout import PARTS, Layout
from diffq.numerics.grid import BitsLaw
from diffq.numerics.noise import Noise

_KINDS = {"gaussian": GAUSSIAN.value, "uniform": UNIFORM.value, "rounding": ROUNDING.value}

# Weights that a program of a scan reads at a time.
_SCAN_BLOCK = 4096


@dataclass(frozen=True)
class Settings:
    """How the values of a batch come about.

    Attributes:
        kind: of noise.
        law: how bitwidths come from logits; None if bitwidths are given.
        scale: steps per unit of random noise.
        rate: probability that a block is not left as it is.
        block_size: consecutive weights of a block.
    """

    kind: Noise
    law: BitsLaw | None = None
    scale: float = 0.0
    rate: float = 1.0
    block_size: int = 1


@dataclass(frozen=True)
class State:
    """What gradients need of a sample; no values, so that their autograd node may hold it.

    Attributes:
        zeros: of each tensor, whether its zeros stay zero.
        seed: int64 [1], the key of the noise.
        ends: float32 [2, pieces], minimum and maximum of each piece of a weight.
        places: int32 [3, pieces], their first places, and whether a weight is zero.
    """

    zeros: Sequence[bool]
    seed: Tensor
    ends: Tensor
    places: Tensor


class Sampled(NamedTuple):
    """The values of a batch.

    Attributes:
        values: one for each weight, in its shape; views of one buffer.
        state: for `gradients`.
    """

    values: list[Tensor]
    state: State


class Sampler:
    """Computes values of tensors of one dtype, device and group size, in two or three launches.

    Args:
        shapes: of the tensors.
        group_size: weights that share a bitwidth; None if each tensor has one.
        settings: of all tensors.
        dtype: of the weights.
        device: of all tensors.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        group_size: int | None,
        settings: Settings,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._dtype, self._device = dtype, device
        self._layout = Layout(shapes, group_size, device)
        self._addresses = Addresses(device)
        self._launches = Launches()
        self._kind = _KINDS[settings.kind]
        self._learned, self._whole = settings.law is not None, group_size is None
        self._masked = settings.rate < 1
        self._random = settings.kind != "rounding" or self._masked
        law = settings.law or BitsLaw(0, 0)
        self._law = float(law.min_bits), float(law.max_bits - law.min_bits)
        # Triton compiles an int for itself.
        self._noise = float(settings.scale), float(settings.rate), settings.block_size

    @torch.no_grad()
    def sample(
        self,
        weights: Sequence[Tensor],
        given: Tensor,
        *,
        zeros: Sequence[bool] | None = None,
    ) -> Sampled:
        """The values of all tensors, from noise of a fresh seed of torch's generator.

        Args:
            weights: contiguous; they may move from call to call.
            given: logits of all groups or, without a law, their bitwidths; float32 [groups].
            zeros: of each tensor, whether weights that are exactly zero stay so; none by default.
        """
        zeros = [False] * len(weights) if zeros is None else zeros
        layout, new = self._layout, self._layout.table.new_empty
        with on(self._device):
            self._addresses.update(weights, zeros)
            seed = new(1).random_() if self._random else new(1)
            ends = new((2, layout.weight_pieces), dtype=torch.float32)
            places = new((3, layout.weight_pieces), dtype=torch.int32)
            state = State(zeros, seed, ends, places)
            values = new(layout.total, dtype=self._dtype)
            self._scan(state)
            self._fill(values, given, state)
        return Sampled(layout.cut(values), state)

    def zeros(self, state: State) -> Tensor:
        """Whether a weight of each tensor was exactly zero in a sample, bool [tensors]."""
        layout, found = self._layout, state.places[2]
        owners = layout.pieces[:, 0]
        return found.new_zeros(len(layout.numels)).index_add_(0, owners, found) > 0

    def _scan(self, state: State) -> None:
        layout, addresses = self._layout, self._addresses
        self._launches.get(scan_kernel, (*self._reading, _SCAN_BLOCK), num_warps=8)(
            layout.weight_pieces,
            *(addresses.table, layout.pieces, state.ends, state.places, layout.weight_pieces),
        )

    def _fill(self, values: Tensor, given: Tensor, state: State) -> None:
        layout, addresses = self._layout, self._addresses
        constants = (
            *(*self._reading, self._kind, self._learned, self._masked, self._whole),
            *(*layout.tile, PARTS),
        )
        self._launches.get(sample_kernel, constants)(
            layout.chunk_count,
            *(addresses.table, layout.table, layout.chunks, given, state.ends, state.places),
            *(state.seed, values, layout.weight_pieces, *self._law, *self._noise),
        )

    @property
    def _reading(self) -> tuple[Any, bool]:
        """The constants of kernels that read weights."""
        return TYPES[self._dtype], self._addresses.aligned
