"""Product quantization: blocks of zeros stay exactly zero, and have a codeword of their own."""

from functools import partial

import pytest
import torch
from torch import nn

import diffq
from diffq.numerics.kmeans import kmeans, kmeans_with_zeros
from tests.compare import same_bits
from tests.holder import weight_quantizers
from tests.models import computed_weight, restored
from tests.processors import repeatable

attach = partial(diffq.ProductQuantizer, min_size=0, block_size=4, codebook_size=8)
make = partial(nn.Linear, 16, 12, bias=False)
ROWS = [0, 5, 11]


def pruned(rows=ROWS):
    """A layer of which some rows are zero."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        model.weight[rows] = 0
    return model


def read(model):
    """What the layer computes with in its mode."""
    return computed_weight(model, "weight")


@pytest.mark.parametrize("centroids", ["float32", "float16", "int8"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_outlast_centroid_training(centroids, optimizer, tmp_path):
    """Momentum and weight decay leave a fixed tensor's zero blocks at zero, and train the rest."""
    model = pruned()
    quantizer = attach(model, centroids=centroids)
    opt = {
        "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        "adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    }[optimizer](model.parameters())
    quantizer.setup_optimizer(opt, lr=0.1, weight_decay=0.1)
    quantizer.quantize_stage()
    before = read(model).detach().clone()
    for _ in range(4):
        assert (read(model)[ROWS] == 0).all()
        opt.zero_grad()
        model(torch.randn(3, 16)).sum().backward()
        opt.step()
    assert (read(model)[ROWS] == 0).all()
    assert (read(model)[1] != before[1]).any()
    model.eval()
    diffq.save(quantizer, tmp_path / "model.diffq")
    for plain in (restored(make, quantizer), diffq.load(tmp_path / "model.diffq", make())):
        assert same_bits(plain.weight, read(model))
        assert (plain.weight[ROWS] == 0).all()


def test_fixed_zeros_outlast_a_resume():
    """A fixed tensor's zero codeword is not trained after its state was loaded elsewhere."""
    model, resumed = pruned(), pruned([])
    attach(model).quantize_stage()
    quantizer = attach(resumed)
    opt = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9)
    quantizer.setup_optimizer(opt, lr=0.1)
    resumed.load_state_dict(model.state_dict())
    for _ in range(3):
        resumed(torch.randn(3, 16)).sum().backward()
        opt.step()
        assert (read(resumed)[ROWS] == 0).all()


@pytest.mark.parametrize("picked", ["blocks", "clusters"])
@pytest.mark.parametrize("noise", ["exact", "proxy", "mean"])
def test_noise_leaves_zeros_alone(noise, picked):
    """With noise on all blocks, those of zeros stay zero, and the others change."""
    model = pruned()
    attach(model, noise=noise, picked=picked, p=1)
    noisy = read(model)
    assert (noisy[ROWS] == 0).all()
    assert (noisy != model.weight).any()


def test_zeros_that_come_after_the_codebook():
    """Where blocks became zero since, the codeword nearest to zero is zero in eval and file."""
    model = pruned([])
    quantizer = attach(model)
    model.eval()
    weight_quantizer = weight_quantizers(model)["weight"]
    with torch.no_grad():
        model.weight[2] = 0
    evaluated = read(model).detach()
    assert (evaluated[2] == 0).all()
    assert same_bits(restored(make, quantizer).weight, evaluated)
    learned = weight_quantizer.codebook.abs().amax(1)
    used = evaluated.reshape(-1, 4).unique(dim=0)
    kept = (used[:, None] == weight_quantizer.codebook.half().float()).all(2).any(1)
    assert (~kept).sum() == 1
    assert (learned > 0).all()
    quantizer.refresh()
    assert (weight_quantizer.codebook == 0).all(1).sum() == 1
    assert (read(model)[2] == 0).all()


def test_zeros_that_go():
    """A refresh after the zeros have gone uses all codewords for the other blocks."""
    model = pruned()
    quantizer = attach(model)
    weight_quantizer = weight_quantizers(model)["weight"]
    assert (weight_quantizer.codebook == 0).all(1).sum() == 1
    with torch.no_grad():
        model.weight.normal_()
    quantizer.refresh()
    assert not (weight_quantizer.codebook == 0).all(1).any()


def test_tensors_of_zeros():
    """A tensor of zeros alone has a codebook of zeros, with one codeword or several."""
    for size in (1, 8):
        model = pruned(list(range(12)))
        quantizer = attach(model, codebook_size=size)
        assert (read(model) == 0).all()
        assert (read(model.eval()) == 0).all()
        assert (restored(make, quantizer).weight == 0).all()


def test_fewer_other_blocks_than_codewords():
    """Where fewer blocks than codewords are not zero, all of them are stored exactly."""
    model = pruned(list(range(1, 12)))
    quantizer = attach(model, codebook_size=40, centroids="float32")
    model.eval()
    assert torch.allclose(read(model), model.weight, rtol=1e-6, atol=1e-7)
    assert (read(model)[1:] == 0).all()
    quantizer.refresh()
    assert (read(model)[1:] == 0).all()


def test_one_codeword_cannot_keep_zeros():
    """One codeword for zeros and others is refused by name, at attaching and in eval."""
    message = r"weight has other blocks too.*overrides=\{'weight': \{'codebook_size': 2\}\}"
    model = pruned()
    with pytest.raises(diffq.ConfigError, match=message):
        attach(model, codebook_size=1)
    assert type(model) is nn.Linear
    attach(model, codebook_size=2)
    assert (read(model.eval())[ROWS] == 0).all()
    other = pruned([])
    quantizer = attach(other, codebook_size=1)
    with torch.no_grad():
        other.weight[2] = 0
    with pytest.raises(diffq.ConfigError, match=message):
        read(other.eval())
    with pytest.raises(diffq.ConfigError, match=message):
        quantizer.snapshot()


def test_single_zeros_are_approximated():
    """A zero in a block of other weights is stored like them, as its codeword says."""
    model = pruned([])
    with torch.no_grad():
        model.weight[:, 0] = 0
    attach(model)
    assert (read(model.eval())[:, 0] != 0).any()


@repeatable()
def test_kmeans_without_zeros_is_kmeans():
    """Blocks of zeros have the first codeword, and the others what k-means finds for them."""
    blocks = torch.randn(50, 3)
    seeds = [torch.Generator().manual_seed(0) for _ in range(4)]
    one, two = (
        kmeans(blocks, 7, 5, seeds[0]),
        kmeans_with_zeros(blocks, 7, iterations=5, generator=seeds[1]),
    )
    assert same_bits(one.codebook, two.codebook)
    assert same_bits(one.indices, two.indices)
    padded = torch.cat([torch.zeros(3, 3), blocks, torch.zeros(2, 3)])
    three = kmeans_with_zeros(padded, 8, iterations=5, generator=seeds[2])
    assert same_bits(three.codebook, torch.cat([torch.zeros(1, 3), one.codebook]))
    assert same_bits(three.indices[3:-2], one.indices + 1)
    assert (three.indices[:3] == 0).all()
    assert (three.indices[-2:] == 0).all()
    again = kmeans_with_zeros(padded, 8, three.codebook, iterations=5, generator=seeds[3])
    # Up to the rounding of the sums.
    assert again.errors[-1] <= three.errors[-1] * (1 + 1e-6)
    assert (again.codebook[0] == 0).all()
