"""Tensors in the same memory: ties, and tensors that share a part of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffq.torch_inside.modules import is_lazy


def tie_key(tensor: Tensor) -> object:
    """What tied tensors share: the object, or for parameters their memory, shape and strides."""
    if type(tensor) is not nn.Parameter or tensor.is_meta or not tensor.numel() or is_lazy(tensor):
        return id(tensor)
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def have_common_elements(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have an element in common."""
    places = [set(_addresses(tensor)) for tensor in (one, other)]
    return not places[0].isdisjoint(places[1])


def _addresses(tensor: Tensor) -> list[int]:
    places = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = places[..., None] + torch.arange(size) * stride
    return (places.reshape(-1) * tensor.element_size() + tensor.data_ptr()).tolist()
