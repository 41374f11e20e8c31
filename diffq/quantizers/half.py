"""Parameters that get no levels but are stored in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from diffq.errors import WeightError
from diffq.format.records import RawRecord
from diffq.quantizers.stored import StoredQuantizer
from diffq.storage.state import raw_record
from diffq.torch_inside.graph import is_plain


def to_half(tensor: Tensor, name: str, remedy: str) -> Tensor:
    """A tensor in float16; raises WeightError with a remedy for finite numbers beyond it."""
    half = tensor.half()
    overflow = torch.isinf(half) & ~torch.isinf(tensor)
    if is_plain() and overflow.any():
        largest = tensor.abs().max().item()
        raise WeightError(
            f"float16 holds magnitudes up to 65504, got {largest} in {name}. {remedy}"
        )
    return half


class HalfQuantizer(StoredQuantizer):
    """Stores a parameter in float16."""

    method = "float16=True"

    def quantize(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """The weight rounded to float16, in its own dtype."""
        remedy = "Make the quantizer with float16=False."
        return to_half(weight, self.plan.name, remedy).to(weight.dtype)

    def record(self, weight: Tensor, learned: Tensor | None) -> RawRecord:
        """The float16 elements."""
        return raw_record(self.quantize(weight, learned), torch.float16)

    def size_bits(self) -> float:
        """16 bits per element."""
        return 16.0 * self.plan.numel
