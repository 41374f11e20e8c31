"""Codewords as they are stored, and their gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffq.quantizers.product.centroids import pass_to_centroids, store_codebook
from tests.compare import same_bits


@st.composite
def codebooks(draw):
    """Codebooks of any size and scale, with values on one side of zero or both."""
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-20, 20))
    return draw(st.sampled_from([values, values.abs(), -values.abs(), torch.zeros(shape)]))


@given(codebooks())
def test_int8_is_equation_2(codebook):
    """int8 codewords are (round(c / s) + z - z) * s with s = (max - min) / 255, zero included."""
    stored = store_codebook(codebook, "int8")
    low, high = min(codebook.min().item(), 0.0), max(codebook.max().item(), 0.0)
    scale = (high - low) / 255
    assert stored.scale.item() == pytest.approx(scale, rel=1e-6)
    values = stored.values().double()
    assert (values - codebook.double()).abs().max() <= 0.501 * scale + 1e-6 * max(high, -low)
    whole = values / (scale or 1)
    assert torch.allclose(whole, whole.round(), atol=1e-3)


@given(codebooks())
def test_int8_keeps_zero(codebook):
    """Zero, as of pruned blocks, is stored exactly, whatever the other values are."""
    codebook[0] = 0
    assert not store_codebook(codebook, "int8").values()[0].any()


@pytest.mark.parametrize("centroids", ["float32", "float16", "int8"])
def test_record_decodes_to_the_same_bits(centroids):
    """NumPy decodes a record to the values that torch computes with."""
    codebook = torch.randn(30, 6)
    stored = store_codebook(codebook, centroids)
    indices = torch.arange(30)
    record = stored.record(torch.zeros(30, 6), indices)
    assert record.stored_dtype == {"int8": "uint8"}.get(centroids, centroids)
    assert record.values().tobytes() == stored.values().numpy().tobytes()


def test_float32_is_exact():
    """float32 codewords are stored as they are."""
    codebook = torch.randn(5, 3)
    assert same_bits(store_codebook(codebook, "float32").values(), codebook)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_the_mean_of_the_members(dtype):
    """Equation 4: the mean of the gradients of a codeword's blocks, zero where it has none."""
    indices = torch.tensor([0, 2, 0, 0])
    codebook = torch.randn(3, 2, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 4, dtype=dtype, requires_grad=True)
    counts = torch.tensor([3, 1, 1])
    value = codebook.detach()[indices].view(2, 4)
    gradient = torch.randn(2, 4, dtype=dtype)
    pass_to_centroids(weight, value, codebook, indices, counts).backward(gradient)
    blocks = gradient.view(4, 2)
    expected = torch.stack([blocks[[0, 2, 3]].mean(0), torch.zeros(2, dtype=dtype), blocks[1]])
    assert torch.allclose(codebook.grad, expected)
    assert weight.grad is None


@given(st.integers(0, 2**32))
def test_gradient_against_finite_differences(seed):
    """Times its number of members, a centroid's gradient is the slope of the loss."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(4, (12,), generator=generator)
    counts = torch.bincount(indices, minlength=4).clamp(min=1)
    codebook = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    inputs = torch.randn(9, 5, dtype=torch.float64, generator=generator)

    def loss(words, trained=None):
        value = words.detach()[indices].view(4, 9)
        made = value if trained is None else pass_to_centroids(value, value, words, indices, counts)
        return torch.tanh(made @ inputs).square().sum()

    words = codebook.clone().requires_grad_()
    loss(words, trained=True).backward()
    for place in ((0, 0), (3, 2), (1, 1)):
        moved = torch.zeros_like(codebook)
        moved[place] = 1e-6
        slope = (loss(codebook + moved) - loss(codebook - moved)) / 2e-6
        assert words.grad[place] * counts[place[0]] == pytest.approx(slope.item(), abs=1e-6)


def test_gradient_can_be_differentiated():
    """Gradients of gradients reach the centroids."""
    codebook = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    indices, counts = torch.tensor([0, 2, 0, 1]), torch.tensor([2, 1, 1])
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = codebook.detach()[indices].view(2, 4)
    made = pass_to_centroids(value, value, codebook, indices, counts)
    (first,) = torch.autograd.grad((made * scale).square().sum(), codebook, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), scale)
    assert torch.isfinite(second)
    assert second != 0
