"""The learned extras in the optimizer, and training without one."""

import copy

import pytest
import torch

import diffq
from tests.compare import same_bits
from tests.models import (
    QUANTIZERS,
    TiedModules,
    computed_weight,
    mlp,
    refused,
    seeded,
    snapshot_of,
    step,
)

LEARNING = ["diffq", "diffq-rounding", "lsq"]


@pytest.mark.parametrize("kind", LEARNING)
def test_training_without_setup(kind):
    """Training without setup_optimizer is refused, through the root and through a submodule."""
    model = mlp()
    QUANTIZERS[kind](model)
    inputs = torch.ones(1, 16)
    for call in (lambda: model(inputs), lambda: model[0](inputs)):
        refused(
            model,
            diffq.OptimizerError,
            lambda _, call=call: call(),
            "setup_optimizer",
            "no_optimizer",
        )
    with torch.no_grad():
        assert model(inputs).shape == (1, 8)
    assert model.eval()(inputs).requires_grad


@pytest.mark.parametrize("kind", LEARNING)
def test_no_optimizer(kind):
    """no_optimizer() says that training without it is meant."""
    model = mlp()
    quantizer = QUANTIZERS[kind](model)
    quantizer.no_optimizer()
    model(torch.ones(1, 16)).sum().backward()
    model[0](torch.ones(1, 16))
    quantizer.no_optimizer()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("kind", ["qat", "qat-channel", "diffq-fixed"])
def test_setup_is_not_needed_where_nothing_is_learned(kind):
    """QAT and fixed bitwidths train without setup_optimizer, and with it add no group."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer = QUANTIZERS[kind](model)
    step(model, optimizer, torch.ones(1, 16), quantizer)
    quantizer.setup_optimizer(optimizer)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [*LEARNING, "qat"])
def test_optimizer_of_another_model(kind):
    """An optimizer that holds nothing of the model is refused and not changed."""
    model = mlp()
    quantizer = QUANTIZERS[kind](model)
    optimizer = torch.optim.Adam(mlp().parameters())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    refused(
        model,
        diffq.OptimizerError,
        lambda _: quantizer.setup_optimizer(optimizer),
        "model.parameters()",
    )
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held


@pytest.mark.parametrize("optimizer", [None, "adam", torch.optim.Adam])
def test_no_optimizer_object(optimizer):
    """What is no optimizer is refused."""
    quantizer = QUANTIZERS["diffq"](mlp())
    with pytest.raises(diffq.OptimizerError, match="optimizer"):
        quantizer.setup_optimizer(optimizer)


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("kind", LEARNING)
def test_setup_gives_the_extras_their_own_group(kind, made):
    """Each extra is in exactly one group, without weight decay, also if the optimizer had it."""
    model = mlp()
    plain = {id(p) for p in model.parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.3)
    quantizer = QUANTIZERS[kind](model)
    if made == "after":
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.3)
    quantizer.setup_optimizer(optimizer, lr=0.7, betas=(0.5, 0.6))
    weights, extras = optimizer.param_groups
    assert {id(p) for p in weights["params"]} == plain
    assert [weights[key] for key in ("lr", "weight_decay", "betas")] == [0.1, 0.3, (0.9, 0.999)]
    assert {id(p) for p in extras["params"]} == {id(p) for p in model.parameters()} - plain
    assert [extras[key] for key in ("lr", "weight_decay", "betas")] == [0.7, 0.0, (0.5, 0.6)]
    assert len(extras["params"]) == len({id(p) for p in extras["params"]})


def test_setup_keeps_other_groups():
    """Groups of the user keep their number, their order and their options, empty ones too."""
    model = mlp()
    groups = [
        {"params": [model[0].weight], "lr": 0.1},
        {"params": [], "lr": 0.2},
        {"params": [model[0].bias, *model[2].parameters()], "lr": 0.3},
    ]
    optimizer = torch.optim.SGD(groups)
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer, lr=0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3, 0.4]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0, 3, 1]


def test_setup_without_weight_decay():
    """An optimizer that knows no weight decay is not given any."""
    model = mlp()
    optimizer = torch.optim.Rprop(model.parameters())
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer, lr=0.1)
    assert "weight_decay" not in optimizer.param_groups[-1]


def _optimizer(model, name, **options):
    return getattr(torch.optim, name)(model.parameters(), 0.01, **options)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_updates_the_extras_in_one_pass(name):
    """On a CPU the extras get Adam's fused kernel; the user's own groups stay as they are."""
    model = mlp()
    optimizer = _optimizer(model, name)
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer)
    assert [group["fused"] for group in optimizer.param_groups] == [None, True]


@pytest.mark.parametrize(
    ("name", "made", "asked"),
    [
        ("AdamW", {"foreach": True}, {}),
        ("AdamW", {"fused": False}, {}),
        ("AdamW", {"differentiable": True}, {}),
        ("AdamW", {}, {"fused": False}),
        ("AdamW", {}, {"foreach": True}),
        ("Adam", {}, {"differentiable": True}),
        ("SGD", {}, {}),
        ("RAdam", {}, {}),
    ],
)
def test_what_the_user_chose_stays(name, made, asked):
    """No kernel is chosen where the user chose one, nor for other optimizers."""
    model = mlp()
    optimizer = _optimizer(model, name, **made)
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer, **asked)
    assert not optimizer.param_groups[-1].get("fused")


def test_one_pass_gives_the_same_numbers():
    """Training with the fused kernel ends where training without it does, but for rounding."""
    ends = []
    for options in ({}, {"fused": False}):
        model = seeded(mlp)
        optimizer = _optimizer(model, "AdamW")
        quantizer = QUANTIZERS["diffq"](model)
        quantizer.setup_optimizer(optimizer, lr=0.1, **options)
        for seed in range(3):
            torch.manual_seed(seed)
            step(model, optimizer, torch.randn(5, model[0].in_features), quantizer)
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("copied", [False, True])
def test_one_pass_is_seen_by_evaluation(copied):
    """In eval mode too, a fused step changes the quantized weights, of copies as well."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer)
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    model.eval()
    with torch.no_grad():
        before = computed_weight(model, "0.weight").clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 16)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        after = computed_weight(model, "0.weight").clone()
        assert not same_bits(before, after)
        model.train().eval()
        assert same_bits(after, computed_weight(model, "0.weight"))


def test_a_late_step_is_seen_by_evaluation():
    """A fused step that comes after the first evaluation changes the next one."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer)
    model(torch.randn(2, 16)).sum().backward()
    model.eval()
    with torch.no_grad():
        before = computed_weight(model, "0.weight").clone()
        optimizer.step()
        after = computed_weight(model, "0.weight").clone()
        assert not same_bits(before, after)
        model.train().eval()
        assert same_bits(after, computed_weight(model, "0.weight"))


def test_setup_with_ties():
    """The extras of tied tensors are in the group once."""
    model = TiedModules()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer)
    (extras,) = optimizer.param_groups[-1]["params"]
    # One for each 4 weights of the embedding that is also the head, the body, and its bias.
    assert extras.numel() == (24 * 16 + 16 * 16 + 16) / 4


def test_partial_optimizer():
    """An optimizer of a part of the model is accepted: fine-tuning trains a part."""
    model = seeded(mlp)
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    before = snapshot_of(model)
    step(model, optimizer, torch.ones(2, 16), quantizer)
    after = snapshot_of(model)
    assert same_bits(before["0.weight"], after["0.weight"])
    assert not same_bits(before["2.weight"], after["2.weight"])
