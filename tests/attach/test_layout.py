"""Memory layouts: a quantized weight has the strides of the weight that it stands for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffq
from tests.models import QUANTIZERS, seeded

_LAST = torch.channels_last

# Each with the operation that reads it, and an input.
LAYOUTS = {
    "contiguous": lambda: torch.randn(8, 4, 3, 3),
    "channels-last": lambda: torch.randn(8, 4, 3, 3).to(memory_format=_LAST),
    "channels-last-1x1": lambda: torch.randn(8, 4, 1, 1).to(memory_format=_LAST),
    "channels-last-depthwise": lambda: torch.randn(8, 1, 3, 3).to(memory_format=_LAST),
    "channels-last-3d": lambda: torch.randn(8, 4, 2, 2, 2).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(16, 8).t(),
    "permuted": lambda: torch.randn(4, 8, 6).permute(2, 0, 1),
    "half": lambda: torch.randn(16, 8).half().t(),
}


class _Reader(nn.Module):
    """Notes the strides of what it reads, as a layer would give it to a kernel."""

    def __init__(self, make):
        super().__init__()
        self.weight = nn.Parameter(make())
        self.strides = []

    def forward(self):
        weight = self.weight
        self.strides.append(weight.stride())
        return weight.float().square().sum()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_strides_of_the_weight(kind, layout):
    """Training, eval with and without gradients and direct calls read the weight's strides."""
    root = nn.Sequential(seeded(lambda: _Reader(LAYOUTS[layout])))
    reader = root[0]
    strides = reader.weight.stride()
    reader.forward = lambda x, forward=reader.forward: forward()
    options = {"block_size": 1} if kind == "product" else {}
    QUANTIZERS[kind](root, **options).no_optimizer()
    for training in (True, False):
        root.train(training)
        for _ in range(2):
            root(None).backward()
            reader(None).backward()
            with torch.no_grad():
                root(None)
    assert set(reader.strides) == {strides}


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq", "product"])
def test_strides_in_compiled_code(kind):
    """Compiled code computes with weights in the strides of the plain ones."""
    model = seeded(lambda: nn.Conv2d(4, 8, 3)).to(memory_format=_LAST)
    options = {"block_size": 1} if kind == "product" else {}
    QUANTIZERS[kind](model, **options).no_optimizer()
    seen = []

    def _backend(graph, inputs):
        def _run(*args):
            with _Convolutions(seen):
                return graph(*args)

        return _run

    torch.compiler.reset()
    compiled = torch.compile(model, backend=_backend)
    inputs = torch.randn(2, 4, 6, 6).to(memory_format=_LAST)
    for training in (True, False):
        model.train(training)
        compiled(inputs)
    assert len(seen) == 2
    assert all(weight.is_contiguous(memory_format=_LAST) for weight in seen)


class _Convolutions(torch.overrides.TorchFunctionMode):
    """Notes the weights that convolutions are given."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.conv2d, F.conv2d):
            self.seen.append(args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["diffq", "qat"])
def test_gaps_do_not_grow(kind):
    """A weight that leaves gaps in memory is read without them."""
    base = torch.randn(16, 32)
    model = seeded(lambda: _Reader(lambda: base[::2, ::2]))
    QUANTIZERS[kind](model).no_optimizer()
    for training in (True, False):
        model.train(training)
        model()
    assert set(model.strides) == {torch.empty_like(base[::2, ::2]).stride()}


def test_a_converted_model_follows():
    """After `to(memory_format=...)` of an attached model, eval reads the strides of its weights."""
    model = seeded(lambda: nn.Conv2d(4, 8, 3))
    diffq.QATQuantizer(model, bits=4, min_size=0).no_optimizer()
    model.eval()(torch.randn(1, 4, 6, 6))
    model.to(memory_format=_LAST)
    with torch.no_grad():
        assert model.weight.is_contiguous(memory_format=_LAST)
        model.to(memory_format=torch.contiguous_format)
        assert model.weight.is_contiguous()
