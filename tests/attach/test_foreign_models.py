"""Models that are no plain Python modules: TorchScript, exported, wrapped in a part."""

import pytest
import torch
from torch import nn

import diffq
from tests.compare import same_bits
from tests.models import QUANTIZERS, computed, mlp, seeded, snapshot_of, step

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")
INPUTS = torch.ones(2, 16)


def _loaded(tmp_path):
    torch.jit.save(torch.jit.script(mlp()), tmp_path / "model.jit")
    return torch.jit.load(tmp_path / "model.jit")


FOREIGN = {
    "script": (lambda tmp_path: torch.jit.script(mlp()), "TorchScript"),
    "trace": (lambda tmp_path: torch.jit.trace(mlp(), INPUTS), "TorchScript"),
    "freeze": (lambda tmp_path: torch.jit.freeze(torch.jit.script(mlp().eval())), "TorchScript"),
    "loaded": (_loaded, "TorchScript"),
    "export": (lambda tmp_path: torch.export.export(mlp(), (INPUTS,)).module(), "torch.export"),
    "program": (lambda tmp_path: torch.export.export(mlp(), (INPUTS,)), "ExportedProgram"),
    "state": (lambda tmp_path: mlp().state_dict(), "OrderedDict"),
    "class": (lambda tmp_path: nn.Linear, "got type"),
}


@pytest.mark.parametrize("attach", [*QUANTIZERS.values(), diffq.ActivationQuantizer])
@pytest.mark.parametrize("name", FOREIGN)
def test_models_that_are_not_in_python(name, attach, tmp_path):
    """A model whose code or mode is fixed is refused, with what it is."""
    make, word = FOREIGN[name]
    torch.compiler.reset()  # torch.export counts how often it has traced a class
    with pytest.raises(diffq.AttachError, match=word):
        attach(make(tmp_path))


def _with_part(compile_part):
    model = seeded(mlp)
    model[0] = compile_part(model[0])
    return model


SCRIPTS = [torch.jit.script, lambda part: torch.jit.trace(part, INPUTS)]


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("script", SCRIPTS, ids=["script", "trace"])
def test_a_part_in_torchscript(kind, script):
    """The weights of a scripted part are refused by name, with the pattern that leaves it out."""
    model = _with_part(script)
    before = snapshot_of(model)
    with pytest.raises(diffq.AttachError, match=r"0\.weight.*TorchScript.*exclude=\['0.weight'\]"):
        QUANTIZERS[kind](model)
    assert same_bits(snapshot_of(model), before)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("script", SCRIPTS, ids=["script", "trace"])
def test_a_part_in_torchscript_left_out(kind, script):
    """Without it, the rest is quantized, trained and stored."""
    model = _with_part(script)
    quantizer = QUANTIZERS[kind](model, exclude=["0.*"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer.setup_optimizer(optimizer)
    step(model, optimizer, INPUTS, quantizer)
    fresh = diffq.restore_quantized_state(mlp(), quantizer.get_quantized_state())
    weights = computed(model.eval())
    assert same_bits(fresh[2].weight.detach(), weights["2.weight"])
    assert same_bits(fresh[0].weight.detach(), weights["0.weight"])
    assert list(quantizer.detach().state_dict()) == list(mlp().state_dict())


@pytest.mark.parametrize("attach", [QUANTIZERS["diffq"], diffq.ActivationQuantizer])
def test_a_part_that_is_wrapped(attach):
    """A wrapper around a part is refused as one around the model is."""
    model = _with_part(nn.DataParallel)
    with pytest.raises(diffq.AttachError, match=r"model\.0 = DataParallel\(model\.0\)"):
        attach(model)


def test_a_part_that_is_compiled():
    """A compiled part works, for its model is called as ever."""
    model = _with_part(lambda part: torch.compile(part, backend="eager"))
    quantizer = QUANTIZERS["qat"](model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, optimizer, INPUTS)
    with torch.no_grad():
        outputs = model.eval()(INPUTS)
        torch.testing.assert_close(outputs, quantizer.detach(quantized=True)(INPUTS))
