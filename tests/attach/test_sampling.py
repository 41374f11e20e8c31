"""The noise of training forwards: one sample for each, and none in eval."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compare import close, same_bits
from tests.holder import weight_quantizers
from tests.models import (
    MODELS,
    SharedModule,
    TiedHead,
    TiedModules,
    attached,
    evaluate_alike,
    mlp,
    restored,
    seeded,
    tokens,
)

RANDOM = ["diffq", "diffq-uniform"]


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("name", MODELS)
def test_training_forwards_differ_and_eval_forwards_do_not(name, kind):
    """Each training forward has its own noise; eval forwards have none."""
    make, make_input = MODELS[name]
    model, _ = attached(make, kind)
    inputs = make_input()
    assert not close(model(inputs), model(inputs))
    model.eval()
    assert close(model(inputs), model(inputs))


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("name", MODELS)
def test_a_seed_fixes_the_noise(name, kind):
    """The noise comes from torch's generator alone."""
    make, make_input = MODELS[name]
    model, _ = attached(make, kind)
    inputs, outputs = make_input(), []
    for _ in range(2):
        model.load_state_dict(seeded(make).state_dict())
        torch.manual_seed(7)
        outputs.append(model(inputs))
    assert close(*outputs)


@pytest.mark.parametrize("kind", ["diffq-rounding", "qat", "lsq"])
@pytest.mark.parametrize("name", ["mlp", "lstm", "encoder"])
def test_rounding_trains_on_the_eval_weights(name, kind):
    """Without random noise, training computes with the weights that eval computes with."""
    make, make_input = MODELS[name]
    model, _ = attached(make, kind)
    inputs = make_input()
    trained = model(inputs)
    assert close(trained, model.eval()(inputs))


@pytest.mark.parametrize("kind", RANDOM)
def test_one_sample_per_forward(kind):
    """All reads of a tensor within one forward of the root see one sample."""
    seen = []

    class _Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            first, second = self.linear(x), self.linear(x)
            seen.append((first, second, self.linear.weight, self.linear.weight))
            return first + second

    model, _ = attached(_Twice, kind)
    model(torch.randn(3, 16))
    model(torch.randn(3, 16))
    for first, second, weight, again in seen:
        assert close(first, second)
        assert same_bits(weight, again)
    assert not same_bits(seen[0][2], seen[1][2])


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("make", [TiedModules, SharedModule])
def test_ties_see_one_sample(make, kind):
    """Both places of a tied tensor compute with the same noisy weight."""
    model, _ = attached(make, kind)
    seen = []
    names = ("embed", "head") if make is TiedModules else ("first", "second")
    model.register_forward_hook(
        lambda *_: seen.extend(getattr(model, name).weight for name in names), prepend=True
    )
    model(tokens() if make is TiedModules else torch.randn(3, 16))
    assert same_bits(seen[0], seen[1])


@pytest.mark.parametrize("kind", RANDOM)
def test_weight_read_outside_its_module(kind):
    """A head that reads the embedding's weight gets the noisy one, then the quantized one."""
    model, quantizer = attached(TiedHead, kind)
    embedding, seen = weight_quantizers(model)["embed.weight"], []
    original = F.linear

    def _linear(x, weight, *rest):
        seen.append(weight.detach().clone())
        return original(x, weight, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", _linear)
        model(tokens()).sum().backward()
        assert not same_bits(seen[-1], model.embed.weight)
        assert embedding.grad.any()
        model.eval()(tokens())
    assert same_bits(seen[-1], restored(TiedHead, quantizer).embed.weight)


def test_submodule_called_directly():
    """A submodule called without its root has noise in training and is quantized in eval."""
    model, quantizer = attached(mlp)
    inputs = torch.randn(3, 16)
    assert not close(model[0](inputs), model[0](inputs))
    model[0](inputs).sum().backward()
    assert weight_quantizers(model)["0.weight"].grad.any()
    assert evaluate_alike(model.eval()[0], restored(mlp, quantizer)[0], inputs)


def test_submodule_has_its_own_noise_after_a_root_forward():
    """A direct call after a forward of the root does not use that forward's sample again."""
    model, _ = attached(mlp)
    inputs = torch.randn(3, 16)
    model(inputs)
    assert not close(model[0](inputs), model[0](inputs))
