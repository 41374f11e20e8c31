"""Perturbed kernels: other last digits than torch's own, and nothing else."""

import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import processors
from tests.compare import close
from tests.holder import bits_of
from tests.models import MODELS, gradients, seeded

pytestmark = pytest.mark.skipif(
    not hasattr(torch.library, "get_kernel"), reason="torch.library.get_kernel came with torch 2.9"
)

#: Name to a call that multiplies matrices, in each of the ways that torch has for it.
CALLS = {
    "mm": lambda x: x @ x,
    "mv": lambda x: x @ x[0],
    "dot": lambda x: x[0] @ x[1],
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "out": lambda x: torch.mm(x, x, out=torch.empty(16, 16)),
    "in place": lambda x: torch.zeros(16, 16).addmm_(x, x),
    "linear": lambda x: F.linear(x, x, x[0]),
    "bilinear": lambda x: F.bilinear(x, x, x.expand(2, 16, 16)),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "conv": lambda x: F.conv1d(x[None], x.view(4, 16, 4)),
    "transposed conv": lambda x: F.conv_transpose2d(x.view(1, 1, 16, 16), x.view(1, 1, 16, 16)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "lstm": lambda x: seeded(lambda: nn.LSTM(16, 4))(x)[0].detach(),
    "bfloat16": lambda x: x.bfloat16() @ x.bfloat16(),
    "float64": lambda x: x.double() @ x.double(),
    "autocast": lambda x: torch.autocast("cpu")(torch.mm)(x, x),
    "vmap": lambda x: torch.func.vmap(torch.mv, (None, 0))(x, x),
}


@pytest.fixture(autouse=True)
def _perturbed():
    """Perturbed kernels, which the whole session may have already."""
    with nullcontext() if processors.wanted() else processors.perturbed():
        yield


def _differ(one, other):
    return bits_of(one) != bits_of(other)


@pytest.mark.parametrize("name", CALLS)
def test_last_digits_differ(name):
    """Each way of multiplying matrices gives other bits at each call, and close values."""
    x = torch.randn(16, 16)
    one, other = CALLS[name](x), CALLS[name](x)
    assert _differ(one, other)
    assert close(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_of_all_models_differ(name):
    """No kernel of the models that tests use is left out, forward or backward."""
    make, make_input = MODELS[name]
    model, inputs, seen = seeded(make), make_input(), []
    for _ in range(2):
        model.zero_grad()
        outputs = model(inputs)
        outputs.square().mean().backward()
        seen.append({"outputs": outputs.detach(), **gradients(model)})
    assert close(seen[0]["outputs"], seen[1]["outputs"])
    assert all(_differ(seen[0][key], other) for key, other in seen[1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_exact_products_stay(dtype):
    """What every processor computes exactly stays: products of small numbers, infinity and NaN."""
    x = torch.tensor([[0.5, 2.0], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 0.0]], dtype=dtype)
    for rows in (x, x[:2]):
        product = rows @ torch.ones(2, dtype=dtype)
        assert repr(product.tolist()) == repr([2.5, 0.0, torch.inf, torch.nan][: len(rows)])


def test_equal_calls_may_repeat():
    """Under `repeatable`, equal calls give equal bits; another layout of the same values not."""
    x = torch.randn(16, 16)
    turned = x.t().contiguous().t()
    with processors.repeatable():
        one, same, other = x @ x, x @ x, x @ turned
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(x @ x))
        thread.start()
        thread.join()
    assert not _differ(one, same)
    assert _differ(one, other)
    assert _differ(one, elsewhere[0])
    assert close([other, *elsewhere], [one, one])
    assert _differ(x @ x, x @ x)
