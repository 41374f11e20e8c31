"""Models in which nothing is quantized: all calls work, and a warning says so."""

import warnings

import pytest
import torch
from torch import nn

import diffq
from tests.compare import same_bits
from tests.models import computed, mlp, restored, seeded, snapshot_of, step

KINDS = {
    "diffq": diffq.DiffQuantizer,
    "qat": diffq.QATQuantizer,
    "lsq": diffq.LSQQuantizer,
    "quant-noise": diffq.QuantNoiseQuantizer,
    "product": diffq.ProductQuantizer,
    "uniform": diffq.UniformQuantizer,
}


class _Whole(nn.Module):
    """Numbers that are not quantized, for they are whole."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.arange(9), requires_grad=False)


class _Vectors(nn.Module):
    """Parameters of one dimension."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5000))


def _attached(attach, model, **options):
    """The quantizer, and the message of the one warning, which is of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantizer = attach(model, **options)
    (warning,) = (w for w in caught if w.category is diffq.DiffqWarning)
    assert warning.filename == __file__
    return quantizer, str(warning.message)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_small_tensors(kind):
    """The warning gives the largest tensor, its size, the limit and the remedy."""
    _, message = _attached(KINDS[kind], mlp())
    for word in ("Nothing is quantized", "0.weight", "0.001953 MB", "min_size=0.01", "min_size=0 "):
        assert word in message


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_that_leave_nothing(kind):
    """Where patterns leave every tensor out, the warning says so."""
    _, message = _attached(KINDS[kind], nn.Linear(64, 64), exclude=["*"])
    assert "include and exclude" in message
    assert "weight, takes 0.01562 MB" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [nn.Identity, lambda: nn.BatchNorm1d(3, affine=False), _Whole])
def test_a_model_without_weights(kind, make):
    """So it does for models that have no weights at all."""
    _, message = _attached(KINDS[kind], make(), min_size=0)
    assert "no floating-point parameter" in message


def test_a_model_without_matrices():
    """Codebooks need matrices."""
    _, message = _attached(diffq.ProductQuantizer, _Vectors())
    assert "2 or more dimensions" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("float16", [False, True])
def test_everything_works(kind, float16, tmp_path):
    """Training, sizes, tables, states and files are those of the plain model."""
    model = seeded(mlp)
    quantizer, _ = _attached(KINDS[kind], model, float16=float16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, torch.ones(2, 16), quantizer)
    assert len(optimizer.param_groups) == 1
    size = quantizer.model_size()
    values = sum(p.numel() for p in model.parameters())
    assert size.item() == pytest.approx(values * (2 if float16 else 4) / 2**20)
    assert quantizer.true_model_size() == pytest.approx(size.item())
    assert quantizer.mean_bits() != quantizer.mean_bits()
    assert quantizer.bits() == {}
    assert "4 without levels" in repr(quantizer)
    diffq.save(quantizer, tmp_path / "model.diffq")
    loaded = diffq.load(tmp_path / "model.diffq", mlp())
    expected = restored(mlp, quantizer)
    assert same_bits(snapshot_of(loaded), snapshot_of(expected))
    assert float16 or same_bits(computed(expected), computed(model))
    quantizer.detach()


def test_no_warning_where_something_is_quantized():
    """One quantized tensor is enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffq.DiffQuantizer(mlp(), min_size=0, exclude=["*.bias", "2.weight"])
        diffq.ActivationQuantizer(mlp(), exclude=["2"])


def test_no_activation():
    """An activation quantizer that finds no layer, or is left none, says so too."""
    _, message = _attached(diffq.ActivationQuantizer, nn.ReLU())
    assert "no linear or convolutional layer" in message
    _, message = _attached(diffq.ActivationQuantizer, mlp(), exclude=["*"])
    assert "Change the patterns" in message
