"""Product quantization: blocks, noise, codebooks, sizes, and what files restore."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import diffq
from diffq.attach.attachment import attachment_of
from diffq.quantizers.product.blocks import layer_kind
from tests.compare import close, same_bits
from tests.holder import Holder, all_bits, bits_of, blank, reloaded, weight_quantizers
from tests.models import (
    MODELS,
    SUMS,
    ConvNet,
    Recurrent,
    TiedModules,
    computed,
    computed_weight,
    evaluate_alike,
    mlp,
    restored,
    seeded,
    step,
)

attach = partial(diffq.ProductQuantizer, min_size=0, block_size=2, codebook_size=4)


class Layers(nn.Module):
    """One layer of each kind, with a forward that uses all of them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 24)
        self.linear = nn.Linear(24, 16)
        self.conv1x1 = nn.Conv2d(16, 8, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, tokens):
        x = self.linear(self.embedding(tokens)).transpose(1, 2)[..., None]
        x = self.depthwise(self.conv(self.conv1x1(x)))
        return self.up(self.grouped(x[..., 0])[..., None])


def one(weight, **options):
    """A quantizer of a single tensor of an nn.Linear, and its weight quantizer."""
    model = nn.Linear(*reversed(weight.shape), bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    quantizer = attach(model, **options)
    return model, quantizer, weight_quantizers(model)["weight"]


def blocks_of(tensor, block_size):
    """The blocks of a tensor, one a row."""
    return tensor.detach().reshape(-1, block_size)


# Blocks


def test_kinds_of_layers():
    """Layers are told apart as the paper does."""
    model = Layers()
    kinds = {name: layer_kind(owner, owner.weight.shape) for name, owner in model.named_children()}
    assert kinds == {**{name: name for name in kinds}, "grouped": "conv", "up": "conv"}
    assert layer_kind(nn.LSTM(4, 4), torch.Size([16, 4])) == "linear"


def test_blocks_of_each_kind():
    """A number goes along inputs, and kernels stay whole; a mapping says it by kind."""
    sizes = {}
    for given in (2, {"linear": 6, "depthwise": 5}):
        model = Layers()
        attach(model, block_size=given)
        sizes[str(given)] = {n: q.group_size for n, q in weight_quantizers(model).items()}
    by_number, by_kind = sizes.values()
    common = {"conv.weight": 9, "grouped.weight": 3, "up.weight": 4}
    along = {"embedding.weight": 2, "linear.weight": 2, "conv1x1.weight": 2}
    assert by_number == {**along, **common, "depthwise.weight": 25}
    along = {"embedding.weight": 8, "linear.weight": 6, "conv1x1.weight": 4}
    assert by_kind == {**along, **common, "depthwise.weight": 5}


def test_overrides_by_pattern():
    """Each setting can be given for tensors by name, the block size exactly as it is said."""
    model = Layers()
    overrides = {
        "conv.weight": {"block_size": 18, "codebook_size": 16, "centroids": "int8"},
        "e*": {"p": 1.0, "noise": "exact", "picked": "clusters", "iterations": 2},
    }
    attach(model, overrides=overrides)
    quantizers = weight_quantizers(model)
    conv, embedding = quantizers["conv.weight"], quantizers["embedding.weight"]
    assert conv.codebook.shape == (16, 18)
    assert conv.settings.centroids == "int8"
    assert (embedding.settings.p, embedding.settings.picked) == (1.0, "clusters")


def test_vectors_stay_as_they_are():
    """Biases and norms have no inputs to cut in blocks: they are stored raw, or as float16."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    attach(model, float16=True)
    quantizers = attachment_of(model).quantizers
    kinds = {q.plan.name: type(q).__name__ for q in quantizers}
    assert list(kinds) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert kinds.pop("0.weight") == "ProductWeight"
    assert set(kinds.values()) == {"HalfQuantizer"}


def test_nothing_to_quantize():
    """On a model without large tensors, everything is a no-op that works."""
    model = mlp()
    quantizer = diffq.ProductQuantizer(model)
    quantizer.refresh()
    assert quantizer.quantize_stage() == quantizer.stages == ()
    assert quantizer.model_size().item() == pytest.approx(quantizer.true_model_size())


# Eval


@pytest.mark.parametrize("centroids", ["float32", "float16", "int8"])
def test_eval_is_the_nearest_stored_codeword(centroids):
    """In eval, each block is the codeword that is nearest among those that are stored."""
    model, _, weight = one(torch.randn(8, 12), centroids=centroids, block_size=3)
    model.eval()
    words = stored_words(weight)
    distances = torch.cdist(blocks_of(model.weight, 3).double(), words.double())
    nearest = words[distances.argmin(1)]
    evaluated = computed_weight(model, "weight")
    assert same_bits(blocks_of(evaluated, 3), nearest)
    assert evaluated.requires_grad


def stored_words(quantized):
    """The codewords of a tensor as they are stored, [K, d]."""
    return quantized._stored(quantized.weight.detach(), quantized.learned).values()


@pytest.mark.parametrize("centroids", ["float32", "float16", "int8"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_state_and_file_restore_what_eval_computes(name, packed, centroids, tmp_path):
    """The state and the file bring back, bit for bit, the weights that eval computed with."""
    make, make_input = MODELS[name]
    model = seeded(make)
    quantizer = attach(model, centroids=centroids, float16=packed)
    step(model, torch.optim.SGD(model.parameters(), 0.1), make_input())
    fresh, loaded = seeded(make, 1), seeded(make, 2)
    diffq.restore_quantized_state(fresh, reloaded(quantizer.get_quantized_state(packed)))
    diffq.save(quantizer, tmp_path / "model.diffq", "packed" if packed else "rans")
    diffq.load(tmp_path / "model.diffq", loaded)
    model.eval()
    evaluated = {name: bits_of(t) for name, t in computed(model).items() if t is not None}
    assert all_bits(fresh) == evaluated
    baked = all_bits(quantizer.detach(quantized=True))
    assert all_bits(fresh) == all_bits(loaded) == baked


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("centroids", ["float32", "float16", "int8"])
def test_other_dtypes(dtype, centroids):
    """Weights of other dtypes keep theirs, and come back as eval computed them."""
    model = Holder({"weight": torch.randn(12, 8).to(dtype)})
    fresh = blank(model)
    quantizer = attach(model, centroids=centroids)
    model.train()
    assert computed_weight(model, "weight").dtype == dtype
    model.eval()
    diffq.restore_quantized_state(fresh, quantizer.get_quantized_state())
    assert bits_of(fresh.weight) == bits_of(computed_weight(model, "weight"))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("noise_scale", [1e-3, 1.0])
def test_many_blocks_agree(threads, noise_scale):
    """Of many blocks, some of them nearly as far from two codewords, all are restored exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = torch.randn(1, 8).repeat(300, 40) + noise_scale * torch.randn(300, 320)
        model, quantizer, _ = one(weight, block_size=8, codebook_size=300, iterations=2)
        model.eval()
        with torch.no_grad():
            evaluated = bits_of(computed_weight(model, "weight"))
        fresh = nn.Linear(320, 300, bias=False)
        diffq.restore_quantized_state(fresh, quantizer.get_quantized_state())
        assert bits_of(fresh.weight) == evaluated
    finally:
        torch.set_num_threads(before)


def test_layouts_in_memory():
    """Channels-last and transposed weights are cut in blocks like any other."""
    plain = nn.Conv2d(4, 6, 3)
    last = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    last.load_state_dict(plain.state_dict())
    values = []
    for model in (plain, last):
        attach(model)
        values.append(computed_weight(model.eval(), "weight"))
    assert same_bits(*values)


# Noise


@pytest.mark.parametrize("noise", ["exact", "proxy", "mean"])
@pytest.mark.parametrize("picked", ["blocks", "clusters"])
def test_noise_of_picked_blocks(noise, picked):
    """Picked blocks become codewords, zeros or means; the others are what they were."""
    torch.manual_seed(0)
    model, _, weight = one(torch.randn(20, 24), noise=noise, picked=picked, p=0.4, block_size=4)
    before = blocks_of(model.weight, 4)
    after = blocks_of(computed_weight(model, "weight"), 4)
    words = stored_words(weight)
    expected = {
        "exact": words[torch.cdist(before, words).argmin(1)],
        "proxy": torch.zeros_like(before),
        "mean": before.mean(0).expand_as(before),
    }[noise]
    changed = (after != before).any(1)
    assert same_bits(after[~changed], before[~changed])
    assert torch.allclose(after[changed], expected[changed])
    if picked == "blocks":
        assert 0.2 < changed.float().mean() < 0.6
    else:
        shares = [changed[weight.indices == k].float().mean() for k in range(4)]
        assert all(share in (0, 1) for share in shares)


def test_share_of_picked_blocks():
    """Blocks are picked with probability p, anew in each forward."""
    model, _, _ = one(torch.randn(100, 100) + 10, p=0.15, block_size=5)
    masks = [(blocks_of(computed_weight(model, "weight"), 5) == 0).all(1) for _ in range(20)]
    share = torch.stack(masks).float().mean()
    assert abs(share - 0.15) < 4 * math.sqrt(0.15 * 0.85 / (20 * 2000))
    assert not same_bits(masks[0], masks[1])


def test_one_sample_for_a_forward():
    """Within a forward of the root, a weight that is read twice has the same noise."""
    model = seeded(MODELS["shared-module"][0])
    attach(model, p=0.5)
    seen = []
    for module in (model.first,):
        module.register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    model(torch.randn(2, 16))
    assert len(seen) == 2
    assert same_bits(*seen)


def test_no_noise_is_plain_training():
    """At p = 0, training is plain training, and draws no random numbers."""
    make, make_input = MODELS["conv"]
    plain, model, inputs = seeded(make), seeded(make), make_input()
    attach(model, p=0)
    state = torch.get_rng_state()
    for network in (plain, model):
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        for _ in range(3):
            step(network, optimizer, inputs)
    assert same_bits(torch.get_rng_state(), state)
    for name, parameter in plain.named_parameters():
        assert close(model.get_parameter(name), parameter, SUMS), name


def test_full_exact_noise_is_what_eval_computes():
    """At p = 1, exact noise trains with the weights of eval."""
    model, _, _ = one(torch.randn(12, 16), noise="exact", p=1)
    noisy = computed_weight(model, "weight")
    assert same_bits(noisy, computed_weight(model.eval(), "weight"))


@pytest.mark.parametrize("noise", ["exact", "proxy", "mean"])
def test_gradients_are_unmodified(noise):
    """Equation 8: every weight gets the gradient as it comes, noise or not."""
    model, _, _ = one(torch.randn(12, 16), noise=noise, p=0.5)
    coefficients = torch.randn(12, 16)
    (computed_weight(model, "weight") * coefficients).sum().backward()
    assert close(model.weight.grad, coefficients)


def test_codebook_has_no_gradient_before_its_stage():
    """Until a stage fixes a tensor, training leaves its codebook alone."""
    model, _, weight = one(torch.randn(12, 16), noise="exact", p=1)
    computed_weight(model, "weight").square().sum().backward()
    assert model.weight.grad.any()
    assert weight.grad is None


# Codebooks


def test_refresh_follows_the_weights():
    """After the weights have moved, refresh lowers the error of eval, as k-means would."""
    model, quantizer, weight = one(torch.randn(40, 32), codebook_size=16, block_size=4)

    def error():
        with torch.no_grad():
            evaluated = computed_weight(model.eval(), "weight")
            return float((evaluated - model.weight).square().sum())

    with torch.no_grad():
        model.weight.add_(2 * torch.randn(40, 32))
    before = error()
    quantizer.refresh()
    after = error()
    assert after < 0.9 * before
    quantizer.refresh()
    assert error() <= after * (1 + 1e-5)
    counts = torch.bincount(weight.indices, minlength=16)
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)


def test_codebooks_depend_on_the_seed_alone():
    """The same seed gives the same codebooks whatever torch's random state, another others."""
    weight = torch.randn(40, 32)
    books = []
    for seed, state in ((0, 1), (0, 2), (7, 1)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        _, _, quantizer = one(weight, codebook_size=16, seed=seed)
        assert torch.get_rng_state().shape == before.shape
        books.append(quantizer.codebook)
    assert same_bits(books[0], books[1])
    assert not same_bits(books[0], books[2])


def test_ties_share_a_codebook():
    """Tied tensors have one codebook, one sample and one stored copy."""
    model = seeded(TiedModules)
    quantizer = attach(model)
    assert len(weight_quantizers(model)) == 2
    with quantizer.computing():
        assert model.embed.weight is model.head.weight
    state = quantizer.get_quantized_state()
    assert state["aliases"] == {"head.weight": "embed.weight"}
    kind = state["tensors"]["embed.weight"]["kind"]
    assert kind == "product"
    fresh = restored(TiedModules, quantizer)
    assert fresh.head.weight is fresh.embed.weight


def test_weights_of_lstm():
    """Input, hidden and projection weights of a recurrent layer are cut along their inputs."""
    model = seeded(partial(Recurrent, proj_size=6))
    quantizer = attach(model)
    shapes = {n: (q.blocks, q.group_size) for n, q in weight_quantizers(model).items()}
    assert shapes["rnn.weight_ih_l0"] == (40 * 6, 2)
    assert shapes["rnn.weight_hh_l0"] == (40 * 3, 2)
    assert shapes["rnn.weight_hr_l0"] == (6 * 5, 2)
    assert "rnn.bias_ih_l0" not in shapes
    assert quantizer.mean_bits() == 1.0


# Sizes


@pytest.mark.parametrize(("centroids", "bits"), [("float32", 32), ("float16", 16), ("int8", 8)])
@pytest.mark.parametrize("codewords", [1, 2, 5, 8, 10])
def test_sizes_are_equation_5(centroids, bits, codewords):
    """Sizes are K d numbers and log2 K bits a block, true to the bit, and agree everywhere."""
    model = seeded(ConvNet)
    quantizer = attach(model, centroids=centroids, codebook_size=codewords)
    raw = 8 + 2 * 8 + 2 * 8 + 4 + 5
    total = 32 * raw + 64
    for shape, block in (((8, 3, 3, 3), 9), ((8, 4, 4, 4), 16), ((5, 4), 2)):
        blocks = math.prod(shape) // block
        total += bits * codewords * block + math.ceil(math.log2(codewords)) * blocks
        total += 40 if centroids == "int8" else 0
    assert quantizer.true_model_size() * 8 * 2**20 == total
    assert quantizer.model_size().item() == pytest.approx(total / 8 / 2**20)
    records = quantizer.snapshot().records.values()
    assert sum(record.stored_bits() for record in records) == total


def test_table_shows_bits_a_weight():
    """The table has a row for each tensor, with its blocks and the bits of its indices."""
    text = str(attach(seeded(mlp), codebook_size=16))
    assert "0.weight" in text
    assert "32x16" in text
    assert "256" in text
    assert "2.00" in text


def test_compressed_size_is_that_of_the_file(tmp_path):
    """compressed_model_size is the size of the file."""
    quantizer = attach(seeded(mlp), codebook_size=16)
    assert quantizer.compressed_model_size() * 2**20 == diffq.save(quantizer, tmp_path / "x")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_model_on_the_meta_device(assign, fixed):
    """A model made on the meta device loads a checkpoint, and computes what its model does."""
    model = seeded(mlp)
    quantizer = attach(model)
    if fixed:
        quantizer.quantize_stage()
    with torch.device("meta"):
        other = mlp()
    attach(other)
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    assert evaluate_alike(other, model, torch.randn(3, 16))
