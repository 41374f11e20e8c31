"""Codewords as they are stored, and the gradient that trains them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffq.attach.plan import dtype_name
from diffq.format.kinds.product import ProductRecord
from diffq.numerics.kmeans import member_sums
from diffq.torch_inside.graph import is_exported

#: What codewords are stored in.
Centroids = Literal["float32", "float16", "int8"]

_LAST_LEVEL = 255


@dataclass(frozen=True)
class StoredCodebook:
    """A codebook as a file holds it.

    Attributes:
        words: float32, float16 or uint8 [K, d].
        scale: float32 0-dim, of uint8 words; 1 for others.
        zero: float32 0-dim, the whole number from 0 to 255 that stands for 0; 0 for others.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor

    def values(self) -> Tensor:
        """The codewords that these stand for, float32 [K, d], rounded as readers round."""
        return self._decode(self.words)

    def take(self, indices: Tensor) -> Tensor:
        """The codewords of some blocks, float32 [blocks, d], by indices of any integer dtype."""
        if self.words.dtype != torch.float16 or is_exported():
            return self._decode(self.words[indices.long()])
        # As integers, because torch.compile would leave out a rounding to float16 and back.
        return self.words.view(torch.int16)[indices.long()].view(torch.float16).float()

    def _decode(self, words: Tensor) -> Tensor:
        values = words.float()
        return (values - self.zero) * self.scale if words.dtype == torch.uint8 else values

    def record(self, weight: Tensor, indices: Tensor) -> ProductRecord:
        """The record of a weight, by the indices of its blocks, [blocks]."""
        return ProductRecord(
            shape=tuple(weight.shape),
            dtype=dtype_name(weight.dtype),
            codebook=self.words.cpu().numpy(),
            indices=indices.cpu().numpy().astype("uint16"),
            scale=self.scale.item(),
            zero=int(self.zero.item()),
        )


@torch.no_grad()
def store_codebook(codebook: Tensor, centroids: Centroids) -> StoredCodebook:
    """Rounds a codebook, [K, d], to what is stored.

    "int8" is Equation 2 of arXiv:2004.07320, on a range that holds 0: scale
    s = (max - min) / 255, zero point z = round(-min / s), level round(c / s) + z.
    """
    codebook = codebook.detach().float()
    one, none = torch.ones_like(codebook[0, 0]), torch.zeros_like(codebook[0, 0])
    if centroids != "int8":
        return StoredCodebook(codebook.to(getattr(torch, centroids)), one, none)
    low, high = codebook.amin().clamp(max=0), codebook.amax().clamp(min=0)
    # In halves, because the whole range may overflow.
    scale = ((high / 2 - low / 2) / _LAST_LEVEL * 2).float()
    step = torch.where(scale > 0, scale, 1)
    zero = torch.round(-low / step).clamp(0, _LAST_LEVEL)
    levels = (torch.round(codebook / step) + zero).clamp(0, _LAST_LEVEL)
    return StoredCodebook(levels.to(torch.uint8), scale, zero)


class CentroidGradient(torch.autograd.Function):
    """Forward gives a tensor made of codewords, backward trains the codewords.

    Equation 4 of arXiv:2004.07320: a codeword's gradient is the mean of those of its
    blocks. Through the rounding to what is stored, it passes straight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        value: Tensor,
        codebook: Tensor,
        indices: Tensor,
        counts: Tensor,
        trained: Tensor | None,
    ) -> Tensor:
        """Returns `value` in the weight's dtype."""
        ctx.save_for_backward(indices, counts, trained)
        ctx.like = codebook.shape, codebook.dtype
        return value.to(weight.dtype).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """None to the weight, which is in the graph in name only; the mean to each codeword."""
        indices, counts, trained = ctx.saved_tensors
        (size, dim), dtype = ctx.like
        blocks = grad.reshape(-1, dim).to(torch.promote_types(dtype, torch.float32))
        means = member_sums(blocks, indices, size) / counts[:, None]
        if trained is not None:
            means.masked_fill_(~trained[:, None], 0)
        return None, None, means.to(dtype), None, None, None


def pass_to_centroids(
    weight: Tensor,
    value: Tensor,
    codebook: Tensor,
    indices: Tensor,
    counts: Tensor,
    trained: Tensor | None = None,
) -> Tensor:
    """A tensor made of codewords, with their gradient; see `CentroidGradient`.

    Args:
        weight: the tensor that it replaces; gives the dtype, and gets no gradient.
        value: the stored codewords in the places of their blocks, in the weight's shape.
        codebook: what is trained, [K, d].
        indices: int64 [blocks].
        counts: number of blocks of each codeword, [K], at least 1.
        trained: bool [K], the codewords that get their gradient; None for all.
    """
    inputs = weight, value, codebook, indices, counts, trained
    result: Tensor = CentroidGradient.apply(*inputs)  # type: ignore[no-untyped-call]
    return result
