"""Activation checkpointing, DistributedDataParallel and second derivatives on a GPU."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.compare import close
from tests.gpu import place
from tests.gpu.place import KINDS, Training, sgd
from tests.models import SUMS, gradients, step

pytestmark = pytest.mark.gpu

DEVICE = place.device()


class Layers(nn.Module):
    """Three layers, which are computed again in backward if `use_reentrant` is True or False."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = x.detach().requires_grad_()  # without which a reentrant checkpoint has no gradient
        for layer in self.layers:
            run = nn.Sequential(layer, nn.Tanh())
            reentrant = self.use_reentrant
            x = run(x) if reentrant is None else checkpoint(run, x, use_reentrant=reentrant)
        return x


def _inputs():
    return torch.randn(4, 16)


def _gradients(kind, use_reentrant):
    training = Training((partial(Layers, use_reentrant), _inputs), kind, optimizer=sgd)
    torch.manual_seed(3)
    return training.gradients()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(kind, use_reentrant):
    """Layers that are computed again in backward read the same noise: gradients are the same."""
    assert close(_gradients(kind, use_reentrant), _gradients(kind, None), SUMS)


@pytest.fixture
def _one_process():
    """A process group of this process alone."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq"])
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_data_parallel(kind, options):
    """In DistributedDataParallel, gradients are those of the bare model, in every step."""
    plain, other = (Training("mlp", kind, optimizer=sgd) for _ in range(2))
    parallel = DistributedDataParallel(other.model, **options)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = plain.gradients()
        torch.manual_seed(seed)
        step(parallel, other.optimizer, other.inputs, other.quantizer)
        assert close(gradients(other.model), expected, SUMS)


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq"])
def test_second_derivatives(kind):
    """The gradient of a gradient's norm reaches the weights and what is learned."""
    training = Training("mlp", kind)
    model, parameters = training.model, list(training.model.parameters())
    loss = model(training.inputs).tanh().square().sum()
    found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    sum(gradient.square().sum() for gradient in found if gradient is not None).backward()
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
