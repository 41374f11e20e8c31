"""Models under torch.compile."""

import shutil

import pytest
import torch
from torch import nn

from tests.compare import close, same_bits
from tests.models import (
    QUANTIZERS,
    SUMS,
    Recurrent,
    SharedModule,
    TiedModules,
    TwoNames,
    attached,
    gradients,
    learned,
    mlp,
    seeded,
    snapshot_of,
    step,
    tokens,
)


@pytest.fixture(autouse=True)
def _forgetful():
    """Forgets compiled code before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _linear():
    return nn.Linear(16, 4)


class _Compiled:
    """A compiled model, and how many graphs were compiled so far."""

    def __init__(self, kind="diffq", make=_linear):
        self.model, self.inputs = seeded(make), torch.ones(2, 16)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05)
        self.quantizer = QUANTIZERS[kind](self.model)
        self.quantizer.setup_optimizer(self.optimizer, lr=0.1)
        self.graphs = 0
        self.compiled = torch.compile(self.model, backend=self._compile)

    def _compile(self, graph, inputs):
        # Runs the graph as it is, which needs no C compiler.
        self.graphs += 1
        return graph.forward

    def counts(self, *calls, rounds=5):
        """How many graphs there are after each round of these calls."""
        counts = []
        for _ in range(rounds):
            for call in calls:
                call(self)
            counts.append(self.graphs)
        return counts

    def train(self):
        """A training step with the size penalty."""
        step(self.compiled.train(), self.optimizer, self.inputs, self.quantizer)

    def evaluate(self):
        """An evaluation as users do it."""
        with torch.no_grad():
            self.compiled.eval()(self.inputs)

    def evaluate_with_gradient(self):
        """An evaluation whose gradient is taken."""
        self.compiled.eval()(self.inputs).sum().backward()

    def look(self):
        """Sizes and states, which are not compiled."""
        self.quantizer.true_model_size()
        self.quantizer.get_quantized_state()


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize(
    "call", [_Compiled.train, _Compiled.evaluate, _Compiled.evaluate_with_gradient]
)
def test_nothing_is_compiled_after_the_second_step(call, kind):
    """In each mode, for each quantizer, the third step and later ones compile nothing."""
    counts = _Compiled(kind).counts(call)
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * 4


def _deep():
    """More tensors than recompilations are allowed."""
    return nn.Sequential(nn.Linear(16, 8), *(nn.Linear(8, 8) for _ in range(5)), nn.Linear(8, 4))


@pytest.mark.parametrize("make", [_linear, _deep])
@pytest.mark.parametrize("kind", ["diffq", "lsq"])
def test_modes_that_alternate_compile_nothing_more(kind, make):
    """Training and evaluating in turns, with sizes and states between, settles likewise."""
    run = _Compiled(kind, make)
    counts = run.counts(_Compiled.train, _Compiled.look, _Compiled.evaluate, _Compiled.look)
    assert counts[1:] == [counts[1]] * 4


@pytest.mark.parametrize("make", [TwoNames, SharedModule])
def test_ties_compile_nothing_more(make):
    """Tied tensors and shared modules compile nothing after the second step."""
    counts = _Compiled("diffq", make).counts(_Compiled.train, _Compiled.evaluate)
    assert counts[1:] == [counts[1]] * 4


@pytest.mark.parametrize("rounding", [False, True])
def test_frozen_bits_compile_once_more(rounding):
    """After freeze_bits there is nothing more to compile from the second step on either."""
    run = _Compiled()
    run.counts(_Compiled.train, rounds=2)
    run.quantizer.freeze_bits(rounding=rounding)
    counts = run.counts(_Compiled.train)
    assert counts[1:] == [counts[1]] * 4


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [
        "diffq",
        "diffq-rounding",
        pytest.param("qat", marks=pytest.mark.slow),
        pytest.param("lsq", marks=pytest.mark.slow),
        pytest.param("product", marks=pytest.mark.slow),
    ],
)
def test_compiled_model(kind, backend):
    """A compiled model trains, evaluates like eager, and compiles once in each mode."""
    if backend == "inductor" and not any(map(shutil.which, ("gcc", "g++", "clang", "cc"))):
        pytest.skip("inductor needs a C compiler, and none is on the path")
    model = seeded(mlp)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    compiled = torch.compile(model, backend=backend)
    inputs = torch.randn(4, 16)

    def _both_modes():
        model.train()
        step(compiled, optimizer, inputs, quantizer)
        model.eval()
        with torch.no_grad():
            return compiled(inputs)

    before = snapshot_of(model)
    for _ in range(2):
        _both_modes()
    with torch._dynamo.config.patch(error_on_recompile=True):
        outputs = [_both_modes() for _ in range(3)]
    assert not same_bits(snapshot_of(model), before)
    assert not close(outputs[0], outputs[1])
    with torch.no_grad():
        assert close(model(inputs), outputs[-1])
    assert all(p.grad is not None for _, p in learned(model))


def test_compiled_model_in_one_graph():
    """A compiled training forward is one graph, and its noise differs between steps."""
    model, _ = attached(mlp)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = torch.randn(4, 16)
    assert not close(compiled(inputs), compiled(inputs))


@pytest.mark.parametrize("make", [TiedModules, pytest.param(Recurrent, marks=pytest.mark.slow)])
def test_compiled_ties_and_recurrent_layers(make):
    """Compiled models with ties or a recurrent layer train and evaluate like eager ones."""
    model, quantizer = attached(make)
    compiled = torch.compile(model, backend="aot_eager")
    inputs = tokens()
    (compiled(inputs).square().mean() + quantizer.model_size()).backward()
    assert all(grad is not None and grad.any() for grad in gradients(model).values())
    model.eval()
    with torch.no_grad():
        assert close(compiled(inputs), model(inputs))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("centroids", ["float16", pytest.param("int8", marks=pytest.mark.slow)])
def test_compiled_centroids(backend, centroids):
    """After a stage, a compiled model trains its centroids, and computes with the stored ones."""
    model = seeded(mlp)
    quantizer = QUANTIZERS["product"](model, centroids=centroids)
    quantizer.setup_optimizer(torch.optim.SGD(model.parameters(), 0.1))
    quantizer.quantize_stage()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    inputs = torch.randn(4, 16)
    grads = []
    for network in (model, compiled):
        model.zero_grad()
        network(inputs).square().mean().backward()
        grads.append([p.grad for n, p in model.named_parameters() if n.endswith("codebook")])
    assert close(*grads, SUMS)
    model.eval()
    with torch.no_grad():
        assert close(compiled(inputs), model(inputs))
