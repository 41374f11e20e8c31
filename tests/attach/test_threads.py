"""Threads: a forward in one of them is none in the others."""

import threading

import pytest
import torch
from torch import nn

from tests.compare import close, same_bits
from tests.models import SUMS, attached, gradients, mlp
from tests.readers import COARSE, Reader, readers, reads_parameters, seen_by, stored, x16

TIMEOUT = 60


class Waiting(nn.Module):
    """A layer before and after a point at which the forward waits."""

    def __init__(self):
        super().__init__()
        self.layer = Reader()
        self.wait = []

    def forward(self, x):
        x = self.layer(x)
        for wait in self.wait:
            wait()
        return self.layer(x)


def _in_thread(function, *arguments):
    """Starts a thread; the list gets what the function returns."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    return thread, results


@pytest.mark.parametrize("training", [True, False])
def test_reads_while_another_thread_is_in_a_forward(training):
    """A thread outside of any forward reads Parameters while another is in the midst of one."""
    model, _ = attached(Waiting, **COARSE)
    model.train(training)
    inside, looked = threading.Event(), threading.Event()
    model.wait = [inside.set, lambda: looked.wait(TIMEOUT)]
    thread, results = _in_thread(model, x16())
    try:
        assert inside.wait(TIMEOUT)
        plain = reads_parameters(model)
    finally:
        looked.set()
        thread.join()
    assert plain
    assert results[0].shape == (3, 16)
    assert same_bits(*model.layer.seen)


def test_training_forwards_in_two_threads():
    """Two training forwards at once each compute with one sample of their own, to the end."""
    model, _ = attached(Waiting)
    barrier, seen = threading.Barrier(2, timeout=TIMEOUT), {}
    model.wait = [barrier.wait]

    def note(layer, _):
        seen.setdefault(threading.get_ident(), []).append(layer.weight.detach().clone())

    model.layer.register_forward_pre_hook(note)
    threads = [_in_thread(model, x16()) for _ in range(2)]
    for thread, _ in threads:
        thread.join()
    samples = [weights[0] for weights in seen.values()]
    assert len(samples) == 2
    assert all(same_bits(w, weights[0]) for weights in seen.values() for w in weights)
    assert not same_bits(*samples)
    assert reads_parameters(model)


def test_evaluations_in_many_threads():
    """Threads that evaluate at once all compute with the stored values."""
    model, quantizer = attached(readers, **COARSE)
    model.eval()

    def evaluate():
        with torch.no_grad():
            for _ in range(20):
                model(x16())

    threads = [_in_thread(evaluate) for _ in range(4)]
    for thread, _ in threads:
        thread.join()
    values = stored(readers, quantizer)
    for seen, name in zip(seen_by(model), ["0.0.weight", "0.1.weight", "2.weight"], strict=True):
        assert len(seen) == 80
        assert all(same_bits(weight, values[name].detach()) for weight in seen)
    assert reads_parameters(model)


def test_a_forward_and_its_backward_in_different_threads():
    """Gradients of a backward in another thread are those of one in the same."""
    results = []
    for elsewhere in (False, True):
        model, quantizer = attached(mlp)
        torch.manual_seed(3)
        loss = model(x16()).square().sum() + quantizer.model_size()
        if elsewhere:
            thread, _ = _in_thread(loss.backward)
            thread.join()
        else:
            loss.backward()
        results.append(gradients(model))
        assert reads_parameters(model)
    assert close(*results, SUMS)


def test_a_block_of_computing_is_one_threads():
    """A block of `computing()` changes what its own thread reads, and no other."""
    model, quantizer = attached(mlp, **COARSE)
    model.eval()
    with quantizer.computing():
        thread, results = _in_thread(reads_parameters, model)
        thread.join()
        assert not reads_parameters(model)
    assert results == [True]
    assert reads_parameters(model)


@pytest.mark.parametrize("training", [True, False])
def test_a_state_that_another_thread_takes(training):
    """A state dict or a quantized state taken during a forward is the one from before it."""
    model, quantizer = attached(Waiting, **COARSE)
    model.train(training)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    values = {n: p.detach().clone() for n, p in stored(Waiting, quantizer).items()}
    taken = []

    def take():
        thread, _ = _in_thread(
            lambda: taken.extend((dict(model.state_dict()), stored(Waiting, quantizer)))
        )
        thread.join()

    model.wait = [take]
    model(x16())
    assert same_bits(taken[0], wanted)
    assert same_bits({n: p.detach() for n, p in taken[1].items()}, values)
