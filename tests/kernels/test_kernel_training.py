"""Training with kernels: quantizers on models, against the same with torch's operations."""

import copy
import io

import pytest
import torch
from torch import nn

import diffq
from diffq.kernels.launched import Launched
from diffq.quantizers import batches
from tests.compare import same_bits
from tests.kernels import backend

DEVICE = backend.device()

from diffq.kernels.scaled import Scaled  # noqa: E402

MADE = {
    "gaussian": lambda model: diffq.DiffQuantizer(model, min_size=0),
    "one bitwidth": lambda model: diffq.DiffQuantizer(model, min_size=0, group_size=None),
    "uniform": lambda model: diffq.DiffQuantizer(model, min_size=0, noise="uniform"),
    "rounding": lambda model: diffq.DiffQuantizer(model, min_size=0, noise="rounding"),
    "fixed": lambda model: diffq.DiffQuantizer(model, min_size=0, bits=4),
    "qat": lambda model: diffq.QATQuantizer(model, min_size=0, bits=4),
    "quant-noise": lambda model: diffq.QuantNoiseQuantizer(model, min_size=0, bits=4, p=0.5),
    "lsq": lambda model: diffq.LSQQuantizer(model, min_size=0, bits=4),
}
LEARNED = ["gaussian", "rounding", "lsq"]


class Net(nn.Module):
    """Two layers and an embedding with a padding row, which stays zero."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 8, padding_idx=0)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.second(self.first(self.embed(x)).tanh())


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Kernels run, in the interpreter too."""
    monkeypatch.setattr(batches, "available", lambda device: True)


def _attached(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = Net().to(DEVICE, dtype)
    quantizer = MADE[kind](model)
    quantizer.no_optimizer()
    return model, quantizer


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MADE)
def test_a_step_is_that_of_torch_operations(kind):
    """With the values that kernels drew, gradients are those of torch's own nodes."""
    model, quantizer = _attached(kind)
    with quantizer.computing():
        quantizers = quantizer._attachment.quantizers
        forward = quantizer._attachment.forwards.current()
        samples = [forward.drawn[q.index] for q in quantizers]
        if kind not in ("qat", "quant-noise"):
            kernels = Scaled if kind == "lsq" else Launched
            assert all(isinstance(sample.drawn, kernels) for sample in samples)
        x = torch.arange(6, device=DEVICE)
        found = _gradients(model, model(x).sin().sum() + quantizer.model_size())
        learned = quantizer._attachment.learned
        for sample, q in zip(samples, quantizers, strict=True):
            alone = q.connect(sample.weight, sample, learned.part(q.index))
            assert same_bits(alone.detach(), sample.connected.detach())
            sample.connected = alone
        expected = _gradients(model, model(x).sin().sum() + quantizer.model_size())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["rounding", "qat", "lsq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_evaluation_and_the_file(kind, dtype):
    """What is trained with is what eval and a file have, bit for bit, zeros among them."""
    model, quantizer = _attached(kind, dtype)
    with quantizer.computing():
        trained = {name: value.detach() for name, value in _values(model).items()}
    model.eval()
    with quantizer.computing(), torch.no_grad():
        evaluated = _values(model)
    file = io.BytesIO()
    diffq.save(quantizer, file)
    file.seek(0)
    plain = diffq.load(file, Net().to(dtype))
    assert not trained["embed.weight"][0].any()
    for name, value in trained.items():
        # Training rounds to zero from both sides.
        assert same_bits(value + 0, evaluated[name] + 0), name
        assert same_bits(value.cpu() + 0, plain.state_dict()[name] + 0), name


def _values(model):
    return {
        "embed.weight": model.embed.weight,
        "first.weight": model.first.weight,
        "second.weight": model.second.weight,
        "second.bias": model.second.bias,
    }


@pytest.mark.parametrize("kind", LEARNED)
def test_second_derivatives(kind):
    """With create_graph=True, gradients have gradients: torch's operations take over."""
    model, quantizer = _attached(kind)
    weight = model.first.weight
    with quantizer.computing():
        loss = model.first.weight.pow(3).sum()
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    grad.square().sum().backward()
    assert weight.grad.any()
    assert torch.isfinite(model._diffq.learned.grad).all()


@pytest.mark.parametrize("kind", MADE)
def test_training_learns(kind):
    """Some steps of Adam lower the loss, and checkpointed layers read the same weights."""
    torch.manual_seed(0)
    model = Net().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    quantizer = MADE[kind](model)
    quantizer.setup_optimizer(optimizer)
    x, y = torch.arange(6, device=DEVICE), torch.arange(6, device=DEVICE) % 3
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        (loss + 0.1 * quantizer.model_size()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["gaussian", "lsq"])
def test_backwards_in_parts(kind):
    """Losses of some tensors have backwards of their own, without retain_graph."""
    model, quantizer = _attached(kind)
    with quantizer.computing():
        losses = [model.first.weight.sin().sum(), model.second.weight.sin().sum()]
    for loss in losses:
        loss.backward()
    assert model.embed.weight.grad is None
    assert model.first.weight.grad.any()
    assert model.second.weight.grad.any()


def test_a_copy_trains_on():
    """A deep copy has kernels of its own."""
    model, _ = _attached("gaussian")
    x = torch.arange(6, device=DEVICE)
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(x).sum().backward()
    assert twin.first.weight.grad.any()
