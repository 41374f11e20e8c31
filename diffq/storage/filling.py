"""Tensors of a file, decoded into a plain model or on their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffq.format.kinds.base import QuantizedEntry
from diffq.storage.open import StoredModel
from diffq.storage.restore import match, unique_targets
from diffq.storage.state import Header


def header_of(stored: StoredModel) -> Header:
    """What a file consists of."""
    shapes = {name: (entry.shape, entry.dtype) for name, entry in stored.entries.items()}
    return Header(shapes, stored.aliases)


def fill(model: nn.Module, stored: StoredModel, strict: bool) -> nn.Module:
    """Fills a plain model with the tensors of a file; see `diffq.load`."""
    header = header_of(stored)
    targets = match(model, header, strict)
    stored.reader.verify(keep=True)
    unique = unique_targets(targets, header, lambda name: stored[name])
    # Large tensors are decoded where they belong, without a copy in between.
    direct = {name: target for name, target in unique if _decodes_into(stored, name, target)}
    out = {name: target.detach().numpy() for name, target in direct.items()}
    decoded = decode(stored, dict(unique), out)
    with torch.no_grad():
        for name, target in unique:
            if direct.get(name) is not target:
                target.copy_(decoded[name])
    return model


def _decodes_into(stored: StoredModel, name: str, target: Tensor) -> bool:
    quantized = isinstance(stored.entries[name], QuantizedEntry)
    plain = target.device.type == "cpu" and target.dtype == torch.float32
    return quantized and plain and target.is_contiguous()


def decode(
    stored: StoredModel, names: Iterable[str], out: Mapping[str, NDArray[np.float32]] | None = None
) -> dict[str, Tensor]:
    """Tensors of a file; those in `out` are written there."""
    chosen = list(names)
    quantized = [name for name in chosen if isinstance(stored.entries[name], QuantizedEntry)]
    values = stored.reader.values_of(quantized, out)
    dtypes = {name: getattr(torch, stored.entries[name].dtype) for name in quantized}
    tensors = {name: torch.from_numpy(values[name]).to(dtypes[name]) for name in quantized}
    return {name: tensors[name] if name in tensors else stored[name] for name in chosen}
