"""Training that is cut and goes on from a checkpoint, bit for bit."""

import io

import pytest
import torch
from torch import nn

import diffq
from tests.compare import same_bits
from tests.models import MODELS, QUANTIZERS, computed_weight, mlp, seeded, snapshot_of, step
from tests.processors import repeatable

STEPS, CUT = 6, 3


def _adam(model):
    return torch.optim.Adam(model.parameters(), 0.05)


def _adamw(model):
    return torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)


def _momentum(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)


class _Run:
    """A model, its quantizer and its optimizer, with the inputs of each step."""

    def __init__(self, name, kind, make_optimizer, seed=0, optimizer_first=True):
        make, make_input = MODELS[name]
        self.model = seeded(make, seed)
        optimizer = make_optimizer(self.model) if optimizer_first else None
        self.quantizer = QUANTIZERS[kind](self.model)
        self.optimizer = optimizer or make_optimizer(self.model)
        self.quantizer.setup_optimizer(self.optimizer, lr=0.3)
        self.inputs = [seeded(make_input, 100 + index) for index in range(STEPS)]

    def train(self, start, end, at=None):
        """Runs some steps; `at` maps a step to what is called before it."""
        for index in range(start, end):
            for action in (at or {}).get(index, ()):
                action(self.quantizer)
            step(self.model.train(), self.optimizer, self.inputs[index], self.quantizer)

    def save(self):
        """The bytes of a checkpoint."""
        file = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, file)
        return file.getvalue()

    def load(self, data):
        """Takes up a checkpoint."""
        state = torch.load(io.BytesIO(data), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    def result(self):
        """All that training has changed."""
        moments = {
            f"{index}.{key}": value
            for index, state in self.optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        return snapshot_of(self.model), moments, self.quantizer.get_quantized_state()


def _same_results(one, other):
    (weights, moments, state), (weights_2, moments_2, state_2) = one, other
    return (
        same_bits(weights, weights_2)
        and same_bits(moments, moments_2)
        and state["aliases"] == state_2["aliases"]
        and all(
            same_bits(entry, state_2["tensors"][name]) for name, entry in state["tensors"].items()
        )
    )


@repeatable()
def _uninterrupted_and_resumed(name, kind, make_optimizer=_adam, cut=CUT, at=None, **options):
    whole = _Run(name, kind, make_optimizer, **options)
    torch.manual_seed(1)
    whole.train(0, STEPS, at)
    first = _Run(name, kind, make_optimizer, **options)
    torch.manual_seed(1)
    first.train(0, cut, at)
    data = first.save()
    second = _Run(name, kind, make_optimizer, seed=9, **options)
    torch.manual_seed(99)
    second.load(data)
    second.train(cut, STEPS, at)
    return whole.result(), second.result()


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", ["mlp", "tied-modules", "two-names", "conv", "lstm", "encoder"])
def test_resume_with_adam(name, kind):
    """A training resumed in a new model equals the uninterrupted one in every bit."""
    whole, resumed = _uninterrupted_and_resumed(name, kind)
    assert _same_results(whole, resumed)


@pytest.mark.parametrize("make_optimizer", [_adamw, _momentum])
@pytest.mark.parametrize("kind", ["diffq", "lsq"])
def test_resume_with_other_optimizers(kind, make_optimizer):
    """AdamW and SGD with momentum resume bit for bit too."""
    whole, resumed = _uninterrupted_and_resumed("mlp", kind, make_optimizer)
    assert _same_results(whole, resumed)


@pytest.mark.parametrize("kind", ["diffq", "lsq"])
def test_resume_with_an_optimizer_made_after_the_quantizer(kind):
    """The order of optimizer and quantizer makes no difference to resuming."""
    whole, resumed = _uninterrupted_and_resumed("mlp", kind, optimizer_first=False)
    assert _same_results(whole, resumed)


@pytest.mark.parametrize("cut", range(STEPS + 1))
def test_resume_at_any_step(cut):
    """The step at which a training is cut makes no difference."""
    whole, resumed = _uninterrupted_and_resumed("mlp", "diffq", cut=cut)
    assert _same_results(whole, resumed)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("frozen_at", [CUT - 1, CUT + 1])
@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding"])
def test_resume_with_frozen_bits(kind, frozen_at, rounding):
    """Bits that were frozen before the cut stay frozen after it, or are frozen then."""
    at = {frozen_at: [lambda quantizer: quantizer.freeze_bits(rounding=rounding)]}
    whole, resumed = _uninterrupted_and_resumed("mlp", kind, at=at)
    assert _same_results(whole, resumed)


def test_frozen_bits_do_not_move():
    """After freeze_bits no step changes a bitwidth, whatever momentum the optimizer has."""
    run = _Run("mlp", "diffq", _adam)
    run.train(0, 3)
    before = run.quantizer.bits()
    run.quantizer.freeze_bits()
    run.train(3, STEPS)
    after = run.quantizer.bits()
    assert len({width for bits in before.values() for width in bits.tolist()}) > 1
    assert all(same_bits(before[name], bits) for name, bits in after.items())


@pytest.mark.parametrize("rounding", [False, True])
def test_frozen_stage_is_in_the_state_dict(rounding):
    """Loading a checkpoint of frozen bits freezes them; loading an earlier one thaws them."""
    run, other = _Run("mlp", "diffq", _adam), _Run("mlp", "diffq", _adam, seed=3)
    run.train(0, 2)
    learning = snapshot_of(run.model)
    run.quantizer.freeze_bits(rounding=rounding)
    other.model.load_state_dict(run.model.state_dict())
    before = other.quantizer.bits()
    other.train(0, 3)
    assert all(same_bits(before[name], bits) for name, bits in other.quantizer.bits().items())
    torch.manual_seed(0)
    weights = [computed_weight(other.model.train(), "0.weight") for _ in range(2)]
    assert same_bits(*weights) is rounding
    other.model.load_state_dict(learning)
    other.train(0, 3)
    assert any(not same_bits(before[name], bits) for name, bits in other.quantizer.bits().items())


def test_checkpoint_loads_with_weights_only():
    """A checkpoint of an attached model holds tensors and plain containers only."""
    run = _Run("mlp", "diffq", _adam)
    run.train(0, 1)
    state = torch.load(io.BytesIO(run.save()), weights_only=True)
    assert same_bits(dict(state["model"]), snapshot_of(run.model))


def test_checkpoint_has_the_same_entries_always():
    """Neither training nor evaluation adds an entry to the state dict."""
    run = _Run("mlp", "diffq", _adam)
    keys = list(run.model.state_dict())
    run.train(0, 1)
    run.model.eval()(run.inputs[0])
    assert list(run.model.state_dict()) == keys


@repeatable()
def test_evaluation_between_steps_changes_nothing():
    """Evaluations, sizes, states and tables in between leave the training as it would be."""
    plain, watched = (_Run("conv", "diffq", _adam) for _ in range(2))
    torch.manual_seed(1)
    plain.train(0, STEPS)
    torch.manual_seed(1)
    for index in range(STEPS):
        watched.train(index, index + 1)
        watched.model.eval()
        with torch.no_grad():
            watched.model(watched.inputs[index])
        watched.quantizer.true_model_size()
        watched.quantizer.get_quantized_state()
        repr(watched.quantizer)
    assert _same_results(plain.result(), watched.result())


@repeatable()
def test_setup_optimizer_is_repeatable():
    """Calling setup_optimizer again moves the extras once more and keeps their moments."""
    plain, repeated = (_Run("mlp", "diffq", _adam) for _ in range(2))
    for run, again in ((plain, False), (repeated, True)):
        torch.manual_seed(1)
        run.train(0, CUT)
        if again:
            run.quantizer.setup_optimizer(run.optimizer, lr=0.3)
        run.train(CUT, STEPS)
    assert _same_results(plain.result(), repeated.result())
    assert len(repeated.optimizer.param_groups) == 2


@repeatable()
def test_resume_with_a_scheduler():
    """A learning rate schedule made after setup_optimizer resumes too."""

    def _train(model, optimizer, scheduler, quantizer, inputs, steps):
        for _ in range(steps):
            step(model, optimizer, inputs, quantizer)
            scheduler.step()

    def _make(seed):
        model = seeded(mlp, seed)
        optimizer = _adam(model)
        quantizer = diffq.DiffQuantizer(model, min_size=0)
        quantizer.setup_optimizer(optimizer, lr=0.3)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9), quantizer

    inputs = torch.randn(4, 16)
    torch.manual_seed(1)
    whole = _make(0)
    torch.manual_seed(1)
    _train(*whole, inputs, 6)
    first = _make(0)
    torch.manual_seed(1)
    _train(*first, inputs, 3)
    rng, second = torch.get_rng_state(), _make(5)
    for new, old in zip(second[:3], first[:3], strict=True):
        new.load_state_dict(old.state_dict())
    torch.set_rng_state(rng)
    _train(*second, inputs, 3)
    assert same_bits(snapshot_of(second[0]), snapshot_of(whole[0]))
    rates = [group["lr"] for group in second[1].param_groups]
    assert rates == [group["lr"] for group in whole[1].param_groups]
    assert rates[0] != rates[1]


@repeatable()
def test_fine_tuning_from_a_plain_checkpoint():
    """Attaching to a loaded model and loading into an attached one train alike."""
    checkpoint = seeded(mlp, 4).state_dict()
    results = []
    for attach_first in (False, True):
        model = seeded(mlp, 5)
        if not attach_first:
            model.load_state_dict(checkpoint)
        quantizer = diffq.DiffQuantizer(model, min_size=0)
        if attach_first:
            model.load_state_dict(checkpoint)
        optimizer = _adam(model)
        quantizer.setup_optimizer(optimizer, lr=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            step(model, optimizer, torch.ones(2, 16), quantizer)
        results.append(snapshot_of(model))
    assert same_bits(*results)


def test_attached_checkpoint_of_another_quantizer_is_refused():
    """What one kind of quantizer learned does not load into another kind in silence."""
    source, target = nn.Linear(8, 8), nn.Linear(8, 8)
    diffq.DiffQuantizer(source, min_size=0)
    diffq.LSQQuantizer(target, min_size=0)
    before = snapshot_of(target)
    with pytest.raises(
        diffq.errors.MismatchError, match=r"method=DiffQuantizer .*method=LSQQuantizer"
    ):
        target.load_state_dict(source.state_dict())
    assert same_bits(snapshot_of(target), before)
