"""Model to plan: which tensors are quantized, which stay raw, which are tied."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import diffq
from diffq.attach.plan import Rules, Site, build_plan
from tests.compare import same_bits
from tests.models import SharedModule, TiedHead, TiedModules, TwoNames, computed, mlp


def _plans(model, **rules):
    rules.setdefault("min_size", 0)
    return {plan.name: plan for plan in build_plan(model, Rules(**rules))}


def _quantized(model, **rules):
    return [name for name, plan in _plans(model, **rules).items() if plan.quantized]


def test_plan_is_frozen():
    """Neither the plan of a tensor nor its sites can be changed after they are made."""
    (plan, *_) = build_plan(mlp(), Rules())
    for frozen, field in ((plan, "quantized"), (plan.sites[0], "module"), (Rules(), "min_size")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, field, None)


def test_plan_describes_each_tensor():
    """A plan gives names, sites, shape, dtype and kind of each tensor."""
    plan = _plans(mlp().double())["2.weight"]
    assert (plan.names, plan.sites) == (("2.weight",), (Site("2", "weight"),))
    assert (plan.shape, plan.numel, plan.dtype) == (torch.Size([8, 32]), 256, torch.float64)
    assert plan.quantized
    assert plan.learned


def test_plan_has_the_order_of_the_state_dict():
    """The plan lists every tensor of the state dict once, in its order."""
    model = nn.ModuleDict({"b": nn.BatchNorm1d(3), "a": nn.Linear(2, 2), "c": nn.Embedding(4, 2)})
    assert list(_plans(model)) == list(model.state_dict())


def test_planning_changes_nothing():
    """Making a plan leaves the model's tensors and their places as they were."""
    model = TiedModules()
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    build_plan(model, Rules())
    assert {n: id(v) for n, v in model.state_dict(keep_vars=True).items()} == before


@pytest.mark.parametrize(("numel", "chosen"), [(2621, False), (2622, True)])
def test_min_size_is_mb_of_float32(numel, chosen):
    """A parameter is quantized if it takes more than min_size * 2**20 bytes in float32."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(numel))
    assert bool(_quantized(model, min_size=0.01)) is chosen


def test_min_size_counts_elements_and_not_bytes():
    """A float64 or bfloat16 parameter is chosen by the size that float32 would take."""
    for dtype in (torch.float64, torch.bfloat16):
        model = nn.Linear(51, 51, dtype=dtype)
        assert _quantized(model, min_size=0.01) == []
        assert _quantized(model, min_size=0.0099) == ["weight"]


def test_min_size_zero_leaves_out_empty_tensors_only():
    """With min_size=0 every parameter with an element is quantized, 0-dim ones too."""
    model = nn.Module()
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.scalar = nn.Parameter(torch.tensor(1.0))
    assert _quantized(model) == ["scalar"]


def test_other_dtypes_stay_raw():
    """Integer, boolean and complex parameters are never quantized."""
    model = nn.Module()
    for dtype in (torch.int64, torch.bool, torch.complex64):
        parameter = nn.Parameter(torch.zeros(8, dtype=dtype), requires_grad=False)
        model.register_parameter(str(dtype)[6:], parameter)
    assert len(_plans(model)) == 3
    assert _quantized(model) == []


def test_exclude_full_name():
    """A pattern for the full name excludes that parameter alone."""
    assert _quantized(mlp(), exclude=["0.weight"]) == ["0.bias", "2.weight", "2.bias"]


def test_exclude_short_name():
    """A pattern for the last part of the name excludes it in every module."""
    assert _quantized(mlp(), exclude=["bias"]) == ["0.weight", "2.weight"]


def test_exclude_wildcards():
    """Shell patterns match across dots."""
    model = nn.ModuleDict({"encoder": mlp(), "decoder": mlp()})
    assert _quantized(model, exclude=["enc*.weight", "*bias"]) == [
        "decoder.0.weight",
        "decoder.2.weight",
    ]


def test_patterns_mind_the_case():
    """Patterns are matched with upper and lower case as written."""
    model = nn.ModuleDict({"Head": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert _quantized(model, include=["Head.*"]) == ["Head.weight", "Head.bias"]


def test_include_restricts():
    """With include, only parameters that match one of its patterns are quantized."""
    assert _quantized(mlp(), include=["0.*", "2.bias"]) == ["0.weight", "0.bias", "2.bias"]


def test_exclude_wins_over_include():
    """A parameter that include and exclude both match stays raw."""
    assert _quantized(mlp(), include=["0.*"], exclude=["bias"]) == ["0.weight"]


def test_include_does_not_lift_min_size():
    """A small parameter stays raw even where include matches it, together with a large one."""
    assert _quantized(mlp(), include=["0.*"], min_size=100 * 4 / 2**20) == ["0.weight"]


def test_overrides_reach_matching_tensors_only():
    """An override is in the plan of the parameters it matches, and in no other."""
    plans = _plans(mlp(), overrides={"0.*": {"bits": 3}})
    assert [dict(plan.overrides) for plan in plans.values()] == [{"bits": 3}, {"bits": 3}, {}, {}]


def test_later_overrides_win():
    """Where several patterns match, later ones replace single settings of earlier ones."""
    overrides = {"*": {"bits": 3, "group_size": 4}, "weight": {"bits": 5}, "2.*": {"bits": 7}}
    plans = _plans(mlp(), overrides=overrides)
    assert {
        name: (p.overrides["bits"], p.overrides["group_size"]) for name, p in plans.items()
    } == {
        "0.weight": (5, 4),
        "0.bias": (3, 4),
        "2.weight": (7, 4),
        "2.bias": (7, 4),
    }


def test_overrides_take_effect():
    """Overridden bits, group size and range of bits are those of the tensor's quantizer."""
    quantizer = diffq.DiffQuantizer(
        mlp(),
        min_size=0,
        group_size=8,
        overrides={
            "0.weight": {"bits": 3},
            "0.bias": {"group_size": None, "init_bits": 4},
            "2.weight": {"min_bits": 5, "max_bits": 6, "init_bits": 5},
            "2.bias": {"group_size": 3},
        },
    )
    bits = quantizer.bits()
    assert {name: len(widths) for name, widths in bits.items()} == {
        "0.weight": 1 if len(bits["0.weight"]) == 1 else 64,
        "0.bias": 1,
        "2.weight": 32,
        "2.bias": 3,
    }
    assert set(bits["0.weight"].tolist()) == {3}
    assert set(bits["0.bias"].tolist()) == {4}
    assert set(bits["2.weight"].tolist()) == {5}
    assert set(bits["2.bias"].tolist()) == {8}


@pytest.mark.parametrize("quantizer", [diffq.QATQuantizer, diffq.LSQQuantizer])
def test_bits_can_be_overridden_everywhere(quantizer):
    """QAT and LSQ take a bitwidth per pattern."""
    made = quantizer(mlp(), bits=4, min_size=0, overrides={"weight": {"bits": 7}})
    bits = {name: set(widths.tolist()) for name, widths in made.bits().items()}
    assert bits == {"0.weight": {7}, "0.bias": {4}, "2.weight": {7}, "2.bias": {4}}


def test_per_channel_can_be_overridden():
    """QAT takes per_channel per pattern: more ranges make the stored model larger."""
    sizes = [
        diffq.QATQuantizer(mlp(), min_size=0, overrides=overrides).true_model_size()
        for overrides in (None, {"0.weight": {"per_channel": True}})
    ]
    # 32 channels instead of one range, of two float32 each.
    assert (sizes[1] - sizes[0]) * 2**23 == 31 * 64


def test_tied_modules_are_one_tensor():
    """An embedding and a head with one parameter are one plan with both names."""
    plans = _plans(TiedModules())
    assert plans["embed.weight"].names == ("embed.weight", "head.weight")
    assert len(plans["embed.weight"].sites) == 2
    assert "head.weight" not in plans


def test_weight_read_twice_is_one_tensor():
    """A weight that another place only reads is an ordinary tensor."""
    assert _plans(TiedHead())["embed.weight"].names == ("embed.weight",)


def test_shared_module_is_one_site():
    """A module under two names gives both names but one place to parametrize."""
    plans = _plans(SharedModule())
    assert plans["first.weight"].names == ("first.weight", "second.weight")
    assert len(plans["first.weight"].sites) == 1
    assert list(plans) == ["first.weight", "first.bias"]


def test_two_names_in_one_module_are_one_tensor():
    """One parameter under two names in one module is one plan with two sites."""
    (plan,) = _plans(TwoNames()).values()
    assert plan.names == ("one", "two")
    assert plan.sites == (Site("", "one"), Site("", "two"))


def test_equal_values_are_not_ties():
    """Ties are found by identity: equal tensors stay two."""
    model = mlp()
    model[2] = nn.Linear(16, 32)
    model[2].load_state_dict(model[0].state_dict())
    assert len(_plans(model)) == 4


def test_patterns_see_every_name_of_a_tie():
    """A pattern for any of its names selects the tied tensor."""
    assert "embed.weight" not in _quantized(TiedModules(), exclude=["head.weight"])
    assert _quantized(TiedModules(), include=["head.*"]) == ["embed.weight"]
    plans = _plans(TiedModules(), overrides={"head.*": {"bits": 3}})
    assert plans["embed.weight"].overrides == {"bits": 3}


def test_buffers_are_planned_raw():
    """Persistent buffers are in the plan, never quantized and not learned; others are not."""
    model = nn.Module()
    model.register_buffer("kept", torch.zeros(10000))
    model.register_buffer("dropped", torch.zeros(10000), persistent=False)
    model.register_buffer("nothing", None)
    (plan,) = build_plan(model, Rules(min_size=0))
    assert plan.name == "kept"
    assert not plan.quantized
    assert not plan.learned


def test_batchnorm_buffers_are_planned():
    """Running statistics and the counter of BatchNorm are in the plan."""
    plans = _plans(nn.BatchNorm2d(4))
    assert [name for name, plan in plans.items() if not plan.learned] == [
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]


def test_parameter_lists_and_dicts():
    """The parameters in ParameterList and ParameterDict are planned under their state names."""
    model = nn.Module()
    model.items = nn.ParameterList([torch.zeros(4), torch.zeros(5)])
    model.named = nn.ParameterDict({"a": torch.zeros(6)})
    assert _quantized(model) == ["items.0", "items.1", "named.a"] == list(model.state_dict())


def test_parametrized_tensor_is_planned_under_its_plain_name():
    """A tensor that another parametrization computes is planned as the model reads it."""
    model = parametrizations.weight_norm(nn.Linear(8, 4))
    plan = _plans(model)["weight"]
    assert plan.quantized
    assert plan.shape == (4, 8)
    assert set(_plans(model)) == {"weight", "bias"}


def test_frozen_parameters_are_quantized():
    """requires_grad plays no part in selection."""
    assert len(_quantized(mlp().requires_grad_(False))) == 4


def test_lazy_module_is_refused():
    """A lazy module gives an error that names the tensor and the remedy."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(diffq.AttachError, match=r"1\.weight.*forward"):
        build_plan(model, Rules())


@pytest.mark.parametrize("field", ["include", "exclude", "overrides"])
def test_pattern_without_match(field):
    """A pattern that matches nothing is an error that shows names that are close."""
    pattern = {"0.wieght": {"bits": 3}} if field == "overrides" else ["0.wieght"]
    with pytest.raises(diffq.ConfigError, match=r"'0\.wieght' matches no .*'0\.weight'"):
        build_plan(mlp(), Rules(**{field: pattern}))


def test_buffers_are_no_match_for_patterns():
    """A pattern that matches only a buffer matches nothing: buffers are never quantized."""
    with pytest.raises(diffq.ConfigError, match="running_mean"):
        build_plan(nn.BatchNorm2d(4), Rules(exclude=["running_mean"]))


def test_float16_serves_what_is_not_quantized():
    """float16=True halves the parameters without levels, and leaves buffers alone."""
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    sizes = [diffq.QATQuantizer(model, float16=half) for half in (False,)]
    full = sizes[0].true_model_size()
    sizes[0].detach()
    half = diffq.QATQuantizer(model, float16=True).true_model_size()
    # The bias, and BatchNorm's weight and bias.
    assert round((full - half) * 2**23) == 3 * 64 * 16


def test_float16_keeps_half_precision_parameters():
    """float16=True changes nothing for parameters that take 16 bits already."""
    for dtype in (torch.float16, torch.bfloat16):
        model = nn.Linear(8, 8, dtype=dtype)
        assert diffq.QATQuantizer(model, float16=True).true_model_size() * 2**20 == 72 * 2


def test_float16_eval_computes_with_what_is_stored():
    """In eval mode a float16 parameter has the value that the state holds."""
    model = nn.Linear(8, 8)
    plain = model.bias.detach().clone()
    diffq.QATQuantizer(model, float16=True).no_optimizer()
    assert same_bits(computed(model)["bias"], plain)
    assert same_bits(computed(model.eval())["bias"], plain.half().float())


def test_plan_of_a_quantizer_is_public():
    """`quantizer.plan` shows what was chosen."""
    quantizer = diffq.QATQuantizer(mlp(), min_size=0, exclude=["bias"])
    assert [p.name for p in quantizer.plan if p.quantized] == ["0.weight", "2.weight"]
