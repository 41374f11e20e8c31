"""Models on a GPU that are quantized without training: their bits, and what is left as it was."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffq
from tests.compare import same_bits
from tests.gpu import place

pytestmark = pytest.mark.gpu

DEVICE = place.device()


def _trained():
    """A model on the device, with Adam's second moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(torch.randn(32, 64, device=DEVICE)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def _file(state, sensitivity):
    file = io.BytesIO()
    diffq.quantize_checkpoint(state, 0.02, sensitivity=sensitivity).save(file)
    return file.getvalue()


def test_the_file_does_not_depend_on_the_device():
    """A state dict on the device gives the file of its copy on the CPU, byte for byte."""
    model, optimizer = _trained()
    state = model.state_dict()
    moments = {n: optimizer.state[p]["exp_avg_sq"].cpu() for n, p in model.named_parameters()}
    copied = {name: tensor.cpu() for name, tensor in state.items()}
    assert _file(state, optimizer) == _file(copied, moments)


def test_sensitivity_leaves_the_device_as_it_was():
    """Weights, and the random numbers of the device, are those of before."""
    model, _ = _trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [(torch.randn(8, 64, device=DEVICE), torch.randint(64, (8,), device=DEVICE))]

    def loss(model, batch):
        noise = torch.randn(8, 64, device=DEVICE)
        return F.cross_entropy(model(batch[0] + noise), batch[1])

    torch.manual_seed(1)
    wanted = torch.randn(3, device=DEVICE)
    torch.manual_seed(1)
    measured = diffq.sensitivity(model, batches, loss)
    assert same_bits(torch.randn(3, device=DEVICE), wanted)
    assert set(measured.tensors) == {"0.weight", "2.weight"}
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
