"""Iterative quantization: stages in order, centroids that are trained, the rest finetuned."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import diffq
from tests.compare import close, same_bits
from tests.holder import all_bits, quantizers_in, weight_quantizers
from tests.models import (
    MODELS,
    SUMS,
    TiedModules,
    computed_weight,
    encoder,
    evaluate_alike,
    mlp,
    restored,
    seeded,
    step,
)
from tests.processors import repeatable

attach = partial(diffq.ProductQuantizer, min_size=0, block_size=2, codebook_size=4)


def originals(model):
    """Name to the Parameter of each quantized tensor."""
    return {name: q.weight for name, q in weight_quantizers(model).items()}


def setup(make=mlp, stages=(), lr=0.05, **options):
    """A model with a quantizer and an optimizer."""
    model = seeded(make)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    quantizer = attach(model, stages=stages, **options)
    quantizer.setup_optimizer(optimizer, lr=lr)
    return model, quantizer, optimizer


def test_stages_in_order():
    """Each call fixes the tensors of the next patterns; what none matches comes last."""
    model = seeded(encoder)
    quantizer = attach(model, stages=["*.linear?.weight", ["*.in_proj_weight", "nothing*"]])
    stages = quantizer.stages
    assert stages[0] == tuple(f"layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2))
    assert stages[1] == tuple(f"layers.{i}.self_attn.in_proj_weight" for i in (0, 1))
    assert stages[2] == tuple(f"layers.{i}.self_attn.out_proj.weight" for i in (0, 1))
    for done, stage in enumerate(stages, 1):
        assert quantizer.quantize_stage() == stage
        fixed = {name for name, q in weight_quantizers(model).items() if getattr(q, "fixed", 0)}
        assert fixed == {name for names in stages[:done] for name in names}
    assert quantizer.quantize_stage() == ()


def test_one_stage_without_patterns():
    """Without patterns, one stage has all tensors."""
    quantizer = attach(seeded(mlp))
    assert quantizer.stages == (("0.weight", "2.weight"),)
    assert quantizer.quantize_stage() == quantizer.stages[0]


@pytest.mark.parametrize("centroids", ["float32", "float16", "int8"])
def test_fixed_tensors_are_the_same_in_training_and_eval(centroids):
    """Once fixed, training computes with the codewords that are stored, without noise."""
    model, quantizer, _ = setup(stages=["0.*"], centroids=centroids, p=1.0)
    quantizer.quantize_stage()
    fixed = [computed_weight(model, "0.weight") for _ in range(2)]
    assert same_bits(*fixed)
    assert not computed_weight(model, "2.weight").any()
    assert same_bits(fixed[0], computed_weight(model.eval(), "0.weight"))


def test_the_rest_is_finetuned():
    """After a stage, the other weights and biases train, the fixed ones stay as they are."""
    model, quantizer, optimizer = setup(stages=["0.*"])
    before = {name: p.detach().clone() for name, p in originals(model).items()}
    bias = model[0].bias.detach().clone()
    assert quantizer.quantize_stage() == ("0.weight",)
    words = weight_quantizers(model)["0.weight"].codebook.clone()
    for _ in range(3):
        step(model, optimizer, torch.randn(5, 16))
    after = originals(model)
    assert same_bits(after["0.weight"], before["0.weight"])
    assert not same_bits(after["2.weight"], before["2.weight"])
    assert not same_bits(model[0].bias, bias)
    assert not same_bits(weight_quantizers(model)["0.weight"].codebook, words)


def test_centroids_move_by_the_mean_gradient():
    """A step of SGD is Equation 4: each codeword moves by the mean gradient of its blocks."""
    model, quantizer, optimizer = setup(lr=0.1, centroids="float32")
    quantizer.quantize_stage()
    weight = weight_quantizers(model)["0.weight"]
    before, indices = weight.codebook.detach().clone(), weight.indices.long()
    inputs = torch.randn(5, 16)
    plain = seeded(mlp)
    diffq.restore_quantized_state(plain, quantizer.get_quantized_state())
    plain(inputs).square().mean().backward()
    step(model, optimizer, inputs)
    blocks = plain[0].weight.grad.reshape(-1, 2)
    for k in range(4):
        expected = before[k] - 0.1 * blocks[indices == k].mean(0)
        assert close(weight.codebook[k], expected)


def test_refresh_leaves_fixed_tensors_alone():
    """refresh learns the codebooks of tensors that are not fixed, and of no others."""
    model, quantizer, optimizer = setup(stages=["0.*"])
    quantizer.quantize_stage()
    step(model, optimizer, torch.randn(5, 16))
    books = {name: q.codebook.clone() for name, q in weight_quantizers(model).items()}
    with torch.no_grad():
        originals(model)["2.weight"].mul_(3)
    quantizer.refresh()
    after = {name: q.codebook for name, q in weight_quantizers(model).items()}
    assert same_bits(after["0.weight"], books["0.weight"])
    assert not same_bits(after["2.weight"], books["2.weight"])


def test_a_stage_starts_from_the_weights_of_now():
    """A stage learns its codebooks anew, from weights that may have moved since."""
    model, quantizer, _ = setup(codebook_size=64)
    with torch.no_grad():
        originals(model)["0.weight"].copy_(torch.randn(32, 16) + 5)
    quantizer.quantize_stage()
    error = (computed_weight(model, "0.weight") - model[0].weight).square().mean()
    assert error < 0.2


@pytest.mark.parametrize("name", MODELS)
def test_stages_on_every_model(name):
    """After all stages and some finetuning, the file has what eval and training compute."""
    make, make_input = MODELS[name]
    model, quantizer, optimizer = setup(make)
    inputs = make_input()
    while quantizer.quantize_stage():
        step(model, optimizer, inputs, quantizer)
    assert all(q.grad.any() for q in quantizers_in(model))
    assert evaluate_alike(model, restored(make, quantizer), inputs)


def test_ties_are_fixed_together():
    """A tied tensor is fixed under all its names, and its centroids get all its gradients."""
    model, quantizer, _ = setup(TiedModules, stages=["head.weight"])
    assert quantizer.quantize_stage() == ("embed.weight",)
    with quantizer.computing():
        assert same_bits(model.embed.weight, model.head.weight)
    model(torch.randint(24, (3, 7))).square().mean().backward()
    assert weight_quantizers(model)["embed.weight"].grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """Centroid gradients under activation checkpointing equal those without it."""
    grads = []
    for checkpointed in (False, True):
        model, quantizer, _ = setup()
        quantizer.quantize_stage()
        inputs = seeded(lambda: torch.randn(5, 16)).requires_grad_()
        if checkpointed:
            outputs = checkpoint(model, inputs, use_reentrant=reentrant)
        else:
            outputs = model(inputs)
        outputs.square().mean().backward()
        grads.append([q.grad for q in quantizers_in(model)])
    assert close(*grads, SUMS)


# Optimizers and checkpoints


def test_training_before_the_first_stage_needs_no_optimizer_of_ours():
    """Until a stage, nothing is learned, so nothing needs to be said about it."""
    model = seeded(mlp)
    attach(model)
    step(model, torch.optim.SGD(model.parameters(), 0.05), torch.randn(5, 16))


def test_training_centroids_needs_an_optimizer():
    """After a stage, training without setup_optimizer is refused, unless it is meant."""
    model = seeded(mlp)
    quantizer = attach(model)
    quantizer.quantize_stage()
    with pytest.raises(diffq.OptimizerError, match="setup_optimizer"):
        model(torch.randn(5, 16))
    quantizer.no_optimizer()
    model(torch.randn(5, 16))


def test_centroids_are_a_group_without_decay():
    """The codebooks are a parameter group of their own, and stay as they are before a stage."""
    model = seeded(mlp)
    quantizer = attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    quantizer.setup_optimizer(optimizer, lr=0.3)
    group = optimizer.param_groups[-1]
    assert group["params"] == [*quantizer.learned_parameters()]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0)
    (codebooks,) = quantizer.learned_parameters()
    before = codebooks.detach().clone()
    step(model, optimizer, torch.randn(5, 16))
    assert same_bits(codebooks.detach(), before)


@repeatable()
@pytest.mark.parametrize("cut", [1, 3])
def test_resuming_between_stages(cut):
    """Training that is cut before or after a stage goes on bit for bit."""

    def train(model, quantizer, optimizer, start, end):
        for index in range(start, end):
            if index == 2:
                quantizer.quantize_stage()
            step(model.train(), optimizer, seeded(lambda: torch.randn(5, 16), index))

    run = setup(stages=["0.*"], p=0.5)
    torch.manual_seed(0)
    train(*run, 0, 5)
    first = setup(stages=["0.*"], p=0.5)
    torch.manual_seed(0)
    train(*first, 0, cut)
    saved = io.BytesIO()
    torch.save([first[0].state_dict(), first[2].state_dict()], saved)
    second = setup(stages=["0.*"], p=0.5, seed=5)
    saved.seek(0)
    weights, moments = torch.load(saved, weights_only=True)
    second[0].load_state_dict(weights)
    second[2].load_state_dict(moments)
    train(*second, cut, 5)
    assert same_bits(run[0].state_dict(), second[0].state_dict())
    assert second[1].quantize_stage() == run[1].quantize_stage() == ("2.weight",)


def test_state_dict_of_another_codebook():
    """A state dict with indices beyond the codebook is refused by name."""
    model, _, _ = setup(codebook_size=8)
    other, _, _ = setup(codebook_size=4)
    with pytest.raises((diffq.MismatchError, RuntimeError), match=r"0\.weight|size mismatch"):
        other.load_state_dict(model.state_dict())


def test_copies_go_their_own_way():
    """A deep copy has a quantizer of its own, in the same stage."""
    model, quantizer, optimizer = setup(stages=["0.*"])
    quantizer.quantize_stage()
    twin = copy.deepcopy(model)
    step(model, optimizer, torch.randn(5, 16))
    other = diffq.quantizer_of(twin)
    assert other.quantize_stage() == ("2.weight",)
    assert quantizer.quantize_stage() == ("2.weight",)
    one, other = (computed_weight(each.eval(), "0.weight") for each in (model, twin))
    assert not same_bits(one, other)


def test_casts_keep_centroids():
    """Casting the model casts weights, not centroids or the number of their blocks."""
    model, quantizer, _ = setup()
    quantizer.quantize_stage()
    model.bfloat16()
    weight = weight_quantizers(model)["0.weight"]
    assert weight.codebook.dtype == torch.float32
    assert not weight.counts.is_floating_point()
    model(torch.randn(5, 16).bfloat16()).float().square().mean().backward()
    assert weight.grad.any()
    fresh = mlp().bfloat16()
    diffq.restore_quantized_state(fresh, quantizer.get_quantized_state())
    assert same_bits(fresh[0].weight, computed_weight(model.eval(), "0.weight"))


def test_detach_after_stages():
    """detach gives back the weights as they were; quantized, what eval computed."""
    model, quantizer, _ = setup()
    before = {name: p.detach().clone() for name, p in originals(model).items()}
    quantizer.quantize_stage()
    twin = copy.deepcopy(model)
    quantizer.detach()
    assert all(same_bits(model.get_parameter(name), p) for name, p in before.items())
    evaluated = computed_weight(twin.eval(), "0.weight")
    assert same_bits(diffq.quantizer_of(twin).detach(quantized=True)[0].weight, evaluated)


# Errors that leave everything as it was


@pytest.mark.parametrize("call", ["refresh", "quantize_stage"])
def test_weights_that_cannot_be_clustered(call):
    """NaN weights are refused by name before any codebook changes."""
    model, quantizer, _ = setup()
    with torch.no_grad():
        originals(model)["2.weight"][0, 0] = torch.nan
    before = all_bits(model)
    with pytest.raises(diffq.WeightError, match=r"2\.weight"):
        getattr(quantizer, call)()
    assert all_bits(model) == before
    assert not any(q.fixed for q in quantizers_in(model))


@pytest.mark.parametrize(("centroids", "value"), [("float16", 1e6), ("int8", 3e38)])
def test_centroids_that_cannot_be_stored(centroids, value):
    """Centroids beyond what they are stored in are an error with the tensor's name."""
    model, quantizer, _ = setup(centroids=centroids)
    quantizer.quantize_stage()
    with torch.no_grad():
        codebook = weight_quantizers(model)["0.weight"].codebook
        codebook[0], codebook[1] = value, -value
    for read in (quantizer.get_quantized_state, lambda: model.eval()(torch.ones(1, 16))):
        with pytest.raises(diffq.WeightError, match=r"0\.weight.*centroids='float32'"):
            read()


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["head*"], ("head*", "0.weight")),
        (["0.*", "0.weight"], ("0.weight", "2.weight")),
        (["*", "*"], ("'*'", "none")),
        (["0.bias"], ("0.bias",)),
        ("0.*", ("stages", "list")),
        ([5], ("stages[0]",)),
        ([["0.*", 5]], ("stages[0]",)),
        (None, ("stages",)),
    ],
)
def test_stages_that_break_a_rule(stages, words):
    """A stage that matches nothing, or nothing new, is refused, and the model left alone."""
    model = seeded(mlp)
    before, hooks = all_bits(model), len(model._forward_pre_hooks)
    with pytest.raises(diffq.ConfigError) as error:
        attach(model, stages=stages)
    assert all(word in str(error.value) for word in words)
    assert all_bits(model) == before
    assert len(model._forward_pre_hooks) == hooks
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 0}, ("block_size", "0")),
        ({"block_size": 2.0}, ("block_size", "2.0")),
        ({"block_size": True}, ("block_size", "True")),
        ({"block_size": "8"}, ("block_size", "'8'")),
        ({"block_size": {"dense": 8}}, ("'dense'", "linear", "depthwise", "overrides")),
        ({"block_size": {"linear": -1}}, ("block_size['linear']", "-1")),
        ({"block_size": 3}, ("16 inputs", "0.weight", "[32, 16]", "'block_size': 2")),
        ({"block_size": 64}, ("16 inputs", "'block_size': 16")),
        ({"codebook_size": 0}, ("codebook_size", "0")),
        ({"codebook_size": 65537}, ("codebook_size", "65536", "65537")),
        ({"codebook_size": 257}, ("256 of 2 weights", "0.weight", "257", "codebook_size")),
        ({"p": 1.5}, ("p must be", "1.5")),
        ({"p": -0.1}, ("p must be", "-0.1")),
        ({"p": None}, ("p must be", "None")),
        ({"noise": "zero"}, ("noise", "exact, proxy, mean", "'zero'")),
        ({"picked": "rows"}, ("picked", "blocks, clusters", "'rows'")),
        ({"centroids": "int4"}, ("centroids", "float32, float16, int8", "'int4'")),
        ({"iterations": 0}, ("iterations", "0")),
        ({"overrides": {"0.weight": {"block_size": 5}}}, ("16 inputs", "5")),
        ({"overrides": {"0.weight": {"bits": 5}}}, ("may set", "'bits'")),
        ({"include": ["*.bias"]}, ("'*.bias'", "fewer than 2 dimensions")),
    ],
)
def test_settings_that_break_a_rule(options, words):
    """Each setting that breaks a rule is refused with the rule and what was got."""
    model = seeded(mlp)
    before = all_bits(model)
    with pytest.raises(diffq.ConfigError) as error:
        attach(model, **options)
    assert all(word in str(error.value) for word in words), error.value
    assert all_bits(model) == before


def test_blocks_of_convolutions_that_cut_kernels():
    """Blocks of a convolution are whole kernels or parts of one."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.raises(diffq.ConfigError, match=r"whole kernels of 9.*got block_size 6.*size': 9"):
        attach(model, overrides={"0.weight": {"block_size": 6}})
    attach(model, overrides={"0.weight": {"block_size": 3}})


def test_pruned_weights_are_refused():
    """Codewords would not keep pruned weights at zero, so a pruned tensor is refused by name."""
    model = seeded(mlp)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    diffq.parametrize_pruning(model)
    with pytest.raises(diffq.ConfigError, match=r"0\.weight would not stay zero.*exclude"):
        attach(model)
    attach(model, exclude=["0.weight"])
