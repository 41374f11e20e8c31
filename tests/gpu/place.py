"""The device of the tests of this folder, and trainings on it.

`DIFFQ_GPU_TESTS_ON=cpu` runs them on a CPU, which checks the tests themselves.
"""

import os
from functools import partial

import pytest
import torch

import diffq
from tests.models import MODELS, QUANTIZERS, gradients, seeded, step

#: Every quantizer, with DiffQ's other sizes of groups.
KINDS = {
    **QUANTIZERS,
    "diffq-1": partial(diffq.DiffQuantizer, min_size=0, group_size=1),
    "diffq-tensor": partial(diffq.DiffQuantizer, min_size=0, group_size=None),
}

#: Models that together have every kind of layer that torch has kernels of its own for.
LAYERS = ["conv", "encoder", "gru", "tied-modules"]

#: How close outputs of equal weights are, in units of the last place: libraries of a GPU choose
#: their algorithms by memory layout.
OUTPUTS = 2**10

DEVICE = torch.device(os.environ.get("DIFFQ_GPU_TESTS_ON", "cuda"))

adam = partial(torch.optim.AdamW, lr=0.01)
#: Moves weights no further than gradients differ.
sgd = partial(torch.optim.SGD, lr=0.05)

#: For tests of what a CPU does not have.
cuda_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA alone has this")


def device():
    """The device; skips the module of tests that asks for it where there is no GPU."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: run `make test-gpu`", allow_module_level=True)
    return DEVICE


class Training:
    """A model on the device with its quantizer, optimizer and input.

    Args:
        model: a name of `MODELS`, or functions that make a model and its input, as there.
        kind: of `KINDS`; None for plain training.
        dtype: of the model and its input.
        optimizer: makes one for parameters.
    """

    def __init__(
        self,
        model="mlp",
        kind="diffq",
        dtype=torch.float32,
        optimizer=adam,
        **options,
    ):
        make, make_input = MODELS.get(model, model)
        self.make = lambda: make().to(DEVICE, dtype)
        self.model = seeded(self.make)
        self.optimizer = optimizer(self.model.parameters())
        self.quantizer = None if kind is None else KINDS[kind](self.model, **options)
        if kind is not None:
            self.quantizer.setup_optimizer(self.optimizer, lr=0.1)
        self.inputs = seeded(make_input).to(DEVICE)
        if self.inputs.is_floating_point():
            self.inputs = self.inputs.to(dtype)

    def step(self):
        """A training step; returns the loss."""
        return step(self.model.train(), self.optimizer, self.inputs, self.quantizer)

    def steps(self, count):
        """Some training steps; returns this."""
        for _ in range(count):
            self.step()
        return self

    def gradients(self):
        """Gradients of all parameters after a step."""
        self.step()
        return gradients(self.model)
