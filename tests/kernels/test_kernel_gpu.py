"""What only a GPU shows: launches, streams, graphs and memory."""

import pytest
import torch

from tests.compare import same_bits
from tests.kernels import backend

pytestmark = pytest.mark.gpu

DEVICE = backend.device()
if DEVICE.type != "cuda":
    pytest.skip("needs a GPU: run `make test-gpu`", allow_module_level=True)

from diffq.kernels.availability import available  # noqa: E402
from diffq.kernels.launch import Launch  # noqa: E402
from diffq.kernels.noisy import Noisy  # noqa: E402
from diffq.numerics.grid import BitsLaw  # noqa: E402

SHAPES = [(512, 512), (7, 9), (257, 771), (300017,)]


def batch(kind="gaussian"):
    """Kernels of large tensors, and arguments of a step."""
    law = BitsLaw(2, 15, kind == "rounding")
    noisy = Noisy(SHAPES, 8, law, kind, 0.5, torch.float32, DEVICE)
    weights = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    count = sum(-(-weight.numel() // 8) for weight in weights)
    return noisy, weights, torch.randn(count, device=DEVICE)


def step(noisy, weights, logits):
    """Values and gradients of one step."""
    sampled = noisy.sample(weights, logits)
    grads = [torch.ones_like(value) for value in sampled.values]
    return sampled.values, *noisy.gradients(sampled.state, weights, logits, grads)


def test_available():
    """Kernels are there."""
    assert available(DEVICE)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "rounding"])
def test_ways_of_launching(kind, monkeypatch):
    """Launches through Triton and past it give the same bits, in every repetition."""
    noisy, weights, logits = batch(kind)
    found = []
    for direct in (False, True, True):
        monkeypatch.setattr(Launch, "direct", direct and Launch.direct)
        torch.manual_seed(3)
        found.append(step(noisy, weights, logits))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_unaligned_logits():
    """Logits may be any part of the flat parameter."""
    noisy, weights, logits = batch()
    torch.manual_seed(3)
    expected = step(noisy, weights, logits)
    torch.manual_seed(3)
    assert same_bits(step(noisy, weights, torch.cat([logits[:1], logits])[1:]), expected)


def test_no_synchronisation():
    """A step never waits for the device, nor does one whose weights have moved."""
    noisy, weights, logits = batch()
    step(noisy, weights, logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(noisy, weights, logits)
        step(noisy, [weight.clone() for weight in weights], logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    """A step is captured in a CUDA graph, whose replays draw other noise each time."""
    noisy, weights, logits = batch()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(noisy, weights, logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, _, for_logits = step(noisy, weights, logits)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append((values[0].clone(), for_logits.clone()))
    assert not same_bits(seen[0][0], seen[1][0])
    assert not same_bits(seen[1][0], seen[2][0])
    assert seen[2][1].isfinite().all()
