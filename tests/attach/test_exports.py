"""Exported, traced and scripted attached models compute with the stored weights."""

import pytest
import torch
from torch import nn

from tests.compare import close, same_bits
from tests.models import ConvNet, Recurrent, TiedHead, attached, mlp, restored, tokens
from tests.readers import COARSE, reads_parameters, x16


def _images():
    return torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "make_input", "gradients", "strict"),
    [
        (TiedHead, tokens, True, False),
        (mlp, x16, True, True),
        pytest.param(TiedHead, tokens, False, True, marks=pytest.mark.slow),
        pytest.param(ConvNet, _images, False, False, marks=pytest.mark.slow),
    ],
)
def test_export(make, make_input, gradients, strict):
    """An exported program gives the stored model's outputs, before and after decompositions."""
    model, quantizer = attached(make, exclude=["bias"], **COARSE)
    model.eval()
    inputs, fresh = make_input(), restored(make, quantizer)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (inputs,), strict=strict)
        decomposed = program.run_decompositions()
    wanted = fresh(inputs).detach()
    with torch.no_grad():
        assert close(program.module()(inputs), wanted)
        assert close(decomposed.module()(inputs), wanted)
        assert close(model(inputs), wanted)
    assert reads_parameters(model)


def test_export_of_a_dynamic_batch():
    """A program with a dynamic batch takes any."""
    model, quantizer = attached(mlp, exclude=["bias"], **COARSE)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model.eval(), (x16(4),), dynamic_shapes=shapes)
    fresh = restored(mlp, quantizer)
    for batch in (2, 9):
        inputs = x16(batch)
        assert close(program.module()(inputs).detach(), fresh(inputs).detach())


def test_exports_are_of_their_time():
    """A second export, after a step, has the weights of then."""
    model, quantizer = attached(mlp, exclude=["bias"], **COARSE)
    inputs, outputs = x16(), []
    for _ in range(2):
        with torch.no_grad():
            program = torch.export.export(model.eval(), (inputs,))
            outputs.append(program.module()(inputs))
            assert close(outputs[-1], restored(mlp, quantizer)(inputs))
            model[0].weight.normal_()
    assert not close(*outputs)


@pytest.mark.parametrize(
    ("make", "make_input"), [(mlp, x16), (TiedHead, tokens), (ConvNet, _images)]
)
@pytest.mark.parametrize("gradients", [True, False])
def test_trace(make, make_input, gradients):
    """A traced model, which torch checks by a second trace, gives the stored model's outputs."""
    model, quantizer = attached(make, **COARSE)
    model.eval()
    inputs, fresh = make_input(), restored(make, quantizer)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, inputs)
    with torch.no_grad():
        assert close(traced(inputs), fresh(inputs))
        assert close(model(inputs), fresh(inputs))
    assert reads_parameters(model)


def test_trace_of_a_recurrent_model():
    """A traced LSTM gives the stored one's outputs."""
    model, quantizer = attached(Recurrent, **COARSE)
    inputs = tokens()
    with torch.no_grad():
        traced = torch.jit.trace(model.eval(), inputs)
        assert close(traced(inputs), restored(Recurrent, quantizer)(inputs))


def test_symbolic_trace():
    """A graph module of torch.fx has the stored weights."""
    model, quantizer = attached(mlp, **COARSE)
    inputs = x16()
    with torch.no_grad():
        graph = torch.fx.symbolic_trace(model.eval())
        assert close(graph(inputs), restored(mlp, quantizer)(inputs))
    assert reads_parameters(model)


def test_scripting_after_detach():
    """detach(quantized=True) gives a model that torch.jit.script takes, with the stored values."""
    _model, quantizer = attached(mlp, **COARSE)
    fresh, inputs = restored(mlp, quantizer), x16()
    scripted = torch.jit.script(quantizer.detach(quantized=True).eval())
    assert close(scripted(inputs).detach(), fresh(inputs).detach())


def test_fused_convolutions():
    """torch's fusion of convolution and norm takes the Parameters of an attached model."""

    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()

    plain, (model, _) = make(), attached(make)
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if "diffq" not in n})
    fused = [nn.utils.fusion.fuse_conv_bn_eval(*net.eval()) for net in (plain, model)]
    assert same_bits(*[dict(net.named_parameters())["weight"].detach() for net in fused])
