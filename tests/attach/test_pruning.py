"""Magnitude pruning: zeros that stay zero through training, quantization and files."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import diffq
from diffq.attach.pruning import is_pruned
from diffq.errors import AttachError
from tests.compare import close, same_bits
from tests.holder import weight_quantizers
from tests.models import (
    computed,
    computed_weight,
    evaluate_alike,
    mlp,
    restored,
    seeded,
    step,
)

#: Every way to quantize a pruned model, and what it needs for it.
METHODS = {
    "qat": partial(diffq.QATQuantizer, bits=4),
    "qat-channel": partial(diffq.QATQuantizer, bits=4, per_channel=True),
    "post-training": partial(diffq.QATQuantizer, bits=3, training=False),
    "quant-noise": partial(diffq.QuantNoiseQuantizer, bits=4, p=0.5),
    "quant-noise-fit": partial(diffq.QuantNoiseQuantizer, bits=3, p=0.5, observer="histogram"),
    "quant-noise-channel": partial(diffq.QuantNoiseQuantizer, bits=1, p=0.5, observer="channel"),
    "lsq": partial(diffq.LSQQuantizer, bits=4),
    "diffq": partial(diffq.DiffQuantizer, group_size=8),
    "diffq-whole": partial(diffq.DiffQuantizer, group_size=None),
    "diffq-uniform": partial(diffq.DiffQuantizer, group_size=3, noise="uniform"),
    "diffq-rounding": partial(diffq.DiffQuantizer, group_size=8, noise="rounding"),
    "diffq-fixed": partial(diffq.DiffQuantizer, bits=5),
}


def _pruned(amount=0.5):
    model = seeded(mlp)
    for module in (model[0], model[2]):
        prune.l1_unstructured(module, "weight", amount=amount)
    return diffq.parametrize_pruning(model)


def _zeros(model):
    weights = computed(model)
    return [weights[name] == 0 for name in ("0.weight", "2.weight")]


@pytest.mark.parametrize("kind", METHODS)
def test_zeros_survive(kind, tmp_path):
    """Pruned weights are exactly zero in each training forward, in eval, state and file."""
    model = _pruned()
    masks = [module.parametrizations.weight[0].mask.clone() for module in (model[0], model[2])]
    quantizer = METHODS[kind](model, min_size=0)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer, lr=0.05)
    for _ in range(3):
        assert all(zero[~mask].all() for zero, mask in zip(_zeros(model), masks, strict=True))
        step(model, optimizer, torch.randn(5, 16), quantizer)
    model.eval()
    assert all(zero[~mask].all() for zero, mask in zip(_zeros(model), masks, strict=True))
    diffq.save(quantizer, tmp_path / "model.diffq")
    for plain in (restored(mlp, quantizer), diffq.load(tmp_path / "model.diffq", mlp())):
        for place, mask in zip((0, 2), masks, strict=True):
            assert same_bits(plain[place].weight.detach(), computed(model)[f"{place}.weight"])
            # Bits of zero: minus zero is another number to a file.
            assert (plain[place].weight[~mask].view(torch.int32) == 0).all()


@pytest.mark.parametrize("kind", METHODS)
def test_kept_weights_train(kind):
    """Kept weights move in training, pruned ones get no gradient."""
    model = _pruned()
    quantizer = METHODS[kind](model, min_size=0)
    quantizer.no_optimizer()
    model(torch.randn(5, 16)).square().sum().backward()
    chain = model[0].parametrizations.weight
    mask = chain[0].mask
    assert chain.original.grad[mask].abs().sum() > 0
    assert chain.original.grad[~mask].abs().max() == 0


@pytest.mark.parametrize("codec", ["rans", "zstd", "packed"])
def test_zeros_shrink_the_file(codec, tmp_path):
    """At equal bits, a file of weights that are 90% pruned has less than 60% of the bytes."""
    sizes = []
    for amount in (0.0, 0.9):
        model = nn.Sequential(nn.Linear(256, 256))
        prune.l1_unstructured(model[0], "weight", amount=amount)
        diffq.parametrize_pruning(model)
        quantizer = diffq.QATQuantizer(model, bits=4)
        sizes.append(diffq.save(quantizer, tmp_path / "model.diffq", codec=codec))
        # What is stored before entropy coding is the same: truthful to the bit.
        assert quantizer.true_model_size() == pytest.approx(
            (256 * 256 * 4 + 72 + 256 * 32) / 8 / 2**20
        )
    assert (sizes[1] < 0.6 * sizes[0]) == (codec != "packed")


@pytest.mark.parametrize("kind", ["qat", "qat-channel", "quant-noise", "lsq"])
def test_operators_commute(kind):
    """To quantize pruned weights is to prune the quantized ones (Equation 9 of Quant-Noise)."""
    model = _pruned()
    METHODS[kind](model, min_size=0)
    weight = computed_weight(model.eval(), "0.weight")
    mask = model[0].parametrizations.weight[0].mask
    assert same_bits(torch.where(mask, weight, 0), weight)


def test_quantization_error_stays_small():
    """With a level at zero, no weight moves by more than half a step."""
    model = _pruned(0.3)
    plain = model[0].weight.detach().clone()
    quantizer = diffq.QATQuantizer(model, bits=4, min_size=0)
    step_size = (plain.max() - plain.min()) / 15
    assert (
        computed_weight(model.eval(), "0.weight") - plain
    ).abs().max() <= 0.5 * step_size * 1.001
    assert quantizer.mean_bits() == 4


def test_nothing_else_moves():
    """A tensor that is not pruned keeps its grid: the zero of the others costs it nothing."""
    model, plain = seeded(mlp), seeded(mlp)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    diffq.parametrize_pruning(model)
    for one in (model, plain):
        diffq.QATQuantizer(one, bits=4, min_size=0)
    weights, others = computed(model.eval()), computed(plain.eval())
    assert same_bits(weights["2.weight"], others["2.weight"])
    assert not same_bits(weights["0.weight"], others["0.weight"])


# Masks of torch as parametrizations


def test_parametrize_pruning_keeps_the_parameter():
    """The parameter object, its values and the forward stay as torch pruned them."""
    model = mlp()
    weight = model[0].weight
    x = torch.randn(5, 16)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_structured(model[0], "weight", amount=2, dim=0)
    prune.l1_unstructured(model[2], "bias", amount=2)
    wanted = model(x)
    assert diffq.parametrize_pruning(model) is model
    assert close(model(x), wanted)
    assert model[0].parametrizations.weight.original is weight
    assert is_pruned(model[0], "weight")
    assert is_pruned(model[2], "bias")
    assert not is_pruned(model[2], "weight")


def test_parametrize_pruning_without_pruning():
    """A model without masks stays as it is."""
    model = mlp()
    diffq.parametrize_pruning(model)
    assert type(model[0]) is nn.Linear


def test_zeros_can_be_made_permanent():
    """After detach, torch's remove_parametrizations leaves plain parameters with their zeros."""
    model = _pruned()
    zeros = _zeros(model)
    diffq.QATQuantizer(model, min_size=0).detach()
    for place in (0, 2):
        parametrize.remove_parametrizations(model[place], "weight")
    assert all(same_bits(a, b) for a, b in zip(_zeros(model), zeros, strict=True))
    assert sorted(model.state_dict()) == sorted(mlp().state_dict())


def test_resume():
    """The state dict holds the mask, so that training goes on with the same zeros."""
    model, other = _pruned(0.5), _pruned(0.2)
    for one in (model, other):
        diffq.QATQuantizer(one, min_size=0)
    other.load_state_dict(model.state_dict())
    x = torch.randn(5, 16)
    assert evaluate_alike(other, model, x)
    assert evaluate_alike(copy.deepcopy(model), model, x)


def test_masks_of_torch_are_refused():
    """Attaching to a model that torch's hooks prune is refused with the call that helps."""
    model = mlp()
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    with pytest.raises(AttachError, match=r"weight of 2 is pruned.*parametrize_pruning\(model\)"):
        diffq.DiffQuantizer(model)


def test_bits_of_groups_are_learned():
    """A pruned tensor learns a bitwidth for each group, and keeps its zeros at all of them."""
    model = _pruned()
    mask = model[0].parametrizations.weight[0].mask
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=4)
    logits = weight_quantizers(model)["0.weight"].logits
    logits.copy_(torch.linspace(-4, 4, len(logits)))
    weight = computed_weight(model.eval(), "0.weight")
    assert len(quantizer.bits()["0.weight"].unique()) > 10
    assert (weight[~mask] == 0).all()
    assert (weight[mask] != 0).any()
    assert same_bits(restored(mlp, quantizer)[0].weight.detach(), weight.detach())


def test_parametrized_tensors_are_refused():
    """A pruned tensor that is parametrized too is refused, and nothing has changed."""
    model = mlp()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    parametrizations.weight_norm(model[2], "weight_orig")
    with pytest.raises(AttachError, match="'weight' of ParametrizedLinear has a parametrization"):
        diffq.parametrize_pruning(model)
    assert "weight_orig" in model[0]._parameters
