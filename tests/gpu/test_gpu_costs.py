"""What a step costs on a GPU beyond plain training: launches and memory."""

import gc
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.gpu_work import work_of
from tests.gpu import place
from tests.gpu.place import Training

pytestmark = pytest.mark.gpu

DEVICE = place.device()
if DEVICE.type != "cuda":
    pytest.skip("CUDA alone has this", allow_module_level=True)

from diffq.attach import batch  # noqa: E402

#: Quantizers, and the launches that they may add to a forward, a size and a backward.
KINDS = {
    "diffq": 50,
    "diffq-tensor": 50,
    "diffq-rounding": 50,
    "diffq-fixed": 25,
    "qat": 15,
    "quant-noise": 15,
    "lsq": 25,
}


def _layers(count, width):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def _training(kind, count, width=32):
    """A training of many layers, after its first steps."""
    pair = partial(_layers, count, width), lambda: torch.randn(4, width)
    return Training(pair, kind).steps(2)


def _launches(kind, count):
    """Launches of a forward, the size and a backward; those of optimizers are their own."""
    training = _training(kind, count)
    training.optimizer.zero_grad()

    def run():
        loss = training.model(training.inputs).square().mean()
        if kind is not None:
            loss = loss + training.quantizer.model_size()
        loss.backward()

    return work_of(run).launches


@pytest.mark.parametrize("kind", KINDS)
def test_launches_do_not_grow_with_the_number_of_tensors(kind):
    """A step of 60 tensors adds as many launches to plain training as one of 8."""
    few, many = (_launches(kind, count) - _launches(None, count) for count in (4, 30))
    assert few <= KINDS[kind]
    # A copy of many tensors may be cut in two.
    assert many <= few + 2


def _peak(kind, count, width):
    """Bytes at the peak of a step, without those of what was there before."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    training = _training(kind, count, width)
    torch.cuda.reset_peak_memory_stats()
    training.step()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(
    ("kind", "learned"), [("diffq", 1), ("diffq-rounding", 1), ("qat", 0), ("lsq", 0)]
)
def test_memory(kind, learned):
    """A step holds a copy of the weights, what is learned, and the gradients of two batches."""
    count, width = 48, 1024
    copy = 4 * count * width**2
    plain = _peak(None, count, width)
    added = _peak(kind, count, width) - plain
    # At g = 4 in this test: logits, their gradient and the two averages of Adam.
    allowed = copy * (1 + learned * 4 / 4) + 2 * 4 * batch._MOST_ELSEWHERE
    assert added <= 1.05 * allowed
