"""Quantized weights of eval: computed once, and again when something changed."""

import sys
import threading

import pytest
import torch

from diffq.attach.attachment import attachment_of
from diffq.errors import AttachError
from tests.compare import close, same_bits
from tests.holder import quantizers_in
from tests.models import (
    MODELS,
    QUANTIZERS,
    after_steps,
    attached,
    computed,
    evaluate_alike,
    mlp,
    nothing_held,
    restored,
    seeded,
    snapshot_of,
    step,
)


def _counted(model):
    """Counts the quantizations of all tensors of a model from here on."""
    calls = []
    drawing = attachment_of(model).forwards._drawing
    quantize = drawing.quantize

    def _counting(tensors):
        calls.extend(quantizer.plan.name for quantizer, _ in tensors)
        return quantize(tensors)

    drawing.quantize = _counting
    return calls


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", ["mlp", "tied-modules", "lstm", "encoder"])
def test_eval_quantizes_each_weight_once(name, kind):
    """The second eval forward, with or without gradients, quantizes nothing."""
    make, make_input = MODELS[name]
    model, _ = attached(make, kind)
    model.eval()
    inputs, calls = make_input(), _counted(model)
    with torch.no_grad():
        model(inputs)
    # The fast path of attention may leave some unread in one mode and not in the other.
    model(inputs)
    assert len(calls) == len(set(calls)) == len(quantizers_in(model))
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            model(inputs)
    assert len(calls) == len(set(calls))


def test_a_write_to_data_is_quantized_once():
    """After a write that leaves no trace in versions, one forward quantizes, and no other."""
    model, _ = attached(mlp)
    model.eval()
    inputs, calls = MODELS["mlp"][1](), _counted(model)
    with torch.no_grad():
        model(inputs)
        model[0].weight.data.mul_(2)
        calls.clear()
        model(inputs)
        assert len(calls) == len(set(calls)) == len(quantizers_in(model))
        model(inputs)
    assert len(calls) == len(quantizers_in(model))


def test_a_write_to_data_after_another_part_was_quantized_anew():
    """A write that leaves no trace is seen, also after a part of the model was quantized anew."""
    model, quantizer = attached(mlp)
    inputs = MODELS["mlp"][1]()
    _evaluate_often(model, inputs)
    with torch.no_grad():
        model[2].weight[0, 1] += 1
        model[2](torch.ones(1, model[2].in_features))
        model[0].weight.data.mul_(2)
        outputs = model(inputs)
        assert close(outputs, restored(mlp, quantizer)(inputs))


def _evaluate_often(model, inputs):
    """Evaluates until nothing is left to note for later forwards."""
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            model(inputs)


def _by_optimizer(model, quantizer):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    model(torch.ones(2, 16)).square().sum().backward()
    optimizer.step()


def _by_load(model, quantizer):
    model.load_state_dict(seeded(mlp, 9).state_dict())


def _by_assign(model, quantizer):
    model.load_state_dict(seeded(mlp, 9).state_dict(), assign=True)


def _in_place(model, quantizer):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def _by_data(model, quantizer):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def _by_cast(model, quantizer):
    model.bfloat16().float()


def _by_training(model, quantizer):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    quantizer.setup_optimizer(optimizer, lr=5.0)
    for _ in range(3):
        step(model.train(), optimizer, torch.ones(2, 16), quantizer, lam=100)
    model.eval()


def _by_bits(model, quantizer):
    with torch.no_grad():
        for parameter in quantizer.learned_parameters():
            parameter.sub_(1.0)


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
@pytest.mark.parametrize(
    "change",
    [_by_optimizer, _by_load, _by_assign, _in_place, _by_data, _by_cast, _by_training, _by_bits],
)
def test_eval_notices_changes(change, kind):
    """After a change of weights or bits, eval computes with the new ones, as the state has them."""
    if change is _by_bits and kind == "qat":
        pytest.skip("QAT learns no bits")
    model, quantizer = attached(mlp, kind)
    inputs = torch.randn(3, 16)
    _evaluate_often(model, inputs)
    before = computed(model)
    change(model, quantizer)
    assert not same_bits(computed(model), before)
    assert evaluate_alike(model, restored(mlp, quantizer), inputs)


def test_sizes_and_states_leave_the_mode():
    """Sizes, bits, states and the table work in both modes and change nothing."""
    model, quantizer = attached(mlp)
    before, seen = snapshot_of(model), []
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        seen.append((quantizer.true_model_size(), quantizer.mean_bits(), repr(quantizer)))
        quantizer.get_quantized_state()
        assert same_bits(torch.get_rng_state(), state)
        assert all(module.training is training for module in model.modules())
    assert seen[0] == seen[1]
    assert same_bits(snapshot_of(model), before)


@pytest.mark.parametrize("name", ["mlp", "lstm", "encoder"])
def test_threads_evaluate_at_once(name):
    """Threads that evaluate one model at once compute with the weights of a single thread."""
    make, make_input = MODELS[name]
    model, _ = attached(make)
    model.eval()
    inputs = [make_input() for _ in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    weights, wrong = computed(model), []

    def _evaluate():
        with torch.no_grad():
            for _ in range(10):
                for x, y in zip(inputs, expected, strict=True):
                    if not (close(model(x), y) and same_bits(computed(model), weights)):
                        wrong.append(x)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        model.train()
        model.eval()
        threads = [threading.Thread(target=_evaluate) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert nothing_held(model)


def test_functional_call():
    """torch.func.functional_call computes with the tensors it is given."""
    model, quantizer, inputs = after_steps()
    model.eval()
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        before, weights = model(inputs), computed(model)
        outputs = torch.func.functional_call(model, other, (inputs,))
        assert close(model(inputs), before)
        assert same_bits(computed(model), weights)
        model.load_state_dict({**model.state_dict(), **other})
        assert close(model(inputs), outputs)
    assert quantizer.true_model_size() > 0


class _Reads(torch.nn.Linear):
    """A layer that does something with the weight that it has read."""

    act = None

    def forward(self, x):
        weight = self.weight
        if self.act is not None:
            self.act(weight)
        return torch.nn.functional.linear(x, weight)


def _reading(forwards=3):
    model, _ = attached(lambda: torch.nn.Sequential(_Reads(16, 16)))
    inputs = torch.randn(3, 16)
    model.eval()
    with torch.no_grad():
        for _ in range(forwards):
            model(inputs)
    return model, inputs


def _write(weight):
    weight.mul_(2)


def _move(weight):
    weight.data = torch.zeros_like(weight)


@pytest.mark.parametrize("forwards", range(4))
@pytest.mark.parametrize("act", [_write, _move])
def test_a_write_in_any_forward_is_an_error(act, forwards):
    """A write to a quantized weight in any eval forward is an error, and the next one is right."""
    model, inputs = _reading(forwards)
    before = computed(model)
    model[0].act = act
    with torch.no_grad():
        with pytest.raises(AttachError, match="must not write to a quantized tensor"):
            model(inputs)
        model[0].act = None
        model(inputs)
    assert same_bits(computed(model), before)


def test_memory_that_was_released_is_not_read():
    """A weight whose memory was released and given back with other numbers is quantized anew."""
    model, inputs = _reading()
    storage, other = model[0].weight.untyped_storage(), torch.randn(16, 16)
    size = storage.nbytes()
    storage.resize_(0)
    kept = [torch.zeros(16, 16) for _ in range(8)]  # may be in the memory that was released
    storage.resize_(size)
    model[0].weight.data.copy_(other)
    with torch.no_grad():
        outputs = model(inputs)
    fresh, _ = attached(lambda: torch.nn.Sequential(_Reads(16, 16)))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert close(outputs, fresh.eval()(inputs))
    assert len(kept) == 8


def test_a_parameter_assigned_in_a_later_forward_is_an_error():
    """A Parameter that any eval forward puts in is an error, and the old one is back after it."""
    model, inputs = _reading()
    parameter = model[0].weight

    def assign(weight):
        model[0].weight = torch.nn.Parameter(torch.zeros(16, 16))

    model[0].act = assign
    with torch.no_grad(), pytest.raises(AttachError, match="must not assign a quantized tensor"):
        model(inputs)
    assert model[0].weight is parameter


def test_gradients_within_evaluation_without():
    """A part with gradients in an eval forward without them has its own graph in each forward."""
    model, inputs = _reading()

    def differentiate(weight):
        with torch.enable_grad():
            model[0].weight.square().sum().backward()

    model[0].act = differentiate
    with torch.no_grad():
        model(inputs)
        once = model[0].weight.grad.clone()
        model(inputs)
    assert close(model[0].weight.grad, 2 * once)


def test_another_shape_in_the_same_memory():
    """A weight whose memory is read in another shape is an error in a later forward too."""
    model, inputs = _reading()
    model[0].weight.data = model[0].weight.data.view(8, 32)
    with torch.no_grad(), pytest.raises(AttachError, match="went from shape"):
        model(inputs)


def test_a_layer_in_training_in_a_later_forward():
    """A layer that is set to training without `train()` trains in the next forward."""
    model, inputs = _reading()
    with torch.no_grad():
        quantized = model(inputs)
        model[0].training = True
        assert not close(model(inputs), quantized)
        model[0].training = False
        assert close(model(inputs), quantized)


class _Chooses(torch.nn.Module):
    """Two layers, of which it may leave out one."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.calls_both = False

    def forward(self, x):
        x = self.always(x)
        return self.sometimes(x) if self.calls_both else x


def test_a_layer_that_a_later_forward_calls_first():
    """A layer that no eval forward has called counts as read from the first one that calls it."""
    model, _ = attached(_Chooses)
    inputs = torch.randn(3, 16)
    _evaluate_often(model, inputs)
    read = {q.plan.name: q.readings.ever for q in attachment_of(model).quantizers}
    assert read["always.weight"]
    assert not read["sometimes.weight"]
    model.calls_both = True
    _evaluate_often(model, inputs)
    assert all(q.readings.ever for q in attachment_of(model).quantizers)
