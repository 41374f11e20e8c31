"""What tests compare bit for bit: only what is promised so, on every processor."""

from pathlib import Path

import pytest
import torch

from tests.compare import close, same_bits
from tests.outputs import exact_comparisons, raw_comparisons, returning_outputs

HERE = Path(__file__).parent
FILES = sorted(HERE.rglob("*.py"))


def _read(path):
    return path.read_text(encoding="utf-8")


HELPERS = {
    name
    for path in FILES
    if not path.name.startswith("test_")
    for name in returning_outputs(_read(path))
}


#: Kernels multiply no matrices: their values are promised, and so are gradients without sums.
MULTIPLYING = [path for path in FILES if HERE / "kernels" not in path.parents]


@pytest.mark.parametrize("path", MULTIPLYING, ids=lambda path: str(path.relative_to(HERE)))
def test_no_output_is_compared_exactly(path):
    """Outputs and gradients are compared with `close`, and the weights behind them exactly."""
    assert exact_comparisons(_read(path), HELPERS) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HERE)))
def test_one_exact_comparison(path):
    """Tensors are compared exactly by `same_bits`, which looks at dtypes and signs of zeros too."""
    assert raw_comparisons(_read(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "assert same_bits(model(x), wanted)",
        "assert not same_bits(model(x), model(x))",
        "assert torch.equal(model[0](x), wanted)",
        "assert model(x).equal(wanted)",
        "assert (load(path).eval()(x) == wanted).all()",
        "assert bits_of(restored(make, state)(x)) == wanted",
        "assert same_bits(weight.grad, wanted)",
        "assert same_bits(gradients(model), wanted)",
        "assert model(x).sum().item() == wanted",
        "assert same_bits(x @ weight.t(), wanted)",
        "assert same_bits(F.linear(x, weight), wanted)",
        "assert same_bits(run.model(x), wanted)",
        "y = model(x); assert same_bits(y, wanted)",
        "y, z = model(x), 0; assert same_bits([y], wanted)",
        "ys = [m(x) for m in models]; assert same_bits(*ys)",
        "ys = []; ys.append(model(x)); assert same_bits(ys[0], wanted)",
        "y = {}; y['a'] = model(x)\n    for name, z in y.items(): assert same_bits(z, wanted)",
        "y = layer.weight.grad.clone(); assert all(same_bits(a, b) for a, b in zip(y, wanted))",
        "(grad,) = torch.autograd.grad(loss, x); assert grad.tolist() == wanted",
    ],
)
def test_exact_comparisons_of_outputs_are_found(line):
    """The search sees calls of objects, gradients, and the names that hold them."""
    found = exact_comparisons(f"def test(model, models, x, wanted):\n    {line}\n", {"gradients"})
    assert found


@pytest.mark.parametrize(
    "line",
    [
        "assert close(model(x), wanted)",
        "assert same_bits(model.weight, wanted)",
        "assert same_bits(quantizer.bits(), wanted)",
        "model(x); assert same_bits(snapshot_of(model), wanted)",
        "assert model(x).shape == wanted",
        "assert model(x).item() == pytest.approx(wanted)",
        "assert (logits.grad != 0).all()",
        "y = wanted; assert same_bits(y, wanted)",
    ],
)
def test_other_comparisons_are_left_alone(line):
    """Weights and states may be compared exactly, outputs up to rounding."""
    assert exact_comparisons(f"def test(model, x, wanted):\n    {line}\n") == []


def test_what_is_repeated_may_be_compared_exactly():
    """A test of what one machine does twice may compare outputs, if it says so."""
    body = "def test(model, x):\n    assert same_bits(model(x), model(x))\n"
    assert exact_comparisons(body) != []
    assert exact_comparisons("@repeatable()\n" + body) == []


def test_functions_that_return_outputs_are_followed():
    """A function of the module that returns an output gives one."""
    source = "def run(f, x):\n    return f(x)\n\ndef test():\n    assert same_bits(run(), 1)\n"
    assert returning_outputs(source) == {"run"}
    assert len(exact_comparisons(source)) == 1


def test_raw_comparisons_are_found():
    """`torch.equal` and the method are seen."""
    assert len(raw_comparisons("torch.equal(a, b)\na.equal(b)\nsame_bits(a, b)\n")) == 2


def test_same_bits():
    """Equal bits means equal dtypes, shapes, signs of zeros, orders of keys, and NaN as well."""
    zero, nan = torch.zeros(2), torch.full((2,), torch.nan)
    assert same_bits({"a": [zero, nan], "b": 1}, {"a": [zero.clone(), nan.clone()], "b": 1})
    for other in (-zero, zero.double(), zero[:1], zero + 1e-45, zero[None], 0.0, None):
        assert not same_bits(zero, other)
    assert not same_bits({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not same_bits([zero], [zero, zero])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_close(dtype):
    """Values are close up to some units in the last place of the largest one, and no further."""
    one = torch.tensor([1.0, 1e-3, 0.0], dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert close([one, None], [one + 4 * eps, None])
    assert not close(one, one + torch.tensor([0.0, 100 * eps, 0.0], dtype=dtype))
    assert not close(one, one * torch.nan)
    assert not close(one, None)
    assert not close({"a": one}, {"b": one})
    assert not close(one, one[:2])
