"""Activation checkpointing: what runs again in a backward reads the samples of its own forward."""

import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.compare import close, same_bits
from tests.models import SUMS, attached, gradients, seeded
from tests.readers import COARSE, Reader, reads_parameters, seen_by, stored, x16

MODES = pytest.mark.parametrize("use_reentrant", [True, False])


class Blocks(nn.Module):
    """Checkpointed blocks that share a layer, whose weight the root reads too.

    `use_reentrant` is None for no checkpointing; `interrupt` is called in each block.
    """

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList(Reader() for _ in range(2))
        self.shared = Reader()
        self.use_reentrant = use_reentrant
        self.interrupt = lambda: None

    def block(self, layer, x):
        x = torch.tanh(self.shared(layer(x)))
        self.interrupt()
        return x + F.linear(x, self.shared.weight)

    def forward(self, x):
        for layer in self.blocks:
            if self.use_reentrant is None:
                x = self.block(layer, x)
            else:
                x = checkpoint(self.block, layer, x, use_reentrant=self.use_reentrant)
        return x


def _attached(use_reentrant, kind="diffq", **options):
    model, quantizer = attached(Blocks, kind, **options)
    model.use_reentrant = use_reentrant
    return model, quantizer


def _inputs():
    return x16().requires_grad_()


def _recomputed_alike(model):
    """Whether each layer's second half of reads has the bits of the first."""
    for seen in seen_by(model):
        half = len(seen) // 2
        assert half > 0
        assert len(seen) == 2 * half
        yield sorted(map(_key, seen[:half])) == sorted(map(_key, seen[half:]))


def _key(weight):
    return weight.numpy().tobytes()


@MODES
@pytest.mark.parametrize("kind", ["diffq", "diffq-uniform", "diffq-rounding", "quant-noise", "qat"])
def test_the_second_run_reads_the_bits_of_the_first(kind, use_reentrant):
    """Layers that run again in the backward read the same weights, bit for bit."""
    model, _ = _attached(use_reentrant, kind)
    model(_inputs()).square().sum().backward()
    assert all(_recomputed_alike(model))
    assert reads_parameters(model)


@MODES
def test_forwards_in_any_order(use_reentrant):
    """With three forwards open, backwards in any order each read their own forward's weights."""
    model, _ = _attached(use_reentrant)
    layer = model.blocks[0]
    losses = []
    for _ in range(3):
        losses.append(model(_inputs()).square().sum())
        assert reads_parameters(model)
    firsts = list(layer.seen)
    for place in (1, 2, 0):
        layer.seen.clear()
        losses[place].backward()
        assert len(layer.seen) == 1
        assert same_bits(layer.seen[0], firsts[place])
        assert reads_parameters(model)


@MODES
def test_a_forward_between_forward_and_backward(use_reentrant):
    """An evaluation and a training forward in between change nothing for the backward."""
    wanted = []
    for between in (False, True):
        model, _ = _attached(use_reentrant)
        torch.manual_seed(3)
        loss = model(x16().requires_grad_()).square().sum()
        if between:
            with torch.no_grad():
                model.eval()(x16())
                model.train()(x16())
        loss.backward()
        wanted.append(gradients(model))
    assert close(*wanted, SUMS)


@MODES
def test_eval_mode_with_gradients(use_reentrant):
    """In eval mode both runs read the stored values."""
    model, quantizer = _attached(use_reentrant)
    model.eval()
    model(_inputs()).sum().backward()
    value = stored(Blocks, quantizer)["shared.weight"].detach()
    assert all(same_bits(weight, value) for weight in model.shared.seen)
    assert len(model.shared.seen) == 4
    assert reads_parameters(model)


@MODES
def test_backward_in_another_thread(use_reentrant):
    """A backward in another thread than its forward reads the forward's weights too."""
    model, _ = _attached(use_reentrant)
    loss = model(_inputs()).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert all(_recomputed_alike(model))
    assert reads_parameters(model)


def test_a_graph_that_is_kept():
    """Two backwards through one graph read the weights of the one forward."""
    model, _ = _attached(False)
    loss = model(_inputs()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for seen in seen_by(model):
        assert all(same_bits(weight, seen[0]) for weight in seen)
    assert reads_parameters(model)


def test_nested_checkpoints():
    """A checkpoint inside of a checkpoint reads the same weights at each of its runs."""

    class Nested(Blocks):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, _ = attached(Nested)
    model.use_reentrant = False
    model(_inputs()).square().sum().backward()
    for seen in seen_by(model):
        assert len(seen) >= 2
        assert all(same_bits(weight, seen[0]) for weight in seen)
    assert reads_parameters(model)


@dataclass
class Output:
    """What models of other libraries return."""

    loss: torch.Tensor


def _in_a_dataclass(model, loss):
    return Output(loss)


def _in_an_object(model, loss):
    output = type("Output", (), {})()
    output.loss = loss
    return output


def _in_containers(model, loss):
    return {"losses": [(loss,)]}


def _on_the_model(model, loss):
    model.loss = loss


@MODES
@pytest.mark.parametrize(
    "give",
    [_in_a_dataclass, _in_an_object, _in_containers, _on_the_model],
    ids=lambda f: f.__name__,
)
def test_outputs_of_any_kind(give, use_reentrant):
    """However a loss leaves the forward, its backward reads the forward's weights."""

    class Giving(Blocks):
        def forward(self, x):
            return give(self, super().forward(x).square().sum())

    model, _ = attached(Giving)
    model.use_reentrant = use_reentrant
    output = model(_inputs())
    loss = output["losses"][0][0] if isinstance(output, dict) else (output or model).loss
    loss.backward()
    assert all(_recomputed_alike(model))
    assert reads_parameters(model)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@MODES
def test_an_error_while_running_again(use_reentrant, error):
    """After an error in the second run, reads give Parameters and the next step is right."""
    wanted = []
    for fails in (False, True):
        model, _ = _attached(use_reentrant)
        loss = model(_inputs()).sum()

        def interrupt():
            raise error

        if fails:
            model.interrupt = interrupt
            with pytest.raises(error):
                loss.backward()
            assert reads_parameters(model)
            model.interrupt = lambda: None
        model.zero_grad()
        torch.manual_seed(4)
        model(_inputs()).square().sum().backward()
        wanted.append(gradients(model))
    assert close(*wanted, SUMS)


@MODES
def test_an_error_in_a_hook_of_the_backward(use_reentrant):
    """An error before anything runs again leaves nothing behind either."""
    model, _ = _attached(use_reentrant)
    output = model(_inputs())
    output.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.sum().backward()
    assert reads_parameters(model)
    for seen in seen_by(model):
        seen.clear()
    model(_inputs()).square().sum().backward()
    assert all(_recomputed_alike(model))


def test_a_part_that_is_checkpointed_by_code_outside():
    """A part that unattached code checkpoints reads its own sample in both runs."""
    head = nn.Linear(16, 1)
    model, _ = attached(Reader, **COARSE)
    for use_reentrant in (True, False):
        model.seen.clear()
        head(checkpoint(model, _inputs(), use_reentrant=use_reentrant)).sum().backward()
        first, again = model.seen
        assert same_bits(first, again)
        assert reads_parameters(model)


def test_gradients_by_autograd_grad():
    """`torch.autograd.grad` reads the forward's weights as `backward` does."""
    results = []
    for use_reentrant in (None, False):
        model, _ = seeded(lambda use=use_reentrant: _attached(use))
        torch.manual_seed(5)
        loss = model(_inputs()).square().sum()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
        assert reads_parameters(model)
    assert close(*results, SUMS)
