"""What packed models refuse, with nothing changed, and what a load into them warns of."""

import pytest
import torch
from torch import nn

import diffq
from tests.compare import same_bits
from tests.holder import all_bits
from tests.models import QUANTIZERS, ConvNet, TiedModules, mlp


@pytest.fixture
def path(tmp_path):
    """A file of the small model."""
    diffq.save(QUANTIZERS["qat"](mlp()), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def packed(path):
    """The small model, packed."""
    return diffq.load(path, mlp(), packed=True)


def _refused(model, error, call, *words):
    """Checks that a call is refused with these words, and changes no bit of the model."""
    before = all_bits(model)
    with pytest.raises(error) as caught:
        call()
    assert all_bits(model) == before
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_no_quantizer(packed, kind):
    """A quantizer is refused, because it would leave the packed weights out of its file."""
    _refused(packed, diffq.AttachError, lambda: QUANTIZERS[kind](packed), "packed")
    _refused(packed, diffq.AttachError, lambda: diffq.ActivationQuantizer(packed), "packed")


@pytest.mark.parametrize("strict", [True, False])
def test_no_state_dict(packed, strict):
    """A state dict is not loaded, as strict=False would pass the packed weights over."""
    state = {name: torch.ones_like(value) for name, value in mlp().state_dict().items()}

    def load():
        packed.load_state_dict(state, strict=strict)

    _refused(packed, diffq.MismatchError, load, "'0.weight'", "without packed=True")


def test_no_state_dict_of_a_part(packed):
    """A part of the model, and what holds the model, refuse a state dict too."""
    whole = nn.Sequential(nn.BatchNorm1d(16), packed)
    layer = nn.Linear(16, 32)
    _refused(packed, diffq.MismatchError, lambda: packed[0].load_state_dict(layer.state_dict()))
    state = {f"1.{name}": value for name, value in mlp().state_dict().items()}
    _refused(packed, diffq.MismatchError, lambda: whole.load_state_dict(state, strict=False))


def test_state_dicts_without_packed_weights(packed):
    """The other parameters of a packed model can be loaded."""
    packed.load_state_dict({"0.bias": torch.ones(32), "2.bias": torch.zeros(8)})
    assert same_bits(packed[0].bias.detach(), torch.ones(32))


@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(32, 16)), torch.ones(32, 16), None])
def test_no_other_weight(packed, value):
    """Nothing else can be put in the place of a packed weight."""
    _refused(packed, diffq.AttachError, lambda: setattr(packed[0], "weight", value), "replaced")
    _refused(packed, diffq.AttachError, lambda: packed[0].register_parameter("weight", None))


def test_no_second_load(packed, path):
    """A file or a state is not loaded into a packed model."""
    state = QUANTIZERS["qat"](mlp()).get_quantized_state()
    for call in (
        lambda: diffq.load(path, packed),
        lambda: diffq.load(path, packed, packed=True),
        lambda: diffq.restore_quantized_state(packed, state),
    ):
        _refused(packed, diffq.MismatchError, call, "packed weights", "new model")


def test_no_model(path):
    """packed=True without a model is refused."""
    with pytest.raises(diffq.ConfigError, match="packed=True"):
        diffq.load(path, packed=True)


def test_another_model(path):
    """A file of another model is refused, and the model stays plain."""
    model = ConvNet()
    _refused(model, diffq.MismatchError, lambda: diffq.load(path, model, packed=True), "not stored")
    assert type(model.down) is nn.Conv2d


@pytest.mark.parametrize("cut", [-1, -40])
def test_damaged_files(path, cut):
    """A damaged file is refused, and the model stays plain."""
    data = bytearray(path.read_bytes())
    data[cut] ^= 1
    path.write_bytes(data)
    model = mlp()
    _refused(model, diffq.FormatError, lambda: diffq.load(path, model, packed=True))
    assert type(model[0]) is nn.Linear


def test_ties_with_different_values(path, tmp_path):
    """Tied layers whose weights are stored apart, with other values, are refused."""
    model = TiedModules()
    model.head.weight = nn.Parameter(torch.randn(24, 16))
    diffq.save(QUANTIZERS["qat"](model), tmp_path / "apart")
    tied = TiedModules()

    def load():
        diffq.load(tmp_path / "apart", tied, packed=True)

    _refused(tied, diffq.MismatchError, load, "ties")


class Rotary(nn.Module):
    """A layer with a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.register_buffer("angles", torch.arange(8.0), persistent=False)


def test_buffers_on_the_meta_device(tmp_path):
    """Tensors on the meta device for which the file has no values are named in an error."""
    diffq.save(QUANTIZERS["qat"](Rotary()), tmp_path / "r")
    with torch.device("meta"):
        model = Rotary()
    with pytest.raises(diffq.MismatchError, match=r"meta.*angles.*include_buffers"):
        diffq.load(tmp_path / "r", model, packed=True)
    assert type(model.body) is nn.Linear
    model.angles = torch.arange(8.0)
    assert not diffq.load(tmp_path / "r", model, packed=True).body.weight.is_meta


def test_device(path):
    """The device is where tensors on the meta device go; others must be on it already."""
    with torch.device("meta"):
        model = mlp()
    assert diffq.load(path, model, device="cpu", packed=True)[0].bias.device.type == "cpu"
    with pytest.raises(diffq.ConfigError, match="keep their place"):
        diffq.load(path, mlp(), device="meta", packed=True)


def test_names_that_only_one_has(path):
    """With strict=False, shared layers are packed and the others keep their values."""
    model = nn.Sequential(*mlp(), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="4 names"):
        diffq.load(path, model, strict=False, packed=True)
    assert type(model[0]) is not nn.Linear
    assert type(model[3]) is nn.Linear


def test_nothing_to_pack(tmp_path):
    """A file without levels for a layer loads as a plain one, with a warning."""
    diffq.save(QUANTIZERS["qat"](mlp(), exclude=["*.weight"]), tmp_path / "raw")
    model = mlp()
    with pytest.warns(diffq.DiffqWarning, match="Nothing is packed"):
        diffq.load(tmp_path / "raw", model, packed=True)
    assert same_bits(dict(model.state_dict()), diffq.load(tmp_path / "raw"))
    assert type(model[0]) is nn.Linear
