"""Product-quantized tensors in a state dict: codebook and indices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffq.errors import StateError
from diffq.format import bitpack
from diffq.format.kinds.product import (
    CODEBOOK_DTYPES,
    ProductRecord,
    check_codebook_head,
    index_bits,
)
from diffq.storage.state_entry import (
    as_tensor,
    describe,
    read_array,
    read_dense,
    read_floating,
    read_shape,
    read_typed,
)


def product_entry(record: ProductRecord, packed: bool) -> dict[str, Any]:
    """What only the entry of a product-quantized tensor has."""
    width = index_bits(len(record.codebook))
    if packed:
        indices = bitpack.pack(record.indices, width) if width else np.empty(0, np.uint8)
    else:
        indices = record.indices.astype(np.int32)
    entry = {"codebook": as_tensor(record.codebook), "indices": as_tensor(indices)}
    if record.stored_dtype != "uint8":
        return entry
    return {**entry, "scale": as_tensor(np.array([record.scale], np.float32)), "zero": record.zero}


def read_product(entry: Mapping[str, Any], where: str) -> ProductRecord:
    """Inverse of `product_entry`.

    Raises:
        StateError: a part is missing or of another type.
        FormatError: the parts contradict each other.
    """
    shape = read_shape(entry, where)
    codebook = _read_codebook(entry, where)
    codewords, block_size = codebook.shape
    check_codebook_head(codebook.dtype.name, math.prod(shape), block_size, codewords)
    read = _unpack_indices if read_typed(entry, "packed", bool, where) else _unspell_indices
    indices = read(entry, where, math.prod(shape) // block_size, codewords)
    dtype = read_floating(entry, where)
    if codebook.dtype != np.uint8:
        return ProductRecord(shape, dtype, codebook, indices)
    scale = read_array(entry, "scale", torch.float32, where)
    if scale.shape != (1,):
        raise StateError(f"{where} needs one 'scale', got {list(scale.shape)}.")
    zero = read_typed(entry, "zero", int, where)
    return ProductRecord(shape, dtype, codebook, indices, float(scale[0]), zero)


def _read_codebook(entry: Mapping[str, Any], where: str) -> NDArray[Any]:
    codebook = read_dense(entry, "codebook", where)
    known = [getattr(torch, name) for name in CODEBOOK_DTYPES]
    if codebook.dtype not in known or codebook.dim() != 2:
        raise StateError(
            f"{where} needs 'codebook' as a tensor of two dimensions and dtype "
            f"{', '.join(CODEBOOK_DTYPES)}, got {describe(codebook)}."
        )
    array: NDArray[Any] = codebook.detach().cpu().numpy()
    return array


def _unpack_indices(
    entry: Mapping[str, Any], where: str, blocks: int, codewords: int
) -> NDArray[np.uint16]:
    packed, width = read_array(entry, "indices", torch.uint8, where), index_bits(codewords)
    if width:
        return bitpack.unpack(packed, blocks, width)
    if packed.size:
        raise StateError(f"{where} has one codeword and needs no indices, got {packed.size}.")
    return np.zeros(blocks, np.uint16)


def _unspell_indices(
    entry: Mapping[str, Any], where: str, blocks: int, codewords: int
) -> NDArray[np.uint16]:
    indices = read_array(entry, "indices", torch.int32, where)
    if indices.shape != (blocks,):
        raise StateError(f"{where} has indices {list(indices.shape)} for {blocks} blocks.")
    if indices.min() < 0 or indices.max() >= codewords:
        raise StateError(f"{where} has an index that names none of its {codewords} codewords.")
    return indices.astype(np.uint16)
