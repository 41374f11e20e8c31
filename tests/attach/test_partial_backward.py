"""Backwards of a part of the graph, in several steps or inside of the forward."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import diffq
from diffq.numerics.grid import BitsLaw
from tests.compare import close, same_bits
from tests.holder import Holder, bits_of, quantizers_in
from tests.models import SUMS, computed_weight, gradients


class TwoHeads(nn.Module):
    """A plain head and a checkpointed one on one trunk."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.trunk(x)
        if self.use_reentrant is None:
            return self.a(x), self.b(x)
        return self.a(x), checkpoint(self.b, x, use_reentrant=self.use_reentrant)


def _in_two_steps(use_reentrant):
    torch.manual_seed(0)
    model = TwoHeads(use_reentrant)
    diffq.DiffQuantizer(model, min_size=0, group_size=4).no_optimizer()
    a, b = model(torch.randn(4, 8, requires_grad=True))
    a.square().sum().backward(retain_graph=True)
    b.square().sum().backward()
    return gradients(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_first_backward_without_the_checkpointed_part(use_reentrant):
    """Gradients are the same if a first backward computes nothing again and a second does."""
    assert close(_in_two_steps(use_reentrant), _in_two_steps(None), SUMS)


def test_a_backward_inside_of_the_forward():
    """A forward that differentiates on its way reads the same weights before and after."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            self.before = self.layer.weight
            torch.autograd.grad(self.layer(x).sum(), x, create_graph=True)
            (original,) = (p for n, p in self.named_parameters() if n == "layer.weight")
            torch.autograd.grad(self.layer(x).square().sum(), original, create_graph=True)
            self.after = self.layer.weight
            return self.layer(x)

    model = Inner()
    diffq.DiffQuantizer(model, min_size=0).no_optimizer()
    model(torch.randn(2, 8, requires_grad=True))
    assert bits_of(model.before) == bits_of(model.after)


@pytest.mark.parametrize("frozen", ["weight", "learned"])
def test_second_derivatives_beside_frozen_tensors(frozen):
    """create_graph=True works where the weight or its logits need no gradient."""
    model = Holder({"weight": torch.randn(6, 4)})
    diffq.DiffQuantizer(model, min_size=0, group_size=4)
    parameters = dict(model.named_parameters())
    (name,) = (name for name in parameters if name.endswith(frozen))
    parameters[name].requires_grad_(False)
    (other,) = (p for p in parameters.values() if p.requires_grad)
    weight = computed_weight(model, "weight")
    (grad,) = torch.autograd.grad(weight.pow(3).sum(), other, create_graph=True)
    grad.square().sum().backward()
    assert torch.isfinite(other.grad).all()
    assert other.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 12])
def test_lsq_trains_on_the_weights_of_evaluation(dtype, bits):
    """In half precision too, LSQ's training weight equals that of evaluation."""
    model = Holder({"weight": torch.randn(64, 64).to(dtype)})
    diffq.LSQQuantizer(model, bits=bits, min_size=0)
    trained = computed_weight(model, "weight")
    # Adding zero takes the sign off zeros, which training rounds to from both sides.
    assert same_bits(computed_weight(model.eval(), "weight") + 0, trained + 0)


@pytest.mark.parametrize("attach", [diffq.LSQQuantizer, diffq.DiffQuantizer])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_in_half_precision_reach_what_is_learned(attach, dtype):
    """Sums for scales and logits are made in float32: they do not underflow in half precision."""
    torch.manual_seed(0)
    weight, upstream = torch.randn(64, 64).to(dtype), 1e-4 * torch.randn(64, 64)
    options = {} if attach is diffq.LSQQuantizer else {"noise": "rounding", "init_bits": 3}
    grads = []
    for wide in (False, True):
        # The wide weight holds the same values, and so does its upstream gradient.
        model = Holder({"weight": weight.float() if wide else weight.clone()})
        attach(model, min_size=0, **options)
        noisy = computed_weight(model, "weight")
        noisy.backward(upstream.to(dtype).to(noisy.dtype))
        (quantizer,) = quantizers_in(model)
        grads.append(quantizer.grad)
    # The quantized weight itself is rounded to half precision, which moves each error a little:
    # less than it would at more bits.
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[1].norm()


def test_other_bits_are_other_weights():
    """Eval sees each new set of logits, also where it takes the place of one that is gone."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    diffq.DiffQuantizer(model, min_size=0, group_size=4)
    model.eval()
    name = "_diffq.learned"
    found = set()
    model.register_forward_hook(lambda _, inputs, outputs: found.add(bits_of(outputs)))
    with torch.no_grad():
        for bits in range(3, 13):
            logits = torch.full((16,), BitsLaw(2, 15).logit(bits))
            functional_call(model, {name: logits}, (torch.eye(8),))
    assert len(found) == 10
