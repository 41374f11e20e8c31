"""Bad models and bad weights: one tree of errors, clear messages, and nothing changed."""

import inspect
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import diffq
from diffq import errors
from tests.holder import weight_quantizers
from tests.models import QUANTIZERS, mlp, refused, state_of

# The tree


def test_one_tree():
    """Every error class of diffq is a DiffqError, its warning a UserWarning; all are public."""
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    assert len(classes) >= 8
    for error in classes:
        assert issubclass(error, errors.DiffqError | UserWarning)
        assert getattr(diffq, error.__name__) is error
        assert error.__name__ in diffq.__all__


def test_tree_is_drawn():
    """The docstring of diffq.errors draws every class under its parent."""
    depth = {}
    for line in inspect.getdoc(errors).splitlines():
        if match := re.match(r"( *)\* (\w+)", line):
            depth[match[2]] = len(match[1]) // 4
    classes = {c.__name__: c for _, c in inspect.getmembers(errors, inspect.isclass)}
    assert depth.keys() == classes.keys()
    roots = {errors.DiffqError, errors.DiffqWarning}
    for name, c in classes.items():
        assert c.__mro__[depth[name]] in roots


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (diffq.ConfigError, ValueError),
        (diffq.AttachError, RuntimeError),
        (diffq.OptimizerError, RuntimeError),
        (diffq.CalibrationError, RuntimeError),
        (diffq.WeightError, ValueError),
        (diffq.StateError, ValueError),
        (diffq.MismatchError, diffq.StateError),
        (diffq.FormatError, ValueError),
    ],
)
def test_errors_are_builtin_ones_too(error, builtin):
    """Code that expects Python's own errors catches diffq's."""
    assert issubclass(error, builtin)


# Models


@pytest.mark.parametrize("second", ["diffq", "qat", "lsq"])
@pytest.mark.parametrize("first", ["diffq", "qat"])
def test_second_quantizer(first, second):
    """A second quantizer on the same model is refused, and the first one works on."""
    model = mlp()
    quantizer = QUANTIZERS[first](model)
    size = quantizer.true_model_size()
    refused(model, diffq.AttachError, QUANTIZERS[second], "already", "detach()")
    assert quantizer.true_model_size() == size


@pytest.mark.parametrize("attach_to", ["part", "whole"])
def test_second_quantizer_on_an_overlapping_model(attach_to):
    """A quantizer on a part of a quantized model, or on what contains one, is refused."""
    model = mlp()
    first, second = (model, model[0]) if attach_to == "part" else (model[0], model)
    diffq.QATQuantizer(first, min_size=0)
    refused(second, diffq.AttachError, QUANTIZERS["diffq"], "already")


@pytest.mark.parametrize(
    "wrap", [DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compile"]
)
def test_wrapped_model(wrap, monkeypatch):
    """A wrapped or compiled model is refused with the order to write instead."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # DataParallel would move it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wrapped = wrap(mlp())
    refused(
        wrapped, diffq.AttachError, QUANTIZERS["diffq"], type(wrapped).__name__, "before", "model ="
    )


def test_distributed_model(tmp_path):
    """A model wrapped by DistributedDataParallel is refused."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(mlp())
        refused(wrapped, diffq.AttachError, QUANTIZERS["diffq"], "DistributedDataParallel")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "model", [None, 5, mlp().state_dict(), list(mlp().parameters()), nn.Linear]
)
def test_no_model(model):
    """What is no module is refused by its type."""
    with pytest.raises(diffq.AttachError, match=rf"Module.*{type(model).__name__}"):
        diffq.DiffQuantizer(model)


def test_lazy_model():
    """A lazy model is refused with the remedy."""
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(diffq.AttachError, match=r"0\.weight.*forward"):
        diffq.DiffQuantizer(lazy, min_size=0)
    assert type(lazy[0]) is nn.LazyLinear


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_bad_weights_at_attach(kind, value):
    """A weight that holds NaN or Inf is refused by name."""
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 4] = value
    refused(model, diffq.WeightError, QUANTIZERS[kind], "2.weight", "NaN or Inf", "exclude")


def test_bad_weights_that_are_not_quantized():
    """NaN in a tensor that is not quantized is no error, and is stored exactly."""
    model = mlp()
    with torch.no_grad():
        model[2].bias[0] = math.nan
    quantizer = diffq.QATQuantizer(model, min_size=0, exclude=["2.bias"])
    fresh = diffq.restore_quantized_state(mlp(), quantizer.get_quantized_state())
    assert fresh[2].bias[0].isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_bad_weights_later(kind, value):
    """A weight that training spoiled is refused by name in eval, states and sizes."""
    model = mlp()
    quantizer = QUANTIZERS[kind](model)
    with torch.no_grad():
        model[2].weight[3, 4] = value
    model.eval()
    calls = [
        lambda: model(torch.ones(1, 16)),
        quantizer.get_quantized_state,
        quantizer.snapshot,
        lambda: quantizer.detach(quantized=True),
    ]
    if kind not in ("lsq", "product"):
        # The sizes of those do not depend on the weights.
        calls.append(quantizer.true_model_size)
    before = state_of(model)
    for call in calls:
        with pytest.raises(diffq.WeightError, match=r"2\.weight"):
            call()
    assert state_of(model) == before


@pytest.mark.parametrize("call", ["true_model_size", "bits", "mean_bits", "get_quantized_state"])
def test_bad_bitwidths(call):
    """A NaN loss that reached the bitwidths is reported at the next size or state, by name."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model, exclude=["0.*", "2.bias"])
    quantizer.setup_optimizer(optimizer, lr=0.1)
    model(torch.ones(1, 16))
    (quantizer.model_size() * math.nan).backward()
    optimizer.step()
    with pytest.raises(diffq.WeightError, match=r"bitwidths of 2\.weight.*NaN"):
        getattr(quantizer, call)()


def test_bad_bitwidths_in_eval():
    """Evaluation with NaN bitwidths is refused by name instead of computing NaN."""
    model = mlp()
    QUANTIZERS["diffq"](model)
    with torch.no_grad():
        weight_quantizers(model)["2.weight"].logits[0] = math.nan
    with pytest.raises(diffq.WeightError, match=r"2\.weight"):
        model.eval()(torch.ones(1, 16))


def test_bad_scale():
    """A NaN in LSQ's scale is reported by name, with the scale."""
    model = mlp()
    quantizer = QUANTIZERS["lsq"](model)
    with torch.no_grad():
        weight_quantizers(model)["2.weight"].scale.fill_(math.nan)
    for call in (quantizer.get_quantized_state, lambda: model.eval()(torch.ones(1, 16))):
        with pytest.raises(diffq.WeightError, match=r"2\.weight.*nan"):
            call()


def test_float16_overflow():
    """A parameter that float16 cannot hold is refused by name, in eval, states and baking."""
    model = mlp()
    quantizer = diffq.QATQuantizer(model, min_size=0, exclude=["bias"], float16=True)
    with torch.no_grad():
        model[2].bias[0] = 1e5
    model.eval()
    for call in (
        quantizer.get_quantized_state,
        lambda: model(torch.ones(1, 16)),
        lambda: quantizer.detach(quantized=True),
    ):
        with pytest.raises(diffq.WeightError, match=r"65504.*100000.*2\.bias.*float16=False"):
            call()


# After detach


@pytest.mark.parametrize(
    "call",
    [
        lambda q: q.model,
        lambda q: q.model_size(),
        lambda q: q.true_model_size(),
        lambda q: q.snapshot(),
        lambda q: q.get_quantized_state(),
        lambda q: q.setup_optimizer(torch.optim.SGD(mlp().parameters(), 0.1)),
        lambda q: q.learned_parameters(),
        lambda q: q.freeze_bits(),
        lambda q: q.detach(),
        lambda q: q.detach(quantized=True),
    ],
)
def test_use_after_detach(call):
    """A detached quantizer refuses to work, and says so in its repr."""
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    quantizer.detach()
    refused(model, diffq.AttachError, lambda _: call(quantizer), "detached", "new")
    assert repr(quantizer) == "DiffQuantizer(detached)"


# Sizes and shapes of states that belong to another model are in test_restore.py.


def test_restore_into_an_attached_model():
    """Restoring into a model that has a quantizer is refused with the remedy."""
    model = mlp()
    quantizer = diffq.QATQuantizer(model, min_size=0)
    state = quantizer.get_quantized_state()
    refused(
        model,
        diffq.MismatchError,
        lambda m: diffq.restore_quantized_state(m, state),
        "has a quantizer",
        "detach()",
    )
