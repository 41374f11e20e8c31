"""Export of attached models in eval mode: torch.export and ONNX, run by onnxruntime."""

import pytest
import torch

from tests.compare import close
from tests.integrations.tiny import KINDS, library, perturb, prepared, shipped
from tests.models import ConvNet, TiedModules, mlp, tokens

library("onnx")
library("onnxscript")
onnxruntime = library("onnxruntime")

#: Another runtime sums in another order, and fuses operations.
OTHER_RUNTIME = 2**12


def images():
    """A batch for ConvNet."""
    return torch.randn(4, 3, 8, 8)


MODELS = {
    "conv": (ConvNet, images),
    "tied": (TiedModules, tokens),
    "mlp": (mlp, lambda: torch.randn(5, 16)),
}


def case(name, kind):
    """An attached model in eval mode, its input, and what its file computes of it."""
    make, make_input = MODELS[name]
    model, quantizer = prepared(make, kind)
    perturb(model)
    x = make_input()
    with torch.no_grad():
        return model.eval(), x, shipped(quantizer, make())(x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"), [*(("mlp", kind) for kind in KINDS), ("conv", "diffq"), ("tied", "diffq")]
)
def test_export(name, kind, grad):
    """An exported program, decomposed or not, computes with the quantized weights."""
    model, x, wanted = case(name, kind)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,))
        decomposed = program.run_decompositions()
    for each in (program, decomposed):
        assert close(each.module()(x).detach(), wanted)


@pytest.mark.parametrize("strict", [True, False])
def test_export_through_a_file(strict, tmp_path):
    """A saved program is loaded without the model's class and computes the same."""
    model, x, wanted = case("mlp", "diffq")
    torch.export.save(torch.export.export(model, (x,), strict=strict), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert close(loaded.module()(x).detach(), wanted)


def test_trace():
    """`torch.jit.trace` of an attached model in eval mode keeps the quantized weights."""
    model, x, wanted = case("conv", "diffq")
    traced = torch.jit.trace(model, x)
    assert close(traced(x).detach(), wanted)


@pytest.mark.parametrize(
    ("name", "kind", "grad"),
    [("conv", "diffq", False), ("conv", "qat", True), ("tied", "product", False)],
)
def test_onnx(name, kind, grad, tmp_path):
    """onnxruntime computes with the exported model what the file computes in torch."""
    model, x, wanted = case(name, kind)
    with torch.set_grad_enabled(grad):
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert close(torch.from_numpy(found), wanted, OTHER_RUNTIME)


def test_model_after_export():
    """An export leaves the model as it was: it evaluates and trains."""
    model, x, wanted = case("mlp", "diffq")
    torch.export.export(model, (x,))
    with torch.no_grad():
        assert close(model(x), wanted)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
