"""Bad input: one tree of errors, clear messages, and nothing changed."""

import inspect
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import diffq
from diffq import errors
from tests.models import QUANTIZERS, TiedModules, mlp, same_tensors, seeded, snapshot_of, step

LEARNING = ["diffq", "diffq-rounding", "lsq"]


def _hooks(model):
    return {
        (path, key): len(value)
        for path, module in model.named_modules()
        for key, value in module.__dict__.items()
        if "hooks" in key
    }


def _state(model):
    """What an operation that failed must have left as it was."""
    return (
        [(path, type(module)) for path, module in model.named_modules()],
        {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        _hooks(model),
    )


def _refused(model, error, make, *words):
    """Checks that `make(model)` raises `error` with all words, and changes nothing."""
    before, values = _state(model), snapshot_of(model)
    with pytest.raises(error) as caught:
        make(model)
    assert isinstance(caught.value, diffq.DiffqError)
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert message.endswith((".", ")", "'")) or "\n" in message
    assert _state(model) == before
    assert same_tensors(snapshot_of(model), values) or any(
        not value.isfinite().all() for value in values.values()
    )
    return message


# The tree


def test_one_tree():
    """Every error class of diffq is a DiffqError, and is public."""
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    assert len(classes) >= 8
    for error in classes:
        assert issubclass(error, errors.DiffqError)
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
    assert depth == {name: c.__mro__.index(errors.DiffqError) for name, c in classes.items()}


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


# Settings


@pytest.mark.parametrize("bits", [0, 16, -1, 100, 4.0, 4.5, "4", True, math.nan, math.inf, [4]])
@pytest.mark.parametrize("make", [diffq.DiffQuantizer, diffq.QATQuantizer, diffq.LSQQuantizer])
def test_bits_that_cannot_be_stored(make, bits):
    """A bitwidth that is not a whole number from 1 to 15 is refused with what was got."""
    _refused(
        mlp(), diffq.ConfigError, lambda m: make(m, bits=bits, min_size=0), "bits", "15", repr(bits)
    )


def test_lsq_needs_two_bits():
    """LSQ refuses one bit, which would leave the positive side without a level."""
    _refused(
        mlp(), diffq.ConfigError, lambda m: diffq.LSQQuantizer(m, bits=1, min_size=0), "2", "got 1"
    )


@pytest.mark.parametrize("make", [diffq.QATQuantizer, diffq.LSQQuantizer])
def test_bits_are_needed(make):
    """bits=None is refused where the bitwidth is not learned."""
    _refused(mlp(), diffq.ConfigError, lambda m: make(m, bits=None), "bits", "None")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_bits": 8, "max_bits": 8}, ("min_bits", "max_bits", "8", "bits=")),
        ({"min_bits": 9, "max_bits": 4}, ("min_bits", "max_bits", "9", "4")),
        ({"min_bits": 0}, ("min_bits", "1", "got 0")),
        ({"max_bits": 16}, ("max_bits", "15", "got 16")),
        ({"min_bits": 2.5}, ("min_bits", "whole", "2.5")),
        ({"init_bits": 1}, ("init_bits", "2", "15", "got 1")),
        ({"init_bits": 15.5}, ("init_bits", "15.5")),
        ({"init_bits": math.nan}, ("init_bits", "nan")),
        ({"init_bits": "8"}, ("init_bits", "'8'")),
        ({"min_bits": 9}, ("init_bits", "9", "got 8")),
        ({"noise": "Gaussian"}, ("noise", "gaussian", "uniform", "rounding", "'Gaussian'")),
        ({"noise": None}, ("noise", "gaussian", "None")),
        ({"noise": ["gaussian"]}, ("noise", "uniform")),
        ({"noise_scale": -1.0}, ("noise_scale", "-1.0")),
        ({"noise_scale": math.nan}, ("noise_scale", "nan")),
        ({"noise_scale": math.inf}, ("noise_scale", "inf")),
        ({"noise_scale": "0.5"}, ("noise_scale", "'0.5'")),
        ({"group_size": -1}, ("group_size", "-1")),
        ({"group_size": 8.0}, ("group_size", "8.0")),
        ({"group_size": "8"}, ("group_size", "'8'")),
        ({"group_size": True}, ("group_size", "True")),
    ],
)
def test_settings_that_break_a_rule(options, words):
    """Each setting of DiffQ that breaks a rule is refused, as an argument and as an override."""
    _refused(
        mlp(), diffq.ConfigError, lambda m: diffq.DiffQuantizer(m, min_size=0, **options), *words
    )
    if not any(key.startswith("noise") for key in options):
        overridden = {"min_size": 0, "overrides": {"0.weight": options}}
        _refused(mlp(), diffq.ConfigError, lambda m: diffq.DiffQuantizer(m, **overridden), *words)


@pytest.mark.parametrize("min_size", [-1, -0.001, math.nan, None, "0.01"])
@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
def test_bad_min_size(kind, min_size):
    """A min_size that is no number of MB is refused with what was got."""
    words = ("min_size", "0", repr(min_size))
    _refused(mlp(), diffq.ConfigError, lambda m: QUANTIZERS[kind](m, min_size=min_size), *words)


# Patterns


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_pattern_given_as_a_string(field):
    """A string in the place of a list of patterns is refused with the line to write instead."""
    _refused(
        mlp(),
        diffq.ConfigError,
        lambda m: diffq.DiffQuantizer(m, min_size=0, **{field: "bias"}),
        f"{field}=['bias']",
    )


@pytest.mark.parametrize("patterns", [None, 5, [5], [None], [["bias"]]])
@pytest.mark.parametrize("field", ["include", "exclude"])
def test_patterns_that_are_no_strings(field, patterns):
    """Patterns that are no strings are refused by the name of the argument."""
    _refused(
        mlp(),
        diffq.ConfigError,
        lambda m: diffq.DiffQuantizer(m, min_size=0, **{field: patterns}),
        field,
    )


@pytest.mark.parametrize("overrides", [["bias"], "bias", {"bias": 4}, {5: {"bits": 4}}])
def test_overrides_that_are_no_settings(overrides):
    """Overrides must map patterns to dicts of settings."""
    _refused(
        mlp(),
        diffq.ConfigError,
        lambda m: diffq.DiffQuantizer(m, min_size=0, overrides=overrides),
        "overrides",
    )


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
@pytest.mark.parametrize("field", ["include", "exclude", "overrides"])
def test_pattern_without_match(field, kind):
    """A pattern that matches nothing is refused, with names that exist."""
    value = {"1.weight": {"bits": 4}} if field == "overrides" else ["1.weight"]
    _refused(
        mlp(),
        diffq.ConfigError,
        lambda m: QUANTIZERS[kind](m, **{field: value}),
        "'1.weight'",
        "matches no",
        "'0.weight'",
    )


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (diffq.DiffQuantizer, "noise"),
        (diffq.DiffQuantizer, "bitz"),
        (diffq.QATQuantizer, "group_size"),
        (diffq.LSQQuantizer, "per_channel"),
    ],
)
@pytest.mark.parametrize("options", [{"min_size": 0}, {"min_size": 0, "exclude": ["bias"]}])
def test_unknown_override(make, setting, options):
    """A setting that cannot be overridden is refused with those that can, for raw tensors too."""
    overrides = {"bias": {setting: 4}}
    _refused(
        mlp(),
        diffq.ConfigError,
        lambda m: make(m, overrides=overrides, **options),
        make.__name__,
        repr(setting),
        "bits",
    )


def test_unknown_argument():
    """A misspelt argument is Python's TypeError, and changes nothing."""
    model = mlp()
    before = _state(model)
    with pytest.raises(TypeError, match="groupsize"):
        diffq.DiffQuantizer(model, groupsize=8)
    assert _state(model) == before


# Models


@pytest.mark.parametrize("second", ["diffq", "qat", "lsq"])
@pytest.mark.parametrize("first", ["diffq", "qat"])
def test_second_quantizer(first, second):
    """A second quantizer on the same model is refused, and the first one works on."""
    model = mlp()
    quantizer = QUANTIZERS[first](model)
    size = quantizer.true_model_size()
    _refused(model, diffq.AttachError, QUANTIZERS[second], "already", "detach()")
    assert quantizer.true_model_size() == size


@pytest.mark.parametrize("attach_to", ["part", "whole"])
def test_second_quantizer_on_an_overlapping_model(attach_to):
    """A quantizer on a part of a quantized model, or on what contains one, is refused."""
    model = mlp()
    first, second = (model, model[0]) if attach_to == "part" else (model[0], model)
    diffq.QATQuantizer(first, min_size=0)
    _refused(second, diffq.AttachError, QUANTIZERS["diffq"], "already")


@pytest.mark.parametrize(
    "wrap", [DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compile"]
)
def test_wrapped_model(wrap):
    """A wrapped or compiled model is refused with the order to write instead."""
    wrapped = wrap(mlp())
    _refused(
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
        _refused(wrapped, diffq.AttachError, QUANTIZERS["diffq"], "DistributedDataParallel")
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
    _refused(model, diffq.WeightError, QUANTIZERS[kind], "2.weight", "NaN or Inf", "exclude")


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
        model[2].parametrizations.weight.original[3, 4] = value
    model.eval()
    calls = [
        lambda: model(torch.ones(1, 16)),
        quantizer.get_quantized_state,
        quantizer.snapshot,
        lambda: quantizer.detach(quantized=True),
    ]
    if "lsq" not in kind:
        # The size of an LSQ tensor does not depend on its weights.
        calls.append(quantizer.true_model_size)
    before = _state(model)
    for call in calls:
        with pytest.raises(diffq.WeightError, match=r"2\.weight"):
            call()
    assert _state(model) == before


@pytest.mark.parametrize("call", ["true_model_size", "bits", "mean_bits", "get_quantized_state"])
def test_bad_bitwidths(call):
    """A NaN loss that reached the bitwidths is reported at the next size or state, by name."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model, exclude=["0.*", "2.bias"])
    quantizer.setup_optimizer(optimizer, lr=0.1)
    (quantizer.model_size() * math.nan).backward()
    optimizer.step()
    with pytest.raises(diffq.WeightError, match=r"bitwidths of 2\.weight.*NaN"):
        getattr(quantizer, call)()


def test_bad_bitwidths_in_eval():
    """Evaluation with NaN bitwidths is refused by name instead of computing NaN."""
    model = mlp()
    QUANTIZERS["diffq"](model)
    with torch.no_grad():
        model[2].parametrizations.weight[0].logits[0] = math.nan
    with pytest.raises(diffq.WeightError, match=r"2\.weight"):
        model.eval()(torch.ones(1, 16))


def test_bad_scale():
    """A NaN in LSQ's scale is reported by name, with the scale."""
    model = mlp()
    quantizer = QUANTIZERS["lsq"](model)
    with torch.no_grad():
        model[2].parametrizations.weight[0].scale.fill_(math.nan)
    for call in (quantizer.get_quantized_state, lambda: model.eval()(torch.ones(1, 16))):
        with pytest.raises(diffq.WeightError, match=r"2\.weight.*nan"):
            call()


def test_float16_overflow():
    """A parameter that float16 cannot hold is refused by name, in eval, states and baking."""
    model = mlp()
    quantizer = diffq.QATQuantizer(model, min_size=0, exclude=["bias"], float16=True)
    with torch.no_grad():
        model[2].parametrizations.bias.original[0] = 1e5
    model.eval()
    for call in (
        quantizer.get_quantized_state,
        lambda: model(torch.ones(1, 16)),
        lambda: quantizer.detach(quantized=True),
    ):
        with pytest.raises(diffq.WeightError, match=r"65504.*100000.*2\.bias.*float16=False"):
            call()


# The optimizer


@pytest.mark.parametrize("kind", LEARNING)
def test_training_without_setup(kind):
    """Training without setup_optimizer is refused, through the root and through a submodule."""
    model = mlp()
    QUANTIZERS[kind](model)
    inputs = torch.ones(1, 16)
    for call in (lambda: model(inputs), lambda: model[0](inputs)):
        _refused(
            model,
            diffq.OptimizerError,
            lambda _, call=call: call(),
            "setup_optimizer",
            "no_optimizer",
        )
    with torch.no_grad():
        assert model(inputs).shape == (1, 8)
    assert model.eval()(inputs).requires_grad


@pytest.mark.parametrize("kind", LEARNING)
def test_no_optimizer(kind):
    """no_optimizer() says that training without it is meant."""
    model = mlp()
    quantizer = QUANTIZERS[kind](model)
    quantizer.no_optimizer()
    model(torch.ones(1, 16)).sum().backward()
    model[0](torch.ones(1, 16))
    quantizer.no_optimizer()
    assert model[0].parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("kind", ["qat", "qat-channel", "diffq-fixed"])
def test_setup_is_not_needed_where_nothing_is_learned(kind):
    """QAT and fixed bitwidths train without setup_optimizer, and with it add no group."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer = QUANTIZERS[kind](model)
    step(model, optimizer, torch.ones(1, 16), quantizer)
    quantizer.setup_optimizer(optimizer)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [*LEARNING, "qat"])
def test_optimizer_of_another_model(kind):
    """An optimizer that holds nothing of the model is refused and not changed."""
    model = mlp()
    quantizer = QUANTIZERS[kind](model)
    optimizer = torch.optim.Adam(mlp().parameters())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    _refused(
        model,
        diffq.OptimizerError,
        lambda _: quantizer.setup_optimizer(optimizer),
        "model.parameters()",
    )
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held


@pytest.mark.parametrize("optimizer", [None, "adam", torch.optim.Adam])
def test_no_optimizer_object(optimizer):
    """What is no optimizer is refused."""
    quantizer = QUANTIZERS["diffq"](mlp())
    with pytest.raises(diffq.OptimizerError, match="optimizer"):
        quantizer.setup_optimizer(optimizer)


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("kind", LEARNING)
def test_setup_gives_the_extras_their_own_group(kind, made):
    """Each extra is in exactly one group, without weight decay, also if the optimizer had it."""
    model = mlp()
    plain = {id(p) for p in model.parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.3)
    quantizer = QUANTIZERS[kind](model)
    if made == "after":
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.3)
    quantizer.setup_optimizer(optimizer, lr=0.7, betas=(0.5, 0.6))
    weights, extras = optimizer.param_groups
    assert {id(p) for p in weights["params"]} == plain
    assert [weights[key] for key in ("lr", "weight_decay", "betas")] == [0.1, 0.3, (0.9, 0.999)]
    assert {id(p) for p in extras["params"]} == {id(p) for p in model.parameters()} - plain
    assert [extras[key] for key in ("lr", "weight_decay", "betas")] == [0.7, 0.0, (0.5, 0.6)]
    assert len(extras["params"]) == len({id(p) for p in extras["params"]})


def test_setup_keeps_other_groups():
    """Groups of the user keep their number, their order and their options, empty ones too."""
    model = mlp()
    groups = [
        {"params": [model[0].weight], "lr": 0.1},
        {"params": [], "lr": 0.2},
        {"params": [model[0].bias, *model[2].parameters()], "lr": 0.3},
    ]
    optimizer = torch.optim.SGD(groups)
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer, lr=0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3, 0.4]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0, 3, 4]


def test_setup_without_weight_decay():
    """An optimizer that knows no weight decay is not given any."""
    model = mlp()
    optimizer = torch.optim.Rprop(model.parameters())
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer, lr=0.1)
    assert "weight_decay" not in optimizer.param_groups[-1]


def test_setup_with_ties():
    """The extras of tied tensors are in the group once."""
    model = TiedModules()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    QUANTIZERS["diffq"](model).setup_optimizer(optimizer)
    assert len(optimizer.param_groups[-1]["params"]) == 3


def test_partial_optimizer():
    """An optimizer of a part of the model is accepted: fine-tuning trains a part."""
    model = seeded(mlp)
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    before = snapshot_of(model)
    step(model, optimizer, torch.ones(2, 16), quantizer)
    after = snapshot_of(model)
    assert torch.equal(
        before["0.parametrizations.weight.original"], after["0.parametrizations.weight.original"]
    )
    assert not torch.equal(
        before["2.parametrizations.weight.original"], after["2.parametrizations.weight.original"]
    )


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
    _refused(model, diffq.AttachError, lambda _: call(quantizer), "detached", "new")
    assert repr(quantizer) == "DiffQuantizer(detached)"


# Sizes and shapes of states that belong to another model are in test_restore.py.


def test_restore_into_an_attached_model():
    """Restoring into a model that has a quantizer is refused with the remedy."""
    model = mlp()
    quantizer = diffq.QATQuantizer(model, min_size=0)
    state = quantizer.get_quantized_state()
    _refused(
        model,
        diffq.MismatchError,
        lambda m: diffq.restore_quantized_state(m, state),
        "parametrizations",
        "detach()",
    )
