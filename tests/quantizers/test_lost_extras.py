"""Training whose optimizer was made anew without the learned extras, and training that is sound."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import diffq
from diffq.quantizers.steps import PATIENCE
from tests.compare import same_bits
from tests.models import QUANTIZERS, mlp, seeded, snapshot_of, step

LEARNING = ["diffq", "diffq-rounding", "lsq"]
INPUTS = torch.ones(2, 16)


def _weights(model):
    """The parameters of the plain model."""
    extras = {id(extra) for extra in _extras(model)}
    return [p for p in model.parameters() if id(p) not in extras]


def _extras(model):
    return list(diffq.quantizer_of(model).learned_parameters())


def _adam(parameters):
    return torch.optim.Adam(parameters, 0.01)


def _prepared(kind="diffq"):
    """A model, its quantizer, and an optimizer that was set up and has made a step."""
    model = seeded(mlp)
    optimizer = _adam(model.parameters())
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, INPUTS, quantizer)
    return model, quantizer, optimizer


def _keeps_training(model, quantizer, optimizer, steps=2 * PATIENCE + 2):
    """Trains on, without a warning; tells whether that moved the model."""
    before = snapshot_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", diffq.DiffqWarning)
        for _ in range(steps):
            step(model, optimizer, INPUTS, quantizer)
    return not same_bits(before, snapshot_of(model))


def _warned(train, steps=PATIENCE):
    """Checks that `train` warns at the last of some steps, and never again."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", diffq.DiffqWarning)
        for _ in range(steps - 1):
            train()
        with pytest.raises(diffq.DiffqWarning, match=r"setup_optimizer.*no_optimizer"):
            train()
        for _ in range(2 * PATIENCE):
            train()


# Lost


@pytest.mark.parametrize("kind", LEARNING)
def test_an_optimizer_made_anew(kind):
    """A new optimizer of the weights alone is noticed after some steps, once."""
    model, quantizer, optimizer = _prepared(kind)
    del optimizer
    optimizer = _adam(_weights(model))
    _warned(lambda: step(model, optimizer, INPUTS, quantizer))
    quantizer.setup_optimizer(optimizer)
    assert _keeps_training(model, quantizer, optimizer)


def test_an_optimizer_beside_the_one_that_was_set_up():
    """Where the optimizer that was set up is kept, but makes no step, it is noticed later."""
    model, _, optimizer = _prepared()
    another = _adam(_weights(model))
    _warned(lambda: step(model, another, INPUTS), 10 * PATIENCE)
    assert optimizer.param_groups


def test_bits_that_step_seldom():
    """An optimizer of the learned parameters alone may step less often than the weights'."""
    model = seeded(mlp)
    weights = _adam(model.parameters())
    quantizer = QUANTIZERS["diffq"](model)
    bits = torch.optim.Adam(quantizer.learned_parameters(), 0.1)
    quantizer.setup_optimizer(bits)
    with warnings.catch_warnings():
        warnings.simplefilter("error", diffq.DiffqWarning)
        for count in range(4 * PATIENCE):
            step(model, weights, INPUTS, quantizer)
            if count % (PATIENCE + 5) == PATIENCE:
                bits.step()


@pytest.mark.parametrize("whole", [False, True])
def test_two_optimizers_of_the_same_bits(whole):
    """Two optimizers that step the same learned parameters in turn are noticed, once."""
    model = seeded(mlp)
    quantizer = QUANTIZERS["diffq"](model)
    first = _adam(model.parameters() if whole else [*model[0].parameters(), *_extras(model)])
    second = _adam([*model[2].parameters(), *_extras(model)])
    quantizer.setup_optimizer(first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", diffq.DiffqWarning)
        for _ in range(3):
            step(model, first, INPUTS, quantizer)
            second.step()
    (message,) = (str(warning.message) for warning in caught)
    assert "Two optimizers train the same learned parameters" in message


def test_an_optimizer_with_the_place_of_one_that_is_gone():
    """Steps of an optimizer that is gone are not counted for another one."""
    model, quantizer, optimizer = _prepared()
    del optimizer
    other = torch.nn.Linear(2, 2)
    for _ in range(PATIENCE + 5):
        sgd = torch.optim.SGD(other.parameters(), 0.1)
        other(torch.ones(1, 2)).sum().backward()
        sgd.step()
        del sgd
    optimizer = _adam(_weights(model))
    _warned(lambda: step(model, optimizer, INPUTS, quantizer))


def test_extras_taken_out_of_the_optimizer():
    """An optimizer whose groups were replaced by ones without the extras is noticed."""
    model, _, optimizer = _prepared()
    optimizer.param_groups[:] = optimizer.param_groups[:1]
    _warned(lambda: step(model, optimizer, INPUTS))


def test_an_optimizer_made_much_later():
    """Forwards without any optimizer do not tire the guard for good."""
    model, _, optimizer = _prepared()
    del optimizer
    for _ in range(2 * PATIENCE):
        model(INPUTS)
    late = _adam(_weights(model))
    _warned(lambda: step(model, late, INPUTS))


def test_the_warning_is_of_the_users_line():
    """The warning shows where the optimizer is stepped."""
    model, _, optimizer = _prepared()
    del optimizer
    optimizer = _adam(_weights(model))
    model(INPUTS).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", diffq.DiffqWarning)
        for _ in range(PATIENCE):
            optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("named", [False, True])
def test_parameters_replaced_after_setup(named):
    """An optimizer whose parameters are no longer the model's is refused at its first step."""
    model = seeded(mlp)
    quantizer = QUANTIZERS["diffq"](model)
    optimizer = _adam(model.named_parameters() if named else model.parameters())
    quantizer.setup_optimizer(optimizer)
    model.load_state_dict(snapshot_of(model), assign=True)
    with pytest.raises(diffq.OptimizerError, match=r"assign=True.*setup_optimizer"):
        step(model, optimizer, INPUTS, quantizer)
    optimizer = _adam(model.parameters())
    quantizer.setup_optimizer(optimizer)
    assert _keeps_training(model, quantizer, optimizer)


# Sound


def _same(model, quantizer, optimizer):
    return optimizer


def _made_after_attaching(model, quantizer, optimizer):
    return _adam(model.parameters())


def _set_up_again(model, quantizer, optimizer):
    new = _adam(_weights(model))
    quantizer.setup_optimizer(new)
    return new


def _loaded(model, quantizer, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def _extras_in_a_group_of_their_own(model, quantizer, optimizer):
    return torch.optim.SGD([{"params": _weights(model)}, {"params": _extras(model)}], 0.01)


def _another_group_added(model, quantizer, optimizer):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    return optimizer


def _meant(model, quantizer, optimizer):
    quantizer.no_optimizer()
    return _adam(_weights(model))


def _bits_frozen(model, quantizer, optimizer):
    quantizer.freeze_bits()
    return _adam(_weights(model))


def _extras_frozen(model, quantizer, optimizer):
    for extra in _extras(model):
        extra.requires_grad_(False)
    return _adam(_weights(model))


def _detached(model, quantizer, optimizer):
    quantizer.detach()
    return _adam(model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        _same,
        _made_after_attaching,
        _set_up_again,
        _loaded,
        _extras_in_a_group_of_their_own,
        _another_group_added,
        _meant,
        _bits_frozen,
        _extras_frozen,
        _detached,
    ],
)
def test_sound_training_goes_on(change):
    """Training that knows what it does with the extras is not disturbed."""
    model, quantizer, optimizer = _prepared()
    optimizer = change(model, quantizer, optimizer)
    assert _keeps_training(model, quantizer if change is not _detached else None, optimizer)


def test_an_optimizer_that_only_a_scheduler_keeps():
    """A scheduler keeps its optimizer alive, and the guard content."""
    model = seeded(mlp)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    optimizer = _adam(model.parameters())
    quantizer.setup_optimizer(optimizer)
    scheduler = CosineAnnealingLR(optimizer, 10)
    del optimizer
    gc.collect()
    for _ in range(3):
        step(model, scheduler.optimizer, INPUTS, quantizer)
        scheduler.step()


class _Wrapper:
    """Holds an optimizer, as accelerators do, and has no other tie to it."""

    def __init__(self, inner):
        self.inner = inner

    def zero_grad(self):
        self.inner.zero_grad()

    def step(self):
        self.inner.step()


def test_an_optimizer_inside_of_a_wrapper():
    """An optimizer that only a wrapper keeps is found alive."""
    model, quantizer, optimizer = _prepared()
    wrapper = _Wrapper(optimizer)
    del optimizer
    gc.collect()
    assert _keeps_training(model, quantizer, wrapper)


def test_an_optimizer_whose_parameters_were_flattened():
    """A wrapper that trains flat copies, in the place of all parameters, is left in peace."""
    model, quantizer, optimizer = _prepared()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    for group in optimizer.param_groups:
        group["params"] = [flat]
    for _ in range(5):
        (model(INPUTS).sum() + quantizer.model_size()).backward()


def test_one_optimizer_for_each_parameter():
    """Optimizers that each train one parameter are together as good as one."""
    model, quantizer, optimizer = _prepared()
    del optimizer
    single = [torch.optim.SGD([p], 0.01) for p in model.parameters()]
    before = snapshot_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", diffq.DiffqWarning)
        for _ in range(2 * PATIENCE):
            (model(INPUTS).sum() + quantizer.model_size()).backward()
            for optimizer in single:
                optimizer.step()
    assert not same_bits(before, snapshot_of(model))


def test_optimizers_of_other_models():
    """The optimizer of another model, which holds nothing of this one, raises no alarm."""
    model, _, optimizer = _prepared()
    another = mlp()
    other = _adam(another.parameters())
    del optimizer
    model(INPUTS).sum().backward()
    assert _keeps_training(another, None, other)


def test_an_optimizer_of_each_kind_of_parameter():
    """The weights' optimizer may be some steps ahead of the bits', as a GradScaler may cause."""
    model, quantizer, optimizer = _prepared()
    del optimizer
    weights, bits = _adam(_weights(model)), _adam(quantizer.learned_parameters())
    quantizer.setup_optimizer(bits)
    for _ in range(3):
        assert _keeps_training(model, quantizer, weights, steps=PATIENCE - 2)
        assert _keeps_training(model, quantizer, bits, steps=1)


class _Sharpness(torch.optim.Optimizer):
    """Two steps in place of one, of which an inner optimizer makes the second."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})
        self.inner = torch.optim.SGD(self.param_groups, 0.01)
        self.param_groups = self.inner.param_groups
        self.defaults.update(self.inner.defaults)

    def second_step(self):
        self.inner.step()


def test_an_optimizer_that_another_one_steps():
    """An optimizer whose own step() is never called is known by the inner one's steps."""
    model = seeded(mlp)
    quantizer = QUANTIZERS["diffq"](model)
    optimizer = _Sharpness(model.parameters())
    quantizer.setup_optimizer(optimizer)
    before = snapshot_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", diffq.DiffqWarning)
        for _ in range(2 * PATIENCE):
            (model(INPUTS).sum() + quantizer.model_size()).backward()
            optimizer.second_step()
    assert not same_bits(before, snapshot_of(model))


def test_forwards_after_training():
    """Once training is over and its optimizer gone, training forwards and gradients work."""
    model, quantizer, optimizer = _prepared()
    del optimizer
    for _ in range(5):
        (model(INPUTS).sum() + quantizer.model_size()).backward()


def test_copies_need_no_optimizer():
    """A copy of a model that was set up is not refused for the optimizer that it does not have."""
    model, quantizer, optimizer = _prepared()
    other = copy.deepcopy(model)
    other(INPUTS).sum().backward()
    assert _keeps_training(other, diffq.quantizer_of(other), _adam(other.parameters()))
    assert _keeps_training(model, quantizer, optimizer)


def test_compiled_training_is_not_slowed():
    """The guard stays out of the graphs of a compiled model and a compiled step."""
    model, quantizer, optimizer = _prepared()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert _keeps_training(compiled, quantizer, optimizer, steps=3)
    weights = torch.optim.SGD(_weights(model), 0.01)
    compiled_step = torch.compile(weights.step, backend="eager")
    for _ in range(3):
        model(INPUTS).sum().backward()
        compiled_step()


def test_pickles_and_copies():
    """Optimizers and models can be saved and copied; the guard of a copy has no optimizer."""
    model, quantizer, optimizer = _prepared()
    guard = quantizer._step_watch
    assert guard.optimizer is optimizer
    groups = zip(copy.deepcopy(optimizer).param_groups, optimizer.param_groups, strict=True)
    assert all(len(a["params"]) == len(b["params"]) for a, b in groups)
    assert pickle.dumps(optimizer)
    assert copy.deepcopy(guard).optimizer is None
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert same_bits(snapshot_of(other), snapshot_of(model))
    assert diffq.quantizer_of(other)._step_watch.optimizer is None
    assert _keeps_training(other, diffq.quantizer_of(other), _adam(other.parameters()))
    assert guard.optimizer is optimizer


def test_a_model_is_freed():
    """The watch keeps neither the model nor its optimizer alive."""
    model, quantizer, optimizer = _prepared()
    alive = weakref.ref(model), weakref.ref(optimizer)
    del model, quantizer, optimizer
    gc.collect()
    assert all(each() is None for each in alive)


# Two optimizers


@pytest.mark.parametrize("kind", LEARNING)
def test_the_last_optimizer_gets_the_extras(kind):
    """setup_optimizer on a second optimizer moves the extras there, moments and all forgotten."""
    model, quantizer, first = _prepared(kind)
    second = _adam(_weights(model))
    quantizer.setup_optimizer(second, lr=0.5)
    ids = {id(extra) for extra in _extras(model)}
    held = [
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (first, second)
    ]
    assert not held[0] & ids
    assert ids <= held[1]
    assert not any(id(parameter) in ids for parameter in first.state)
    assert _keeps_training(model, quantizer, second)


def test_the_earlier_optimizer_works_on():
    """The earlier optimizer, its state and its scheduler go on with the weights they hold."""
    model, quantizer, first = _prepared()
    scheduler = CosineAnnealingLR(first, 10)
    second = _adam(_weights(model))
    quantizer.setup_optimizer(second)
    extras = [extra.detach().clone() for extra in _extras(model)]
    for _ in range(2):
        model(INPUTS).sum().backward()
        first.step()
        scheduler.step()
    assert all(same_bits(a, b) for a, b in zip(extras, _extras(model), strict=True))
    assert len(first.param_groups) == len(scheduler.get_last_lr()) == 2
    assert len(second.param_groups[1]["params"]) == len(extras)


def test_a_refused_second_optimizer_changes_nothing():
    """Where the second optimizer cannot take the extras, the first one keeps them."""
    model, quantizer, first = _prepared()
    second = _adam(_weights(model))
    CosineAnnealingLR(second, 10)
    with pytest.raises(diffq.OptimizerError, match="scheduler"):
        quantizer.setup_optimizer(second)
    assert _keeps_training(model, quantizer, first)
    assert {id(p) for p in first.param_groups[1]["params"]} == {id(p) for p in _extras(model)}


def test_phases_of_training_with_an_optimizer_each():
    """An optimizer and a scheduler made anew for each phase train the extras in each."""
    model = seeded(mlp)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    for _ in range(3):
        optimizer = _adam(_weights(model))
        quantizer.setup_optimizer(optimizer, lr=0.1)
        scheduler = CosineAnnealingLR(optimizer, 10)
        before = [extra.detach().clone() for extra in _extras(model)]
        step(model, optimizer, INPUTS, quantizer)
        scheduler.step()
        assert not any(same_bits(a, b) for a, b in zip(before, _extras(model), strict=True))
