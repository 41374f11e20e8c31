"""How many weights a block of product quantization has, by the kind of layer.

A block is made of consecutive weights of the flattened tensor. In a linear layer
[out, in] or an embedding [rows, in] it lies along the inputs, in a convolution
[out, in, *kernel] it is one kernel, several of adjacent inputs, or a part of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffq.checks import check_whole
from diffq.errors import ConfigError
from diffq.torch_inside.modules import CONVOLUTIONS

#: Kinds of layers, as far as blocks are concerned. Whatever is neither an embedding nor a
#: convolution is linear: recurrent layers, attention, parameters of your own.
LAYER_KINDS = ("linear", "embedding", "conv1x1", "conv", "depthwise")

#: One number for inputs of layers, or numbers by the kind of layer.
BlockSize = int | Mapping[str, int]

#: Blocks along the inputs where a mapping leaves a kind out (the paper's sizes).
_ALONG_INPUTS = {"linear": 8, "embedding": 8, "conv1x1": 4}


def check_block_size(block_size: Any) -> None:
    """Raises ConfigError unless it is a number of weights, or maps kinds of layers to some."""
    if not isinstance(block_size, Mapping):
        check_whole(block_size, "block_size")
        return
    unknown = [kind for kind in block_size if kind not in LAYER_KINDS]
    if unknown:
        raise ConfigError(
            f"block_size maps kinds of layers, {', '.join(LAYER_KINDS)}, to numbers of weights; "
            f"got {unknown[0]!r}. For single tensors, use overrides."
        )
    for kind, size in block_size.items():
        check_whole(size, f"block_size[{kind!r}]")


def layer_kind(owner: nn.Module, shape: torch.Size) -> str:
    """The kind of layer that a tensor of this shape in this module belongs to."""
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if not isinstance(owner, CONVOLUTIONS) or len(shape) < 3:
        return "linear"
    if shape[2:].numel() == 1:
        return "conv1x1"
    return "depthwise" if owner.groups > 1 and shape[1] == 1 else "conv"


def choose_block_size(block_size: BlockSize, kind: str, shape: torch.Size) -> int:
    """The block size of one tensor: as the user says for its kind, or a whole kernel."""
    if isinstance(block_size, Mapping):
        chosen = {**_ALONG_INPUTS, **block_size}
    else:
        chosen = dict.fromkeys(_ALONG_INPUTS, block_size)
    return chosen.get(kind, shape[2:].numel())


def check_blocks(name: str, kind: str, shape: torch.Size, block_size: int, codewords: int) -> None:
    """Checks that blocks fill a tensor without crossing rows or kernels.

    Raises:
        ConfigError: the block size does not divide, or there are fewer blocks than codewords.
    """
    convolution = kind in ("conv1x1", "conv", "depthwise")
    length = shape[1:].numel() if convolution else shape[-1]
    kernel = shape[2:].numel() if convolution else 1
    if length % block_size or (block_size % kernel and kernel % block_size):
        whole = f", as whole kernels of {kernel} or parts of one" if kernel > 1 else ""
        fitting = (size for size in range(1, block_size + 1) if length % size == 0)
        remedy = kernel if kernel > 1 else max(fitting)
        raise ConfigError(
            f"Blocks must divide the {length} inputs of {name} {list(shape)}{whole}; got "
            f"block_size {block_size}. Pass overrides={{{name!r}: {{'block_size': {remedy}}}}}, "
            "or exclude it."
        )
    blocks = shape.numel() // block_size
    if codewords > blocks:
        raise ConfigError(
            f"A codebook has at most as many codewords as its tensor has blocks, {blocks} of "
            f"{block_size} weights in {name}; got codebook_size {codewords}. Pass "
            f"overrides={{{name!r}: {{'codebook_size': ...}}}}, or exclude it."
        )
