"""Models under torch.compile."""

import shutil

import pytest
import torch

from tests.models import (
    QUANTIZERS,
    Recurrent,
    TiedModules,
    attached,
    gradients,
    learned,
    mlp,
    same_tensors,
    seeded,
    snapshot_of,
    step,
    tokens,
)


@pytest.fixture
def _compiler():
    """Skips without a C compiler, and forgets compiled code before and after."""
    if not any(map(shutil.which, ("gcc", "g++", "clang", "cc"))):
        pytest.skip("torch.compile needs a C compiler, and none is on the path")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler")
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
    assert not same_tensors(snapshot_of(model), before)
    assert not torch.equal(outputs[0], outputs[1])
    with torch.no_grad():
        assert torch.allclose(model(inputs), outputs[-1], atol=1e-5)
    assert all(p.grad is not None for _, p in learned(model))


@pytest.mark.usefixtures("_compiler")
def test_compiled_model_in_one_graph():
    """A compiled training forward is one graph, and its noise differs between steps."""
    model, _ = attached(mlp)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = torch.randn(4, 16)
    assert not torch.equal(compiled(inputs), compiled(inputs))


@pytest.mark.usefixtures("_compiler")
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
        assert torch.allclose(compiled(inputs), model(inputs), atol=1e-5)


@pytest.mark.usefixtures("_compiler")
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
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*grads, strict=True))
    model.eval()
    with torch.no_grad():
        assert torch.allclose(compiled(inputs), model(inputs), atol=1e-6)
