"""Parameters that get no levels but are stored in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from diffq.attach.weight import WeightQuantizer
from diffq.errors import WeightError
from diffq.format.records import RawRecord
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


class HalfQuantizer(WeightQuantizer):
    """Keeps a parameter as it is in training; in eval it is what float16 keeps of it."""

    method = "float16=True"

    def draw(self, weight: Tensor, learned: Tensor | None) -> None:
        """Training uses the weight itself."""

    @property
    def learning(self) -> bool:
        """Nothing is learned: training needs no optimizer for the sake of this tensor."""
        return False

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
