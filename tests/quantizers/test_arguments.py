"""Arguments that break a rule: refused with what was got and what to write instead."""

import math

import numpy as np
import pytest

import diffq
from tests.holder import reloaded
from tests.models import (
    QUANTIZERS,
    mlp,
    refused,
    state_of,
)

# Settings


@pytest.mark.parametrize("bits", [0, 16, -1, 100, 4.0, 4.5, "4", True, math.nan, math.inf, [4]])
@pytest.mark.parametrize("make", [diffq.DiffQuantizer, diffq.QATQuantizer, diffq.LSQQuantizer])
def test_bits_that_cannot_be_stored(make, bits):
    """A bitwidth that is not a whole number from 1 to 15 is refused with what was got."""
    refused(
        mlp(), diffq.ConfigError, lambda m: make(m, bits=bits, min_size=0), "bits", "15", repr(bits)
    )


def test_lsq_needs_two_bits():
    """LSQ refuses one bit, which would leave the positive side without a level."""
    refused(
        mlp(), diffq.ConfigError, lambda m: diffq.LSQQuantizer(m, bits=1, min_size=0), "2", "got 1"
    )


@pytest.mark.parametrize("make", [diffq.QATQuantizer, diffq.LSQQuantizer])
def test_bits_are_needed(make):
    """bits=None is refused where the bitwidth is not learned."""
    refused(mlp(), diffq.ConfigError, lambda m: make(m, bits=None), "bits", "None")


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
    refused(
        mlp(), diffq.ConfigError, lambda m: diffq.DiffQuantizer(m, min_size=0, **options), *words
    )
    if not any(key.startswith("noise") for key in options):
        overridden = {"min_size": 0, "overrides": {"0.weight": options}}
        refused(mlp(), diffq.ConfigError, lambda m: diffq.DiffQuantizer(m, **overridden), *words)


@pytest.mark.parametrize("min_size", [-1, -0.001, math.nan, None, "0.01"])
@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
def test_bad_min_size(kind, min_size):
    """A min_size that is no number of MB is refused with what was got."""
    words = ("min_size", "0", repr(min_size))
    refused(mlp(), diffq.ConfigError, lambda m: QUANTIZERS[kind](m, min_size=min_size), *words)


# Patterns


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_pattern_given_as_a_string(field):
    """A string in the place of a list of patterns is refused with the line to write instead."""
    refused(
        mlp(),
        diffq.ConfigError,
        lambda m: diffq.DiffQuantizer(m, min_size=0, **{field: "bias"}),
        f"{field}=['bias']",
    )


@pytest.mark.parametrize("patterns", [None, 5, [5], [None], [["bias"]]])
@pytest.mark.parametrize("field", ["include", "exclude"])
def test_patterns_that_are_no_strings(field, patterns):
    """Patterns that are no strings are refused by the name of the argument."""
    refused(
        mlp(),
        diffq.ConfigError,
        lambda m: diffq.DiffQuantizer(m, min_size=0, **{field: patterns}),
        field,
    )


@pytest.mark.parametrize("overrides", [["bias"], "bias", {"bias": 4}, {5: {"bits": 4}}])
def test_overrides_that_are_no_settings(overrides):
    """Overrides must map patterns to dicts of settings."""
    refused(
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
    refused(
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
    refused(
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
    before = state_of(model)
    with pytest.raises(TypeError, match="groupsize"):
        diffq.DiffQuantizer(model, groupsize=8)
    assert state_of(model) == before


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq"])
@pytest.mark.parametrize("field", ["include", "overrides"])
def test_pattern_of_small_parameters_only(field, kind):
    """A pattern that matches only parameters at or below min_size is refused with the remedy."""
    value = {"bias": {"bits": 4}} if field == "overrides" else ["bias"]
    refused(
        mlp(),
        diffq.ConfigError,
        lambda m: QUANTIZERS[kind](m, min_size=100 * 4 / 2**20, **{field: value}),
        "'bias'",
        "0.bias, 2.bias",
        "Lower min_size",
    )


def test_exclude_of_small_parameters_only():
    """A pattern of exclude may match small parameters: they are left alone either way."""
    assert diffq.DiffQuantizer(mlp(), exclude=["bias"]).bits() == {}


# Flags and NumPy's numbers


@pytest.mark.parametrize("value", ["no", "", 0, 1, 1.0, None, [True]])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m, v: diffq.QATQuantizer(m, min_size=0, per_channel=v), "per_channel"),
        (lambda m, v: diffq.QATQuantizer(m, min_size=0, training=v), "training"),
        (lambda m, v: diffq.UniformQuantizer(m, min_size=0, qat=v), "qat"),
        (lambda m, v: diffq.DiffQuantizer(m, min_size=0, float16=v), "float16"),
        (lambda m, v: diffq.LSQQuantizer(m, min_size=0, float16=v), "float16"),
        (
            lambda m, v: diffq.QATQuantizer(
                m, min_size=0, overrides={"weight": {"per_channel": v}}
            ),
            "per_channel",
        ),
    ],
)
def test_flags_that_are_no_flags(call, name, value):
    """A flag that is neither True nor False is refused, whatever Python would take it for."""
    refused(mlp(), diffq.ConfigError, lambda m: call(m, value), name, "True or False", repr(value))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda q: q.freeze_bits(rounding="no"), "rounding"),
        (lambda q: q.get_quantized_state(packed=1), "packed"),
        (lambda q: q.detach(quantized="no"), "quantized"),
    ],
)
def test_flags_of_calls(call, name):
    """A flag of a call is refused likewise, and the quantizer is as it was."""
    model = mlp()
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    refused(model, diffq.ConfigError, lambda _: call(quantizer), name, "True or False")
    assert quantizer.model is model


@pytest.mark.parametrize("number", [np.int64, np.uint8, np.int32])
@pytest.mark.parametrize("overriding", [False, True])
def test_numbers_of_numpy(number, overriding):
    """NumPy's numbers are taken for Python's, and leave nothing of theirs in a state."""
    options = {"group_size": number(4), "min_bits": number(3), "max_bits": number(9)}
    options |= {"init_bits": np.float32(6)}
    given = {"overrides": {"*": options}} if overriding else options
    quantizer = diffq.DiffQuantizer(mlp(), min_size=np.float32(0), **given)
    expected = diffq.DiffQuantizer(
        mlp(), min_size=0, group_size=4, min_bits=3, max_bits=9, init_bits=6
    )
    assert quantizer.true_model_size() == expected.true_model_size()
    state = reloaded(quantizer.get_quantized_state())
    diffq.restore_quantized_state(mlp(), state)
    assert type(state["tensors"]["0.weight"]["group_size"]) is int


@pytest.mark.parametrize("make", [diffq.DiffQuantizer, diffq.QATQuantizer, diffq.LSQQuantizer])
def test_bits_of_numpy(make):
    """A bitwidth may be a number of NumPy, and a flag a boolean of NumPy."""
    quantizer = make(mlp(), bits=np.int64(4), min_size=0, float16=np.True_)
    assert {int(width) for bits in quantizer.bits().values() for width in bits} == {4}
    diffq.restore_quantized_state(mlp(), reloaded(quantizer.get_quantized_state()))


@pytest.mark.parametrize("bits", [np.True_, np.float32(4), np.int64(16), np.array([4])])
def test_numbers_of_numpy_that_are_no_bitwidths(bits):
    """NumPy's booleans, floats and arrays are no bitwidths."""
    refused(mlp(), diffq.ConfigError, lambda m: diffq.QATQuantizer(m, bits=bits), "bits", "15")
