"""Compiled models, CUDA graphs and streams."""

import shutil
from functools import partial
from itertools import pairwise

import pytest
import torch

from tests.compare import close, same_bits
from tests.gpu import place
from tests.gpu.place import OUTPUTS, Training, adam, cuda_only, sgd
from tests.models import SUMS, computed_weight, gradients, snapshot_of, step

pytestmark = pytest.mark.gpu

DEVICE = place.device()

KINDS = ["diffq", "diffq-tensor", "diffq-rounding", "qat", "lsq", "quant-noise", "product"]
#: Those that compute with the same values in each forward, while nothing changes.
EXACT = ["diffq-rounding", "qat", "lsq"]


@pytest.fixture
def _forgetful():
    """Forgets compiled code before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forgetful")
@pytest.mark.parametrize(
    "options",
    [{"fullgraph": True}, pytest.param({"mode": "reduce-overhead"}, marks=cuda_only)],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_model(kind, options):
    """A compiled model trains as an eager one, with other noise each time, and evaluates alike."""
    if DEVICE.type == "cpu" and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    plain, training = (Training("mlp", kind, optimizer=sgd) for _ in range(2))
    compiled = torch.compile(training.model, **options)
    for _ in range(4):
        expected = plain.gradients()
        step(compiled.train(), training.optimizer, training.inputs, training.quantizer)
        if kind in EXACT:
            assert close(gradients(training.model), expected, SUMS)
    with torch.no_grad():
        outputs = [model.eval()(training.inputs).clone() for model in (compiled, training.model)]
    assert close(*outputs, OUTPUTS)


@pytest.mark.usefixtures("_forgetful")
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"mode": "reduce-overhead"}, marks=cuda_only)], ids=str
)
def test_compiled_noise(options):
    """Noise is drawn in each compiled forward, not once for all."""
    training = Training("mlp", "diffq", optimizer=partial(torch.optim.SGD, lr=0.0))
    compiled = torch.compile(training.model, **options)
    found = []
    for _ in range(4):
        training.optimizer.zero_grad()
        compiled(training.inputs).square().mean().backward()
        found.append(gradients(training.model))
    assert all(not close(one, other, SUMS) for one, other in pairwise(found))


def _warmed(training):
    """A training after three steps on a stream of its own, as a capture asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training.steps(3)
    torch.cuda.current_stream().wait_stream(side)
    return training


@cuda_only
@pytest.mark.parametrize("kind", EXACT)
def test_steps_in_a_cuda_graph(kind):
    """Whole steps that a CUDA graph replays are those of eager training."""
    plain = Training("mlp", kind, optimizer=sgd).steps(6)
    training, graph = _warmed(Training("mlp", kind, optimizer=sgd)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.step()
    for _ in range(3):
        graph.replay()
    assert close(snapshot_of(training.model), snapshot_of(plain.model), SUMS)


@cuda_only
@pytest.mark.parametrize("kind", ["diffq", "diffq-tensor", "diffq-uniform", "quant-noise"])
def test_noise_in_a_cuda_graph(kind):
    """Each replay of a CUDA graph draws other noise, and the optimizer of the graph learns."""
    capturable = partial(adam, capturable=True)
    training, graph = _warmed(Training("mlp", kind, optimizer=capturable)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = computed_weight(training.model, "0.weight").detach()
        noise = drawn - training.model[0].weight.detach()
        training.step()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append((noise.clone(), snapshot_of(training.model)))
    assert not same_bits(seen[0][0], seen[1][0])
    assert not same_bits(seen[1][0], seen[2][0])
    assert not same_bits(seen[1][1], seen[2][1])
    assert all(value.isfinite().all() for value in seen[2][1].values())


@cuda_only
@pytest.mark.parametrize("kind", EXACT)
def test_another_stream(kind):
    """Steps on another stream than the default one are the same, whatever stream the next is on."""
    plain = Training("mlp", kind, optimizer=sgd).steps(6)
    training = _warmed(Training("mlp", kind, optimizer=sgd)).steps(3)
    assert close(snapshot_of(training.model), snapshot_of(plain.model), SUMS)
