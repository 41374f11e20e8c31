"""An exception inside any submodule's forward: nothing of it stays, and training goes on.

On small variants of the models that benchmarks train.
"""

from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch

from benchmarks.models import (
    EfficientNet,
    Recurrent,
    ResNet,
    Transformer,
    image_batch,
    task_loss,
    token_batch,
)
from tests.compare import close, same_bits
from tests.holder import all_bits
from tests.models import QUANTIZERS, SUMS, gradients, pairs, seeded, snapshot_of
from tests.processors import repeatable

_transformer = partial(Transformer, width=8, layers=1, heads=2, context=6)

#: Name to a function that makes the model, and one that makes inputs and targets.
MODELS = {
    "transformer": (partial(_transformer, [(24, 8)]), partial(token_batch, 24, 2, 6)),
    "banded": (partial(_transformer, [(8, 8), (16, 4)]), partial(token_batch, 24, 2, 6)),
    "resnet": (partial(ResNet, (4, 8), depth=1), partial(image_batch, 10, 4, 8)),
    "efficientnet": (
        partial(EfficientNet, [(2, 8, 1, 1, 3)], head=8),
        partial(image_batch, 10, 4, 8),
    ),
    "lstm": (partial(Recurrent, 24, 8), partial(token_batch, 24, 2, 6)),
}
PAIRS = pytest.mark.parametrize(
    ("name", "kind"), pairs(MODELS, ["diffq", "diffq-rounding", "qat", "lsq"])
)


class _Fault(Exception):
    """Made up."""


@contextmanager
def _fault_in(module):
    """The module's forward computes, and then raises instead of returning."""

    def _failing(*args):
        type(module).forward(module, *args)
        raise _Fault

    module.forward = _failing
    try:
        yield
    finally:
        del module.forward


class _Run:
    """A model in training with its batch; plain if it has no quantizer."""

    def __init__(self, name, kind=None):
        make, make_batch = MODELS[name]
        self.model = seeded(make)
        self.inputs, self.targets = make_batch()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.quantizer = None
        if kind is not None:
            # Vectors are left out, which keeps the tests quick.
            self.quantizer = QUANTIZERS[kind](self.model, min_size=0.0001)
            self.quantizer.setup_optimizer(self.optimizer, lr=1e-2)

    def call(self, training):
        """A forward from a fixed seed: gradients of a training step, or scores in eval mode."""
        torch.manual_seed(2)
        self.model.train(training)
        if not training:
            return {"scores": self.model(self.inputs).detach()}
        self.optimizer.zero_grad()
        loss = task_loss(self.model(self.inputs), self.targets)
        (loss + 0.1 * self.quantizer.model_size()).backward()
        return gradients(self.model)

    def fail(self, path, training):
        """A forward with an exception in the submodule."""
        self.model.train(training)
        with _fault_in(self.model.get_submodule(path)), pytest.raises(_Fault):
            self.model(self.inputs)

    def versions(self):
        """Name to identity and version of every parameter, its gradient, and every buffer."""
        tensors = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        tensors |= {f"{name} (gradient)": tensor.grad for name, tensor in tensors.items()}
        return {name: (id(t), t._version) for name, t in tensors.items() if t is not None}


@cache
def _submodules(name):
    """Paths of all submodules that a forward of the model runs; the root's is empty."""
    run, ran = _Run(name), {}
    for path, module in run.model.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.update({path: None}))
    run.model(run.inputs)
    return list(ran)


@cache
def _moved(name, training):
    """Path to the tensors that a fault there changes in the plain model: BatchNorm's buffers."""
    run, moved = _Run(name), {}
    for path in _submodules(name):
        before = all_bits(run.model)
        run.fail(path, training)
        moved[path] = _changed(before, all_bits(run.model))
    return moved


def _changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def _held(thing, path="", seen=None):
    """Paths at which diffq's own objects hold tensors or non-empty lists."""
    seen = set() if seen is None else seen
    filled = isinstance(thing, torch.Tensor) or (isinstance(thing, list) and thing)
    found = {path} if filled else set()
    if id(thing) not in seen:
        seen.add(id(thing))
        for key, part in _parts(thing):
            found |= _held(part, f"{path}.{key}", seen)
    return found


def _parts(thing):
    if isinstance(thing, dict):
        return thing.items()
    if isinstance(thing, (list, tuple)):
        return enumerate(thing)
    return vars(thing).items() if type(thing).__module__.startswith("diffq.") else ()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@PAIRS
def test_exception_in_each_submodule(name, kind, training):
    """It changes what it changes in the plain model and nothing else, and leaves nothing behind.

    The next forward and backward, in the same mode, are those of a model that did not fail.
    """
    run = _Run(name, kind)
    expected, held = run.call(training), _held(run.quantizer)
    for path in _submodules(name):
        values, versions = all_bits(run.model), run.versions()
        run.fail(path, training)
        moved = _moved(name, training)[path]
        assert _changed(values, all_bits(run.model)) <= moved, path
        assert _changed(versions, run.versions()) <= moved, path
        assert _held(run.quantizer) <= held, path
        assert close(run.call(training), expected, SUMS), path


@repeatable()
@PAIRS
def test_training_goes_on_after_exceptions(name, kind):
    """Steps and evals after failures in both modes are those of a model that did not fail."""
    failed, other = _Run(name, kind), _Run(name, kind)
    for number, path in enumerate(_submodules(name)):
        failed.fail(path, training=number % 2 == 0)
    with torch.no_grad():
        for buffer, moved in zip(other.model.buffers(), failed.model.buffers(), strict=True):
            buffer.copy_(moved)
    for training in (True, False, True, False):
        assert same_bits(failed.call(training), other.call(training))
        failed.optimizer.step()
        other.optimizer.step()
    assert same_bits(snapshot_of(failed.model), snapshot_of(other.model))
