"""A tensor as indices into a codebook: product quantization (arXiv:2004.07320, Section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq.errors import FormatError

#: Most codewords: an index has at most 16 bits.
MAX_CODEWORDS = 1 << 16

#: Dtypes that codewords are stored in; uint8 comes with a scale and a zero point.
CODEBOOK_DTYPES = ("uint8", "float16", "float32")

#: Bits of the scale, a float32, and the zero point of a uint8 codebook.
SCALE_BITS = 32 + 8


@dataclass(frozen=True, eq=False)
class ProductRecord:
    """Blocks of consecutive weights, in C order, each the codeword that its index names.

    weight block = codebook[index], in float32; uint8 codewords stand for
    (codeword - zero) * scale, rounded to float32 once.

    Attributes:
        shape: the tensor's shape.
        dtype: the tensor's dtype by its torch name, such as "float32".
        codebook: uint8, float16 or float32 [codewords, block_size].
        indices: uint16 [blocks], each below the number of codewords.
        scale: of uint8 codewords, a float32; 1 for others.
        zero: the uint8 codeword that stands for 0; 0 for others.

    Raises:
        FormatError: the sizes or values contradict each other, or a weight would not be finite.
    """

    shape: tuple[int, ...]
    dtype: str
    codebook: NDArray[np.generic]
    indices: NDArray[np.uint16]
    scale: float = 1.0
    zero: int = 0

    def __post_init__(self) -> None:
        if self.codebook.ndim != 2 or self.codebook.dtype.name not in CODEBOOK_DTYPES:
            raise FormatError(
                f"A codebook has two dimensions and dtype {', '.join(CODEBOOK_DTYPES)}, "
                f"got {self.codebook.dtype} {self.codebook.shape}."
            )
        codewords, block_size = self.codebook.shape
        check_codebook_shape(math.prod(self.shape), block_size, codewords)
        check_scale_and_zero(self.stored_dtype, self.scale, self.zero)
        if self.indices.shape != (math.prod(self.shape) // block_size,):
            raise FormatError(
                f"A tensor of shape {self.shape} in blocks of {block_size} has one index for "
                f"each block, got {self.indices.shape}."
            )
        check_indices(self.indices, codewords)
        check_codewords(self.codebook)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def stored_dtype(self) -> str:
        """Dtype of the codebook."""
        name: str = self.codebook.dtype.name
        return name

    @property
    def levels(self) -> NDArray[np.uint16]:
        """The indices, under the name that levels of other tensors have."""
        return self.indices

    @property
    def group_size(self) -> int:
        """Indices per group: all share one bitwidth."""
        return self.indices.size

    @property
    def bits(self) -> NDArray[np.uint8]:
        """Bits of an index, uint8 [1]."""
        return np.full(1, index_bits(len(self.codebook)), np.uint8)

    @property
    def constant(self) -> bool:
        """Whether there is one codeword only, so that no index is stored."""
        return len(self.codebook) == 1

    @property
    def parameter_bits(self) -> int:
        """Bits of the codebook, and of its scale and zero point if it has them."""
        scale = SCALE_BITS if self.stored_dtype == "uint8" else 0
        return 8 * self.codebook.nbytes + scale

    def stored_bits(self) -> int:
        """Equation 5 of arXiv:2004.07320 for the weights of this tensor, in bits.

        Codewords at their dtype and ceil(log2 K) bits for each block; a uint8 codebook
        takes its scale and zero point besides.
        """
        return self.parameter_bits + index_bits(len(self.codebook)) * self.indices.size

    def values(self) -> NDArray[np.float32]:
        """The decoded weights: float32, in the tensor's shape."""
        words = codeword_values(self.codebook, self.scale, self.zero)
        return words[self.indices].reshape(self.shape)


def index_bits(codewords: int) -> int:
    """Bits of an index among so many codewords: log2, rounded up."""
    return (codewords - 1).bit_length()


def codeword_values(codebook: NDArray[np.generic], scale: float, zero: int) -> NDArray[np.float32]:
    """The codewords that a stored codebook stands for, float32 of the same shape."""
    words = codebook.astype(np.float32)
    if codebook.dtype == np.uint8:
        words -= np.float32(zero)
        words *= np.float32(scale)
    return words


def check_codebook_shape(numel: int, block_size: int, codewords: int) -> None:
    """Checks that blocks fill a tensor, and that it has as many as codewords.

    Raises:
        FormatError: a rule of docs/format.md, section 4, is broken.
    """
    if block_size < 1 or numel % block_size:
        raise FormatError(
            f"Blocks must divide a tensor's {numel} weights, got blocks of {block_size}."
        )
    most = min(numel // block_size, MAX_CODEWORDS)
    if not 1 <= codewords <= most:
        raise FormatError(f"The tensor has from 1 to {most} codewords, got {codewords}.")


def check_scale_and_zero(stored_dtype: str, scale: float, zero: int) -> None:
    """Checks that every uint8 codeword decodes to a finite number.

    Raises:
        FormatError: a scale that is not finite, negative or too large, or a zero point
            beyond 0 to 255.
    """
    if stored_dtype != "uint8":
        if (scale, zero) != (1.0, 0):
            raise FormatError(
                f"Only uint8 codewords have a scale and a zero point, got {scale} and {zero}."
            )
        return
    largest = float(np.finfo(np.float32).max) / 256
    sound = 0 <= scale <= largest and float(np.float32(scale)) == scale
    if not sound or not 0 <= zero <= 255:
        raise FormatError(
            f"uint8 codewords have a float32 scale from 0 to {largest:.8g} and a zero point from "
            f"0 to 255, got {scale} and {zero}."
        )


def check_indices(indices: NDArray[np.generic], codewords: int) -> None:
    """Raises FormatError for an index that names no codeword."""
    if int(indices.max(initial=0)) >= codewords:
        raise FormatError(f"Indices must be below {codewords}, got {indices.max()}.")


def check_codewords(codebook: NDArray[np.generic]) -> None:
    """Raises FormatError for codewords that are not finite."""
    if not np.isfinite(codebook).all():
        raise FormatError("Codewords must be finite, got NaN or Inf.")
