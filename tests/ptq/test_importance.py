"""Bitwidths by what errors cost: sources, their order, and the errors that they minimise."""

import pytest
import torch
from torch import nn

import diffq
from diffq.ptq.importance import importance_of
from diffq.ptq.sensitivity import Sensitivity, TensorSensitivity
from diffq.ptq.state import Settings, StatePlan
from tests.compare import same_bits

SIZE = 0.012


class Net(nn.Module):
    """Two layers of one shape, a norm, and a part that no loss reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.second = nn.Linear(64, 64)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


def trained(make=torch.optim.Adam, **options):
    """A model after a step, and its optimizer."""
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters(), 1e-3, **options)
    model(torch.randn(32, 64)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def bits_of(model, sensitivity, size=SIZE, **options):
    """Name to mean bitwidth of the quantized tensors."""
    quantized = diffq.quantize_checkpoint(
        model.state_dict(), size, sensitivity=sensitivity, **options
    )
    return {
        name: float(record.bits.mean())
        for name, record in quantized.model.records.items()
        if hasattr(record, "bits")
    }


def chosen(source, model):
    """The importance of each tensor."""
    return importance_of(source, StatePlan(model.state_dict(), Settings()))


def moments(model, optimizer, key="exp_avg_sq"):
    """Name to second moments, from the optimizer's own state."""
    return {name: optimizer.state[p][key] for name, p in model.named_parameters()}


def alike(one, other):
    """Whether two importances are equal, bit for bit."""
    return one.keys() == other.keys() and all(same_bits(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (torch.optim.Adam, "exp_avg_sq"),
        (torch.optim.AdamW, "exp_avg_sq"),
        (torch.optim.NAdam, "exp_avg_sq"),
        (torch.optim.RMSprop, "square_avg"),
    ],
)
def test_an_optimizer_gives_its_second_moments(make, key):
    """An optimizer, its state dict and a dict by names give the same, of each weight."""
    model, optimizer = trained(make)
    by_name = chosen(moments(model, optimizer, key), model)
    assert by_name.keys() == {"first.weight", "second.weight"}
    assert alike(chosen(optimizer, model), by_name)
    assert alike(chosen(optimizer.state_dict(), model), by_name)


def test_importance_is_proportional_and_1_on_average():
    """Second moments are divided by their mean, and a hundredth of it is added to all."""
    model, optimizer = trained()
    found = chosen(optimizer, model)
    wanted = moments(model, optimizer)
    together = torch.cat([wanted[name].flatten() for name in found]).double()
    for name, values in found.items():
        share = wanted[name].double() / together.mean()
        torch.testing.assert_close(values.double(), (share + 0.01) / 1.01, rtol=1e-6, atol=0)


def test_groups_of_an_optimizer_may_have_any_order():
    """The optimizer itself finds its parameters by memory, whatever their groups."""
    model, _ = trained()
    parts = [[model.second.weight], [model.first.weight, model.first.bias, model.second.bias]]
    optimizer = torch.optim.Adam([{"params": part} for part in parts], 1e-3)
    model(torch.randn(32, 64)).square().sum().backward()
    optimizer.step()
    found = chosen(optimizer, model)
    mean = torch.cat([optimizer.state[p]["exp_avg_sq"] for p in (parts[0][0], parts[1][0])]).mean()
    for name, layer in (("first.weight", model.first), ("second.weight", model.second)):
        wanted = optimizer.state[layer.weight]["exp_avg_sq"] / mean + 0.01
        torch.testing.assert_close(found[name], wanted / 1.01)


def test_a_saved_optimizer_with_names_may_have_any_order():
    """The state dict of an optimizer made of named parameters is matched by its names."""
    model, _ = trained()
    named = dict(model.named_parameters())
    groups = [{"params": [(name, named[name])]} for name in ("second.weight", "first.weight")]
    optimizer = torch.optim.Adam(groups, 1e-3)
    model(torch.randn(32, 64)).square().sum().backward()
    optimizer.step()
    assert alike(chosen(optimizer.state_dict(), model), chosen(optimizer, model))


def test_a_saved_optimizer_in_an_order_of_its_own_is_refused():
    """Without names, several groups could be any tensors of one shape: never guessed."""
    model, _ = trained()
    groups = [{"params": [model.second.weight]}, {"params": [model.first.weight]}]
    optimizer = torch.optim.Adam(groups, 1e-3)
    model(torch.randn(32, 64)).square().sum().backward()
    optimizer.step()
    with pytest.raises(diffq.ConfigError, match="named_parameters"):
        chosen(optimizer.state_dict(), model)


def test_a_saved_optimizer_of_another_model_is_refused():
    """Other shapes in the same number are found out."""
    _, optimizer = trained()
    other = Net()
    other.second = nn.Linear(64, 65)
    with pytest.raises(diffq.ConfigError, match="in its order"):
        chosen(optimizer.state_dict(), other)


def test_copies_of_the_parameters_are_refused():
    """An optimizer of another model is found out, though names and shapes agree."""
    _, optimizer = trained()
    with pytest.raises(diffq.ConfigError, match="themselves"):
        chosen(optimizer, Net())


def test_tied_tensors_are_known_by_any_name():
    """A dict may name a tied tensor by either name."""
    model = Net()
    model.second.weight = model.first.weight
    for name in ("first.weight", "second.weight"):
        assert chosen({name: 3.0}, model)["first.weight"].item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "got int"),
        ({"first.weight": 1.0}, "got none for second.weight"),
        ({"first.weight": torch.ones(3, 3), "second.weight": 1.0}, r"\[64, 64\].*\[3, 3\]"),
        ({"first.weight": -1.0, "second.weight": 1.0}, "first.weight does not"),
        ({"first.weight": float("nan"), "second.weight": 1.0}, "first.weight does not"),
        ({"first.weight": 0.0, "second.weight": 0}, "0 everywhere"),
    ],
)
def test_sources_that_break_a_rule(source, message):
    """Each is a ConfigError that says what is missing or wrong."""
    with pytest.raises(diffq.ConfigError, match=message):
        diffq.quantize_checkpoint(Net().state_dict(), SIZE, sensitivity=source)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_optimizers_without_second_moments(make):
    """SGD, and an Adam that has not taken a step, are refused."""
    model = Net()
    optimizer = make(model.parameters(), 1e-3)
    for source in (optimizer, optimizer.state_dict()):
        with pytest.raises(diffq.ConfigError, match="exp_avg_sq"):
            diffq.quantize_checkpoint(model.state_dict(), SIZE, sensitivity=source)


def test_measured_losses_give_one_number_a_tensor():
    """The change of the loss by squared error, over all bitwidths, whatever its sign."""
    model = Net()

    def measured(losses, errors):
        return {"losses": losses, "errors": errors, "shape": (64, 64)}

    source = Sensitivity(
        1.0,
        (2, 4),
        {
            "a": TensorSensitivity(
                names=("first.weight",), **measured({2: 7.0, 4: 0.5}, {2: 4.0, 4: 1.0})
            ),
            "b": TensorSensitivity(
                names=("second.weight",), **measured({2: float("inf"), 4: 1.1}, {2: 4.0, 4: 1.0})
            ),
        },
    )
    found = chosen(source, model)
    assert found["first.weight"].item() == pytest.approx((1.3 / 0.7 + 0.01) / 1.01)
    assert found["second.weight"].item() == pytest.approx((0.1 / 0.7 + 0.01) / 1.01)


def test_a_tensor_without_a_finite_loss_is_refused():
    """If a tensor's loss is infinite at every bitwidth, there is nothing to choose by."""
    losses = TensorSensitivity(("first.weight",), (64, 64), {2: float("inf")}, {2: 1.0})
    source = Sensitivity(1.0, (2,), {"first.weight": losses})
    with pytest.raises(diffq.ConfigError, match=r"finite loss.*first\.weight"):
        chosen(source, Net())


def test_costly_tensors_get_more_bits():
    """Of two tensors of one scale, the one whose errors cost 10,000 times as much gets more."""
    bits = bits_of(Net(), {"first.weight": 1e4, "second.weight": 1.0})
    assert bits["first.weight"] > bits["second.weight"] + 2
    bits = bits_of(Net(), {"first.weight": 1.0, "second.weight": 1e4})
    assert bits["second.weight"] > bits["first.weight"] + 2


def test_costly_groups_get_more_bits():
    """Within a tensor, groups of costly weights get more bits than the others."""
    cost = torch.ones(64, 64)
    cost[:32] = 1e4
    quantized = diffq.quantize_checkpoint(
        Net().state_dict(), SIZE, sensitivity={"first.weight": cost, "second.weight": 1.0}
    )
    bits = quantized.model.records["first.weight"].bits
    assert bits[:32].mean() > bits[32:].mean() + 2


@pytest.mark.parametrize("group_size", [0, 7, 64])
def test_the_weighted_error_is_the_smaller_one(group_size):
    """At one size, bitwidths by cost have less of the weighted error than those without."""
    model, optimizer = trained()
    cost = moments(model, optimizer)
    state = model.state_dict()

    def weighted(sensitivity):
        values = diffq.quantize_checkpoint(
            state, SIZE, sensitivity=sensitivity, group_size=group_size
        ).state_dict()
        return sum(
            float((cost[name] * (values[name] - state[name]).square()).sum())
            for name in ("first.weight", "second.weight")
        )

    assert weighted(cost) <= weighted(None)


@pytest.mark.parametrize("per_channel", [False, True])
def test_equal_costs_change_nothing(per_channel):
    """One number for all tensors gives the bitwidths of the squared error, or nearly so."""
    torch.manual_seed(0)
    model = Net()
    same = {"first.weight": 5.0, "second.weight": torch.full((64, 64), 5.0)}
    plain = bits_of(model, None, per_channel=per_channel)
    for name, bits in bits_of(model, same, per_channel=per_channel).items():
        assert bits == pytest.approx(plain[name], abs=0.1)
