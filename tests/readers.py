"""Layers that note the weights they compute with, and what reading an attached model gives."""

import torch
from torch import nn

from tests.compare import same_bits
from tests.models import restored

#: Names of what a quantizer adds to a state dict, in the root's own namespace.
ADDED, LEARNED, SETTINGS = "_diffq.", "_diffq.learned", "_diffq._extra_state"

#: Options with few enough bits that quantized, noisy and plain weights are far from each other.
COARSE = {"init_bits": 3}


class Reader(nn.Linear):
    """A linear layer from 16 features to 16 that notes the weight of each call."""

    def __init__(self):
        super().__init__(16, 16)
        self.seen = []

    def forward(self, x):
        self.seen.append(self.weight.detach().clone())
        return super().forward(x)


def readers(layers=2):
    """A root, a block and layers in it that note their weights."""
    return nn.Sequential(nn.Sequential(*(Reader() for _ in range(layers))), nn.Tanh(), Reader())


def seen_by(model):
    """The weights that each layer noted, in the order of the modules."""
    return [module.seen for module in model.modules() if isinstance(module, Reader)]


def x16(batch=3):
    """A batch of 16 features."""
    return torch.randn(batch, 16)


def reads_parameters(model):
    """Whether every read of the model outside of a forward gives the Parameter itself."""
    held = [(m, name, p) for m in model.modules() for name, p in m._parameters.items()]
    flat = [
        (weight, getattr(m, name))
        for m in model.modules()
        if isinstance(m, nn.RNNBase)
        for weight, name in zip(m._flat_weights, m._flat_weights_names, strict=True)
    ]
    return all(getattr(m, name) is p for m, name, p in held) and all(a is b for a, b in flat)


def stored(make, quantizer):
    """Name to the value of each parameter, under all of its names, as the quantizer stores it."""
    return dict(restored(make, quantizer).named_parameters(remove_duplicate=False))


def read(model, names):
    """Name to a copy of what reading gives at the moment."""
    paths = [name.rpartition(".") for name in names]
    return {
        name: getattr(model.get_submodule(path), last).detach().clone()
        for name, (path, _, last) in zip(names, paths, strict=True)
    }


def computes_with_what_is_stored(make, model, quantizer):
    """Whether a model in eval mode computes with the stored values, bit for bit."""
    values = stored(make, quantizer)
    with torch.no_grad(), quantizer.computing():
        return same_bits(read(model, list(values)), {n: p.detach() for n, p in values.items()})


def learned_in(model):
    """The one parameter that the quantizer of a model learns."""
    return model.get_parameter(LEARNED)
