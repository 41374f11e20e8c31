"""Bits learn only where noise acted: the size moves no bits of tensors that no forward read."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffq
from tests.holder import bits_of, weight_quantizers
from tests.models import mlp, seeded, step


class Dropping(nn.Module):
    """Three residual layers, of which `dropped` says which are left out."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.dropped = set()
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for place, layer in enumerate(self.layers):
            if place in self.dropped:
                continue
            if self.use_reentrant is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


class Listed(nn.Module):
    """Layers whose weights the model keeps in a list of its own, and reads there."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.kept = [layer.weight for layer in self.layers][1:]

    def forward(self, x):
        x = self.layers[0](x)
        for weight in self.kept:
            x = torch.relu(x @ weight)
        return x


def _attached(model, noise="gaussian"):
    """A model, its optimizer, its quantizer of all weights, and the logits of each."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    quantizer = diffq.DiffQuantizer(model, min_size=0, exclude=["bias"], noise=noise)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    return optimizer, quantizer, list(weight_quantizers(model).values())


def _moved(model, train, steps=3, **options):
    """Which tensors' bits training moves: `train` makes the loss of one step."""
    optimizer, quantizer, tensors = _attached(model, **options)
    before = [bits_of(tensor.logits) for tensor in tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffq.DiffqWarning)
        for _ in range(steps):
            optimizer.zero_grad()
            train(model, quantizer).backward()
            optimizer.step()
    return [bits_of(tensor.logits) != old for tensor, old in zip(tensors, before, strict=True)]


def _loss(model, quantizer):
    inputs = torch.randn(4, 8, requires_grad=True)
    return model(inputs).square().mean() + quantizer.model_size()


@pytest.mark.parametrize("noise", ["gaussian", "uniform", "rounding"])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_bits_of_dropped_layers_do_not_drift(use_reentrant, noise):
    """The bits of a layer that no step reads stay as they are, to the bit."""
    model = seeded(lambda: Dropping(use_reentrant))
    model.dropped = {1}
    assert _moved(model, _loss, noise=noise) == [True, False, True]


def test_layers_in_eval_keep_their_bits():
    """A part in eval mode, the usual way to keep statistics, computes without noise or gradient."""

    def train(model, quantizer):
        model.train()
        model.layers[0].eval()
        return _loss(model, quantizer)

    assert _moved(seeded(Dropping), train) == [False, True, True]


def test_layers_without_gradients_keep_their_bits():
    """A part that runs under no_grad passes no gradient to its bits, and the size none either."""

    class Frozen(Dropping):
        def forward(self, x):
            with torch.no_grad():
                x = self.layers[0](x)
            return self.layers[2](self.layers[1](x))

    assert _moved(seeded(Frozen), _loss) == [False, True, True]


def test_weights_in_a_list_keep_their_bits():
    """Weights that the model reads from a list of its own have no noise, and learn no bits."""
    assert _moved(seeded(Listed), _loss) == [True, False, False]


def test_frozen_weights_learn_bits():
    """Bits of weights that stay as they are learn, since their noise acts."""
    model = seeded(Dropping)
    model.layers[0].weight.requires_grad_(False)
    assert _moved(model, _loss) == [True, True, True]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["size last", "size first"])
def test_the_size_may_come_before_the_forward(order):
    """A loop that asks for the size before its forward moves the same bits, a step later."""
    seen = []

    def train(model, quantizer):
        model.dropped = {1}
        parts = [lambda: model(torch.randn(4, 8)).square().mean(), quantizer.model_size]
        loss = sum(parts[place]() for place in order)
        dropped = weight_quantizers(model)["layers.1.weight"]
        seen.append(bool(dropped.gradient_of(loss, retain_graph=True).any()))
        return loss

    first, _, last = _moved(seeded(Dropping), train)
    assert [first, last] == [True, True]
    # Before its first forward, nothing is known of what a training reads.
    assert seen == [order == (1, 0), False, False]


def test_all_forwards_since_the_last_step_count():
    """With accumulated gradients, a layer that any of the forwards read gets its gradient."""
    model = seeded(Dropping)
    optimizer, quantizer, tensors = _attached(model)

    def read_by_forwards(*dropped):
        for each in dropped:
            model.dropped = each
            model(torch.randn(2, 8))
        size = quantizer.model_size()
        return [bool(each.gradient_of(size, retain_graph=True).any()) for each in tensors]

    assert read_by_forwards({0, 1}) == [False, False, True]
    assert read_by_forwards({1, 2}) == [True, False, True]
    optimizer.zero_grad()
    optimizer.step()
    assert read_by_forwards({0, 2}) == [False, True, False]


def test_the_size_is_that_of_all_tensors():
    """Tensors that are not read count as much as ever."""
    model = seeded(Dropping)
    _, quantizer, _ = _attached(model)
    before = quantizer.model_size().item()
    model.dropped = {0, 1}
    model(torch.randn(2, 8))
    assert quantizer.model_size().item() == before


def test_a_copy_learns_by_itself():
    """What a deep copy reads moves its own bits only."""
    model = seeded(Dropping)
    _attached(model)
    other = copy.deepcopy(model)
    diffq.quantizer_of(other).no_optimizer()
    other(torch.randn(2, 8))
    diffq.quantizer_of(other).model_size().backward()
    grads = [[q.grad for q in weight_quantizers(m).values()] for m in (model, other)]
    assert all(grad is None for grad in grads[0])
    assert all(grad.all() for grad in grads[1])


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_layers_that_take_turns_learn(use_reentrant):
    """A layer that every other step reads learns in each of them, under checkpoints too."""
    model = seeded(lambda: Dropping(use_reentrant))
    optimizer, quantizer, tensors = _attached(model)
    for count in range(6):
        model.dropped = {count % 2}
        optimizer.zero_grad()
        model(torch.randn(4, 8, requires_grad=True))
        quantizer.model_size().backward()
        learns = [bool(tensor.grad.any()) for tensor in tensors]
        assert learns == [count % 2 == 1, count % 2 == 0, True]
        optimizer.step()


def test_copies_end_their_steps():
    """A model that is copied with its optimizer goes on like the original."""
    model = seeded(Dropping)
    optimizer, _, _ = _attached(model)
    other, optimizer = copy.deepcopy((model, optimizer))
    quantizer = diffq.quantizer_of(other)
    other.dropped = {1}
    step(other, optimizer, torch.randn(4, 8), quantizer)
    other.dropped = {0}
    step(other, optimizer, torch.randn(4, 8), quantizer)
    grads = [q.grad for q in weight_quantizers(other).values()]
    assert [bool(grad.any()) for grad in grads] == [False, True, True]


def test_replicas_share_their_readings():
    """What a replica of DataParallel reads counts for the model that it was made of."""
    model = seeded(mlp)
    quantizer = diffq.DiffQuantizer(model, min_size=0, include=["weight"])
    quantizer.no_optimizer()
    replica = model[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = model[0].weight.clone(), model[0].bias.clone()
    replica(torch.randn(2, 16))
    assert weight_quantizers(model)["0.weight"].gradient_of(quantizer.model_size()).all()


# Warnings


def test_layer_drop_is_not_warned_of():
    """A LayerDrop leaves layers out by design, so its layers are not named."""
    model = nn.Sequential(
        diffq.LayerDrop([nn.Linear(8, 8) for _ in range(3)], 0.9), nn.Linear(8, 8)
    )
    optimizer, quantizer, _ = _attached(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", diffq.DiffqWarning)
        for _ in range(3):
            step(model, optimizer, torch.randn(4, 8), quantizer)


def test_steps_without_a_forward_are_not_warned_of():
    """Code that steps an optimizer to fill its state has read nothing, and uses no warning up."""
    model = seeded(Listed)
    optimizer, quantizer, _ = _attached(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", diffq.DiffqWarning)
        optimizer.step()
    with pytest.warns(diffq.DiffqWarning, match="first step did not read"):
        step(model, optimizer, torch.randn(4, 8), quantizer)


def test_unread_tensors_are_named_once():
    """After the first step, one warning names the tensors that it did not read, and no other."""
    model = seeded(Listed)
    optimizer, quantizer, _ = _attached(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", diffq.DiffqWarning)
        for _ in range(3):
            step(model, optimizer, torch.randn(4, 8), quantizer)
    (message,) = (str(warning.message) for warning in caught)
    assert "did not read layers.1.weight, layers.2.weight. " in message


def test_models_that_read_all_are_not_warned():
    """Training, saving and evaluating a model that reads its tensors is silent."""
    model = seeded(mlp)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.setup_optimizer(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", diffq.DiffqWarning)
        quantizer.get_quantized_state()
        step(model, optimizer, torch.randn(4, 16), quantizer)
        model.eval()(torch.randn(4, 16))
        quantizer.get_quantized_state()


@pytest.mark.parametrize("training", [True, False])
def test_what_is_stored_but_never_read_is_named_once(training):
    """A quantizer without bits to learn names such tensors when their values are stored."""
    model = seeded(Listed).train(training)
    quantizer = diffq.QATQuantizer(model, min_size=0, exclude=["bias"])
    model(torch.randn(4, 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", diffq.DiffqWarning)
        for _ in range(2):
            quantizer.get_quantized_state()
    (message,) = (str(warning.message) for warning in caught)
    assert "no forward has read layers.1.weight, layers.2.weight there." in message
