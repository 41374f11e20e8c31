"""The layers of random models, as data and as modules."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.models import First


class Twice(nn.Module):
    """One module that is used twice, under one name or two."""

    def __init__(self, module, names):
        super().__init__()
        self.first = module
        if names == 2:
            self.second = module

    def forward(self, x):
        return getattr(self, "second", self.first)(torch.tanh(self.first(x)))


class TiedPair(nn.Module):
    """Two modules that share their weight, not their bias."""

    def __init__(self, module):
        super().__init__()
        self.first, self.second = module, copy.deepcopy(module)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Attention(nn.Module):
    """Self-attention, with or without its fast path."""

    def __init__(self, width, heads, bias, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Scale(nn.Module):
    """Parameters and a buffer that a module reads by itself; one is empty, one is not used."""

    def __init__(self, numel):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()) + 2)
        self.shifts = nn.ParameterList([torch.randn(numel), torch.randn(1)])
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.unused = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("offset", torch.randn(()))

    def forward(self, x):
        return x * self.scale + self.shifts[0].mean() + self.shifts[1] + self.offset


class Checkpointed(nn.Module):
    """A module under activation checkpointing."""

    def __init__(self, module, use_reentrant):
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


class Unused(nn.Module):
    """A layer that no forward reaches."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 2)

    def forward(self, x):
        return x


class Pool(nn.Module):
    """The mean over time or space."""

    def forward(self, x):
        return x.flatten(2).mean(2) if x.dim() > 3 else x.mean(1)


class Transposed(nn.Module):
    """Time and width exchanged: a sequence as an image of one dimension, and back."""

    def forward(self, x):
        return x.transpose(1, 2)


def _recurrent(cell, **options):
    return nn.Sequential(getattr(nn, cell)(batch_first=True, **options), First())


def _encoder(width, heads, norm_first):
    layer = nn.TransformerEncoderLayer(
        width, heads, 6, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


#: Kind of a layer to what makes it. Other kinds are names in torch.nn.
MAKERS = {
    "twice": Twice,
    "tied": TiedPair,
    "checkpointed": Checkpointed,
    "recurrent": _recurrent,
    "attention": Attention,
    "encoder": _encoder,
    "scale": Scale,
    "unused": Unused,
    "pool": Pool,
    "transposed": Transposed,
}

NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, its options, and a parametrization that comes with it."""

    kind: str
    options: dict
    norm: str | None = None

    def make(self, plain=False):
        """The module; without its own parametrization if it is to be plain."""
        options = {
            key: value.make(plain) if isinstance(value, Layer) else value
            for key, value in self.options.items()
        }
        module = MAKERS.get(self.kind, getattr(nn, self.kind, None))(**options)
        return NORMS[self.norm](module) if self.norm and not plain else module
