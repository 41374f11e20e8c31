"""Optimizers of many kinds, and what happens to one that cannot train what is learned."""

import copy

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import diffq
from diffq.errors import ConfigError
from tests.compare import same_bits
from tests.models import QUANTIZERS, mlp, seeded, snapshot_of, step

INPUTS = torch.ones(2, 16)

#: Every scheduler of torch that marks its optimizer, made in the ways that differ.
SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 1, 0.9),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [1], 0.9),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 10),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    "swa": lambda o: swa_utils.SWALR(o, 1e-2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def _sgd(parameters, **options):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, **options)


def _content(optimizer):
    """All that an error must leave: groups as objects, what they hold, state and defaults."""
    groups = [
        (id(group), {k: [id(p) for p in v] if k == "params" else v for k, v in group.items()})
        for group in optimizer.param_groups
    ]
    state = {id(parameter): id(value) for parameter, value in optimizer.state.items()}
    return copy.deepcopy((groups, state, optimizer.defaults))


def _refused(error, quantizer, optimizer, *words, **options):
    """Checks that `setup_optimizer` raises the error with all words, and changes nothing."""
    before = _content(optimizer)
    with pytest.raises(error) as caught:
        quantizer.setup_optimizer(optimizer, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert _content(optimizer) == before
    return caught.value


def _weights(model):
    learned = {id(p) for p in diffq.quantizer_of(model).learned_parameters()}
    return [p for p in model.parameters() if id(p) not in learned]


# Names


@pytest.mark.parametrize("made", ["before", "after"])
def test_an_optimizer_of_named_parameters(made):
    """Each group keeps one name for each parameter; learned ones have those of the state dict."""
    model = mlp()
    if made == "before":
        optimizer = torch.optim.AdamW(model.named_parameters(), 0.1)
    plain = {id(p): name for name, p in model.named_parameters()}
    quantizer = QUANTIZERS["diffq"](model)
    if made == "after":
        optimizer = torch.optim.AdamW(model.named_parameters(), 0.1)
    quantizer.setup_optimizer(optimizer, lr=0.2)
    names = {id(p): name for name, p in model.named_parameters()}
    expected = [plain if made == "before" else names, names]
    for group, right in zip(optimizer.param_groups, expected, strict=True):
        assert group["param_names"] == [right[id(p)] for p in group["params"]]
    step(model, optimizer, INPUTS, quantizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(optimizer.param_groups[1]["param_names"]) <= set(model.state_dict())


def test_named_parameters_in_several_groups():
    """Names stay with their parameters in every group, also where another optimizer takes over."""
    model = mlp()
    quantizer = QUANTIZERS["diffq"](model)
    parameters = list(model.named_parameters())
    first, second = (
        _sgd([{"params": parameters[::2]}, {"params": parameters[1::2]}]) for _ in range(2)
    )
    names = {id(p): name for name, p in parameters}
    for optimizer in (first, second):
        quantizer.setup_optimizer(optimizer)
    for group in (*first.param_groups, *second.param_groups):
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert first.param_groups[-1]["params"] == []
    assert len(second.param_groups[-1]["params"]) == 1


# Optimizers that cannot train what is learned


@pytest.mark.parametrize("made", ["before", "after"])
def test_lbfgs_takes_one_group(made):
    """LBFGS is refused at once, not at its first step."""
    model = mlp()
    if made == "before":
        optimizer = torch.optim.LBFGS(model.parameters())
    quantizer = QUANTIZERS["diffq"](model)
    if made == "after":
        optimizer = torch.optim.LBFGS(model.parameters())
    _refused(diffq.OptimizerError, quantizer, optimizer, "LBFGS", "learned_parameters()")


def test_sparse_adam_takes_sparse_gradients():
    """SparseAdam cannot use the gradients of what is learned."""
    model = mlp()
    optimizer = torch.optim.SparseAdam(list(model.parameters()))
    quantizer = QUANTIZERS["lsq"](model)
    _refused(diffq.OptimizerError, quantizer, optimizer, "SparseAdam", "learned_parameters()")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_takes_matrices():
    """Muon is refused for bitwidths and scales."""
    model = mlp()
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2])
    quantizer = QUANTIZERS["diffq"](model)
    _refused(diffq.OptimizerError, quantizer, optimizer, "Muon", "learned_parameters()")


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_any_optimizer_is_fine_where_nothing_is_learned(name):
    """A quantizer that learns nothing takes them all."""
    model = mlp()
    optimizer = getattr(torch.optim, name)(list(model.parameters()))
    QUANTIZERS["qat"](model).setup_optimizer(optimizer)
    assert len(optimizer.param_groups) == 1


NO_SECOND_GROUP = {"LBFGS", "SparseAdam", "Muon"}


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if kind is not torch.optim.Optimizer and name not in NO_SECOND_GROUP
    ),
)
def test_every_other_optimizer_of_torch(name):
    """All others of torch take the group, and a step moves what is learned."""
    model = seeded(mlp)
    optimizer = getattr(torch.optim, name)(model.parameters())
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    before = [p.detach().clone() for p in quantizer.learned_parameters()]
    step(model, optimizer, INPUTS, quantizer)
    after = quantizer.learned_parameters()
    assert all(not same_bits(a, b) for a, b in zip(before, after, strict=True))


class _Failing(torch.optim.SGD):
    """Writes to the optimizer before it refuses a group."""

    broken = False

    def add_param_group(self, group):
        super().add_param_group(group)
        if self.broken:
            self.state[group["params"][0]]["new"] = 1
            self.defaults["new"] = 1
            raise ValueError("one group is enough")


@pytest.mark.parametrize("named", [False, True])
def test_a_group_that_the_optimizer_refuses(named):
    """An error in add_param_group leaves groups, names, state and defaults as they were."""
    model = mlp()
    quantizer = QUANTIZERS["diffq"](model)
    held = model.named_parameters() if named else model.parameters()
    optimizer = _Failing(held, 0.1, momentum=0.9)
    quantizer.no_optimizer()
    step(model, optimizer, INPUTS, quantizer)
    optimizer.broken = True
    error = _refused(diffq.OptimizerError, quantizer, optimizer, "one group is enough")
    assert isinstance(error.__cause__, ValueError)
    optimizer.broken = False
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, INPUTS, quantizer)


# An optimizer for what is learned alone


@pytest.mark.parametrize("kind", ["diffq", "lsq", "product"])
def test_learned_parameters(kind):
    """learned_parameters() gives each parameter that the quantizer added to the model, once."""
    model = mlp()
    plain = {id(p) for p in model.parameters()}
    quantizer = QUANTIZERS[kind](model)
    found = [id(p) for p in quantizer.learned_parameters()]
    assert len(found) == len(set(found)) > 0
    assert set(found) == {id(p) for p in model.parameters()} - plain


def test_an_optimizer_of_their_own_beside_lbfgs():
    """LBFGS trains the weights and Adam the bits, at the rate that it was made with."""
    model = seeded(mlp)
    weights = torch.optim.LBFGS(model.parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model)
    bits = torch.optim.AdamW(quantizer.learned_parameters(), 0.25)
    quantizer.setup_optimizer(bits)
    (group,) = bits.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.0)
    before = snapshot_of(model)

    def closure():
        weights.zero_grad()
        bits.zero_grad()
        loss = model(INPUTS).square().mean() + 0.1 * quantizer.model_size()
        loss.backward()
        return loss

    weights.step(closure)
    bits.step()
    moved = {name for name, value in model.state_dict().items() if not _same(value, before[name])}
    assert moved == {name for name, _ in model.named_parameters()}


def _same(one, other):
    return same_bits(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("place", [0, 1])
def test_a_group_that_the_user_made(place):
    """A group that the user made for what is learned stays where it is, with its rate."""
    model = mlp()
    quantizer = QUANTIZERS["diffq"](model)
    groups = [{"params": _weights(model)}]
    groups.insert(place, {"params": list(quantizer.learned_parameters()), "lr": 0.3})
    optimizer = _sgd(groups, weight_decay=0.5)
    kept = optimizer.param_groups[place]
    quantizer.setup_optimizer(optimizer)
    assert optimizer.param_groups[place] is kept
    assert (kept["lr"], kept["weight_decay"]) == (0.3, 0)
    quantizer.setup_optimizer(optimizer, lr=0.7, weight_decay=0.2)
    assert optimizer.param_groups[place] is kept
    assert (kept["lr"], kept["weight_decay"]) == (0.7, 0.2)
    weights = optimizer.param_groups[1 - place]
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.5)


def test_one_optimizer_for_two_models():
    """What two quantizers learn may share a group of one optimizer, and keeps its rate."""
    quantizers = [QUANTIZERS["diffq"](mlp()) for _ in range(2)]
    optimizer = _sgd([p for q in quantizers for p in q.learned_parameters()])
    for quantizer in quantizers:
        quantizer.setup_optimizer(optimizer)
    assert [(len(g["params"]), g["lr"]) for g in optimizer.param_groups] == [(1, 0.1), (1, 0.1)]


# Schedulers


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_setup_after_a_scheduler(name, made):
    """A scheduler that does not know the group is an error, also where bits must only move."""
    model = mlp()
    if made == "before":
        optimizer = _sgd(model.parameters())
    quantizer = QUANTIZERS["diffq"](model)
    if made == "after":
        optimizer = _sgd(model.parameters())
    SCHEDULERS[name](optimizer)
    _refused(diffq.OptimizerError, quantizer, optimizer, "scheduler", "first")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_setup_again_after_a_scheduler(name):
    """A second call for the same optimizer changes nothing that the scheduler keeps."""
    model = seeded(mlp)
    optimizer = _sgd(model.parameters())
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.25)
    scheduler = SCHEDULERS[name](optimizer)
    before = _content(optimizer)
    quantizer.setup_optimizer(optimizer)
    assert _content(optimizer) == before
    initial = optimizer.param_groups[-1]["initial_lr"]
    quantizer.setup_optimizer(optimizer, lr=initial * 2 / 2, momentum=0.5)
    _refused(diffq.OptimizerError, quantizer, optimizer, "scheduler", "0.75", lr=0.75)
    step(model, optimizer, INPUTS, quantizer)
    scheduler.step()
    assert optimizer.param_groups[-1]["momentum"] in (0.5, optimizer.param_groups[0]["momentum"])


def test_reduce_on_plateau_takes_new_groups():
    """ReduceLROnPlateau leaves no mark, and needs none: it reduces the rates of new groups too."""
    model = mlp()
    optimizer = _sgd(model.parameters())
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer, lr=0.4)
    for _ in range(2):
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.2]


# Options


@pytest.mark.parametrize("kind", ["diffq", "qat"])
@pytest.mark.parametrize(
    ("option", "close"),
    [("weigth_decay", "weight_decay"), ("LR", "lr"), ("beta", "betas"), ("fuse", "fused")],
)
def test_an_option_that_the_optimizer_does_not_know(kind, option, close):
    """A misspelt option is an error that names the right one."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    quantizer = QUANTIZERS[kind](model)
    error = _refused(
        diffq.ConfigError, quantizer, optimizer, repr(option), "AdamW", "eps", **{option: 0.1}
    )
    assert close == "lr" or f"Did you mean {close!r}" in str(error)


@pytest.mark.parametrize("option", ["target_md", "params", "param_names", "momentum"])
def test_an_option_of_something_else(option):
    """Options of other optimizers, and what a group holds, are refused."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    quantizer = QUANTIZERS["diffq"](model)
    _refused(diffq.ConfigError, quantizer, optimizer, repr(option), **{option: 1})


def test_options_that_groups_may_have():
    """A name for logs, and keys that the user's own groups have, are fine."""
    model = mlp()
    optimizer = _sgd([{"params": model.parameters(), "lr_scale": 1.0}])
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer, lr=0.1, name="bits", lr_scale=2.0)
    assert [optimizer.param_groups[1][key] for key in ("name", "lr_scale")] == ["bits", 2.0]


@pytest.mark.parametrize(
    "lr",
    [-1e-3, float("nan"), float("inf"), "1e-3", True, [0.1], torch.ones(2), torch.tensor(-1.0)],
)
def test_a_learning_rate_that_is_none(lr):
    """A learning rate is a number from 0, or a tensor of one."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    quantizer = QUANTIZERS["diffq"](model)
    _refused(diffq.ConfigError, quantizer, optimizer, "lr must be a number", lr=lr)


def test_a_learning_rate_that_adam_cannot_take():
    """A tensor as lr is refused where Adam's foreach kernel would fail at its first step."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    quantizer = QUANTIZERS["diffq"](model)
    _refused(diffq.ConfigError, quantizer, optimizer, "foreach", lr=torch.tensor(0.1))
    quantizer.setup_optimizer(optimizer, lr=torch.tensor(0.1), foreach=False)
    step(model, optimizer, INPUTS, quantizer)


@pytest.mark.parametrize(
    "lr", [0, 0.25, np.float32(0.25), torch.tensor(0.25), torch.tensor([0.25])]
)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_learning_rate(name, lr):
    """Numbers and tensors of one element are learning rates."""
    if name == "SGD" and np.ndim(lr) and torch.__version__ < (2, 7):
        pytest.skip("SGD of torch 2.6 fails with a learning rate of one dimension")
    model = seeded(mlp)
    optimizer = getattr(torch.optim, name)(model.parameters())
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=lr)
    step(model, optimizer, INPUTS, quantizer)
    assert optimizer.param_groups[1]["lr"] == lr


# Options


@pytest.mark.parametrize(
    "options",
    [{"betas": 0.9}, {"betas": (2, 0.9)}, {"weight_decay": -1.0}, {"fused": True, "foreach": True}],
    ids=repr,
)
def test_values_that_the_optimizer_refuses(options):
    """Values that torch checks when an optimizer is made are checked, and nothing changes."""
    model = seeded(mlp)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model)
    before = len(optimizer.param_groups)
    with pytest.raises(ConfigError, match="Adam refuses these options of setup_optimizer"):
        quantizer.setup_optimizer(optimizer, **options)
    assert len(optimizer.param_groups) == before


def test_a_second_call_keeps_the_options():
    """Only the options of the second call change; a kernel that they exclude is given up."""
    model = seeded(mlp)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.2, weight_decay=0.3)
    quantizer.setup_optimizer(optimizer, lr=0.4)
    group = optimizer.param_groups[-1]
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.4, 0.3, True)
    quantizer.setup_optimizer(optimizer, differentiable=True)
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.4, 0.3, None)
    quantizer.setup_optimizer(optimizer, differentiable=False)
    step(model, optimizer, torch.randn(3, 16), quantizer)


def test_rates_that_are_no_numbers():
    """An optimizer that finds its rate by itself, such as Adafactor without lr, is taken."""

    class Relative(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, 0.1)
            for group in self.param_groups:
                group["lr"] = None

        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = group["lr"] or 0.1
            return super().step(closure)

    model = seeded(mlp)
    optimizer = Relative(model.parameters())
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, torch.randn(3, 16), quantizer)


def test_wrappers_without_defaults():
    """A wrapper that is an optimizer in name only, as many Lookaheads, is taken."""

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

        def step(self, closure=None):
            return self.inner.step(closure)

        def zero_grad(self, set_to_none=True):
            self.inner.zero_grad(set_to_none)

        def add_param_group(self, group):
            self.inner.add_param_group(group)

    model = seeded(mlp)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.1))
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.5)
    before = [parameter.detach().clone() for parameter in quantizer.learned_parameters()]
    step(model, optimizer, torch.randn(3, 16), quantizer)
    assert not same_bits(before, [p.detach() for p in quantizer.learned_parameters()])


@pytest.mark.parametrize("kind", ["diffq", "lsq"])
def test_no_optimizer_leaves_all_as_it_is(kind):
    """After no_optimizer(), the optimizer that was set up moves nothing that is learned."""
    model = seeded(mlp)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.1, weight_decay=0.5)
    step(model, optimizer, torch.randn(3, 16), quantizer)
    quantizer.no_optimizer()
    before = [parameter.clone() for parameter in quantizer.learned_parameters()]
    for _ in range(3):
        step(model, optimizer, torch.randn(3, 16), quantizer)
    assert same_bits(before, [parameter.detach() for parameter in quantizer.learned_parameters()])
    quantizer.setup_optimizer(optimizer, lr=0.1)
    step(model, optimizer, torch.randn(3, 16), quantizer)
    assert not same_bits(before, [p.detach() for p in quantizer.learned_parameters()])
