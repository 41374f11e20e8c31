"""Compiled attached models: few graphs, no stale weights, and plain reads outside."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.compare import close
from tests.models import SUMS, TiedHead, attached, gradients, mlp, restored, tokens
from tests.readers import COARSE, learned_in, reads_parameters, x16


@pytest.fixture(autouse=True)
def _forgetful():
    """Forgets compiled code before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _counted(model, **options):
    """A compiled model, and the counter of its graphs."""
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, backend=counter, **options), counter


@pytest.mark.parametrize(
    "kind", ["diffq", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qat", "lsq"))]
)
def test_one_graph_for_each_mode(kind):
    """Training and evaluating in turns takes two graphs in all, each of the whole forward."""
    model, quantizer = attached(mlp, kind, exclude=["bias"])
    fast, counter = _counted(model, fullgraph=True)
    for _ in range(3):
        model.train()
        for _ in range(2):
            (fast(x16()).sum() + quantizer.model_size()).backward()
            assert reads_parameters(model)
        model.eval()
        with torch.no_grad():
            fast(x16())
    assert counter.frame_count == 2
    assert all(grad.any() for grad in gradients(model).values())
    inputs = x16()
    with torch.no_grad():
        assert close(fast(inputs), restored(mlp, quantizer)(inputs))


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_blocks_that_are_alike_share_a_graph(training):
    """Blocks of one class that are compiled each by itself compile a few times, not each anew."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16, bias=False)

        def forward(self, x):
            return x + self.layer(x).tanh()

    def make():
        return nn.Sequential(*(Block() for _ in range(4)))

    model, quantizer = attached(make)
    counter = CompileCounterWithBackend("eager")
    for block in model:
        block.compile(fullgraph=True, backend=counter)
    model.train(training)
    for _ in range(3):
        model(x16()).sum().backward()
        assert reads_parameters(model)
    assert counter.frame_count <= 2
    assert model[3].layer.weight.grad.any()
    if not training:
        inputs = x16()
        assert close(model(inputs), restored(make, quantizer)(inputs))


def test_batches_of_any_size():
    """Other batch sizes compile once more, for all of them."""
    model, _ = attached(lambda: nn.Linear(16, 4))
    fast, counter = _counted(model, fullgraph=True)
    for batch in (2, 3, 4, 5, 7):
        fast(x16(batch)).sum().backward()
    assert counter.frame_count == 2


def test_many_classes():
    """More classes than one piece of code may be compiled for still compile, each of them."""
    counter = CompileCounterWithBackend("eager")
    for place in range(12):

        class Scaled(nn.Linear):
            place = 0

            def forward(self, x):
                return super().forward(x) * self.place

        Scaled.place = place
        model, _ = attached(lambda cls=Scaled: cls(16, 16, bias=False), "qat")
        torch.compile(model.eval(), backend=counter)(x16())
    assert counter.frame_count == 12


class Breaking(nn.Module):
    """A forward of two graphs, with a weight that both read."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, x):
        x = self.two(self.one(x).tanh())
        torch._dynamo.graph_break()
        return x + F.linear(x, self.two.weight)


def test_graph_breaks():
    """A forward in several graphs trains all weights, has new noise, and evaluates as stored."""
    model, quantizer = attached(Breaking, **COARSE)
    fast = torch.compile(model, backend="eager")
    inputs = x16()
    for _ in range(2):
        fast(inputs).square().sum().backward()
        assert reads_parameters(model)
    assert all(grad.any() for grad in gradients(model).values())
    with torch.no_grad():
        assert not close(fast(inputs), fast(inputs))
        model.eval()
        assert close(fast(inputs), restored(Breaking, quantizer)(inputs))


@pytest.mark.parametrize("eager_first", [True, False])
def test_no_stale_weights(eager_first):
    """Compiled evaluations see every write, load and step, whatever was evaluated before."""
    model, quantizer = attached(mlp, **COARSE)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    quantizer.setup_optimizer(optimizer, lr=5.0)
    fast, inputs = torch.compile(model, backend="eager", fullgraph=True), x16()

    def copied():
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(32, 16))

    def by_data():
        model[2].weight.data.normal_()

    def loaded():
        model.load_state_dict(mlp().state_dict())

    def stepped():
        model.train()
        optimizer.zero_grad()
        (fast(inputs).square().mean() + 100 * quantizer.model_size()).backward()
        optimizer.step()

    def replaced():
        model[0].weight.data = torch.randn(32, 16)

    outputs = []
    for change in (copied, by_data, loaded, stepped, replaced, copied):
        change()
        model.eval()
        with torch.no_grad():
            if eager_first:
                model(inputs)
            outputs.append(fast(inputs))
            assert close(outputs[-1], restored(mlp, quantizer)(inputs))
            assert close(outputs[-1], model(inputs))
    assert not any(close(a, b) for a, b in itertools.pairwise(outputs))


class Checkpointed(nn.Module):
    """Checkpointed layers inside of a compiled forward, with a weight that all read."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2))
        self.shared = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        def run(layer, x):
            x = self.shared(layer(x).tanh())
            return x + F.linear(x, self.shared.weight)

        for layer in self.layers:
            x = checkpoint(run, layer, x, use_reentrant=False)
        return x


def test_checkpoints_in_compiled_code():
    """Compiled, a checkpointed model has the gradients of eager code on the same weights."""
    grads, inputs = [], x16()
    for compiled in (False, True):
        torch._dynamo.reset()
        model, _ = attached(Checkpointed, "diffq-rounding")
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        run(inputs).square().sum().backward()
        grads.append(gradients(model))
        assert reads_parameters(model)
    assert close(*grads, SUMS)


def test_weights_that_another_module_reads():
    """A compiled head that reads the embedding's weight trains and evaluates as in eager code."""
    model, quantizer = attached(TiedHead, **COARSE)
    fast, counter = _counted(model, fullgraph=True)
    inputs = tokens()
    fast(inputs).square().sum().backward()
    assert model.embed.weight.grad.any()
    assert learned_in(model).grad.any()
    with torch.no_grad():
        assert close(fast.eval()(inputs), restored(TiedHead, quantizer)(inputs))
    assert counter.frame_count == 2


def test_reads_and_states_between_compiled_calls():
    """Reading, saving, sizes and eager calls between compiled calls compile nothing more."""
    model, quantizer = attached(mlp)
    fast, counter = _counted(model, fullgraph=True)
    for _ in range(4):
        fast(x16()).sum().backward()
        assert reads_parameters(model)
        model.state_dict()
        quantizer.true_model_size()
        quantizer.bits()
        model(x16()).sum().backward()
        with quantizer.computing():
            assert not reads_parameters(model)
    assert counter.frame_count == 1


def test_copies_of_compiled_models():
    """A copy of a model that was compiled in place computes with its own weights."""
    model, _ = attached(mlp, **COARSE)
    model.compile(backend="eager")
    model.eval()
    inputs = x16()
    with torch.no_grad():
        before = model(inputs)
        other = copy.deepcopy(model)
        other[0].weight.normal_()
        assert close(model(inputs), before)
        assert not close(other(inputs), before)


def test_detach_of_a_compiled_model():
    """After detach() the compiled model computes with the plain weights."""
    model, quantizer = attached(mlp, **COARSE)
    fast, inputs = torch.compile(model, backend="eager"), x16()
    with torch.no_grad():
        quantized = fast.eval()(inputs)
        quantizer.detach()
        assert close(fast(inputs), model(inputs))
        assert not close(fast(inputs), quantized)
    assert [type(m) for m in model] == [type(m) for m in mlp()]
