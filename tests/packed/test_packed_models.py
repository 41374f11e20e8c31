"""Models whose weights stay packed: they hold and compute what the plain load gives."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffq
from diffq.packed.weight import PackedWeight
from tests.compare import close, same_bits
from tests.holder import all_bits, by_pickle, by_torch
from tests.models import MODELS, QUANTIZERS, ConvNet, TiedModules, mlp, pairs, seeded, tokens


def saved(make, path, kind="diffq", **options):
    """The file of a model that is quantized."""
    diffq.save(QUANTIZERS[kind](seeded(make), **options), path)
    return path


def on_meta(make):
    """A model without memory."""
    with torch.device("meta"):
        return make()


def both(make, path):
    """The plain and the packed load, in eval."""
    return diffq.load(path, make()).eval(), diffq.load(path, make(), packed=True).eval()


def state_of(model):
    """The state dict as a plain dict."""
    return dict(model.state_dict())


@pytest.mark.parametrize(("model", "kind"), pairs(MODELS, QUANTIZERS))
def test_models_and_quantizers(model, kind, tmp_path):
    """A packed model has the state dict of a plain one, bit for bit, and close outputs."""
    make, make_input = MODELS[model]
    plain, packed = both(make, saved(make, tmp_path / "m", kind))
    assert same_bits(state_of(packed), state_of(plain))
    inputs = make_input()
    with torch.no_grad():
        assert close(packed(inputs), plain(inputs))


@pytest.mark.parametrize("model", MODELS)
def test_models_on_the_meta_device(model, tmp_path):
    """A model on the meta device is filled: packed weights, and all others on the CPU."""
    make, make_input = MODELS[model]
    path = saved(make, tmp_path / "m")
    plain = diffq.load(path, make()).eval()
    packed = diffq.load(path, on_meta(make), packed=True).eval()
    assert same_bits(state_of(packed), state_of(plain))
    assert {each.device.type for each in [*packed.parameters(), *packed.buffers()]} == {"cpu"}
    inputs = make_input()
    with torch.no_grad():
        assert close(packed(inputs), plain(inputs))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(4, 6, 3),
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="reflect"),
        lambda: nn.Conv3d(4, 6, 2),
        lambda: nn.ConvTranspose1d(4, 6, 3),
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        lambda: nn.ConvTranspose3d(4, 6, 2),
        lambda: nn.Linear(8, 6),
    ],
)
def test_kinds_of_layers(make, tmp_path):
    """Every kind of convolution, and a linear layer, is packed and computes as the plain one."""
    plain, packed = both(make, saved(make, tmp_path / "m"))
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    dims = plain.weight.dim() - 2
    inputs = torch.randn(2, 4, *[7] * dims) if dims else torch.randn(2, 8)
    with torch.no_grad():
        assert close(packed(inputs), plain(inputs))


def test_what_is_packed(tmp_path):
    """Weights of linear, embedding and convolution layers are no parameters; all others are."""
    make, _ = MODELS["lstm"]
    packed = diffq.load(saved(make, tmp_path / "m"), make(), packed=True)
    names = {name for name, _ in packed.named_parameters()}
    assert names == {n for n, _ in make().named_parameters()} - {"embed.weight", "head.weight"}
    assert isinstance(packed.rnn, nn.LSTM)


def test_classes_and_attributes_stay(tmp_path):
    """Packed layers are of their classes, by isinstance and by name, and give their weight."""
    packed = diffq.load(saved(mlp, tmp_path / "m"), mlp(), packed=True)
    assert type(packed[0]) is not nn.Linear
    assert isinstance(packed[0], nn.Linear)
    assert type(packed[0]).__name__ == "Linear"
    assert packed[0].weight.shape == (32, 16)
    assert "bits a weight in memory" in repr(packed)


def test_layers_of_users_classes(tmp_path):
    """A subclass keeps its own forward, also where it registers subclasses or scales rows."""
    known = []

    class Scaled(nn.Embedding):
        def __init_subclass__(cls):
            known.append(cls)

        def forward(self, x):
            return 3 * super().forward(x)

    def make():
        return Scaled(20, 8)

    plain, packed = both(make, saved(make, tmp_path / "m"))
    assert known == []
    assert close(packed(torch.tensor([3, 4])), plain(torch.tensor([3, 4])))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("make", [TiedModules, ConvNet])
def test_copies(make, copied, tmp_path):
    """Copies and pickles of a packed model are packed, with its values and its ties."""
    packed = diffq.load(saved(make, tmp_path / "m"), make(), packed=True)
    packed.state_dict()
    other = copied(packed)
    assert all_bits(other) == all_bits(packed)
    count = [sum(isinstance(m, PackedWeight) for m in each.modules()) for each in (packed, other)]
    assert count[0] == count[1]
    assert type(other) is type(packed)


def test_ties(tmp_path):
    """Tied layers share one packed weight, before and after a move, and one saved tensor."""
    packed = diffq.load(saved(TiedModules, tmp_path / "m"), TiedModules(), packed=True)
    assert packed.embed.packed_weight is packed.head.packed_weight
    state = packed.double().state_dict()
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert packed.embed.packed_weight is packed.head.packed_weight
    again = packed.state_dict()
    assert again["embed.weight"].data_ptr() != state["embed.weight"].data_ptr()


@pytest.mark.parametrize("kind", ["diffq", "qat", "qat-channel", "lsq", "product"])
def test_embeddings_decode_their_rows(kind, tmp_path, monkeypatch):
    """An embedding of few tokens decodes their rows alone, a whole one where that is less."""

    def make():
        return nn.Embedding(24, 16, padding_idx=0)

    plain, packed = both(make, saved(make, tmp_path / "m", kind))
    calls = []
    whole = PackedWeight.decode
    monkeypatch.setattr(PackedWeight, "decode", lambda self: calls.append(self) or whole(self))
    few = torch.tensor([[23, 0], [7, 7]], dtype=torch.int32)
    assert close(packed(few), plain(few))
    assert calls == []
    many = tokens()[:, :4].repeat(4, 1)
    assert close(packed(many), plain(many))
    assert len(calls) == 1
    empty = torch.empty(0, 3, dtype=torch.int64)
    assert packed(empty).shape == (0, 3, 16)


@pytest.mark.parametrize("index", [24, -1])
def test_indices_out_of_range(index, tmp_path):
    """Rows that the table does not have are torch's IndexError, as for a plain embedding."""

    def make():
        return nn.Embedding(24, 16)

    packed = diffq.load(saved(make, tmp_path / "m"), make(), packed=True)
    with pytest.raises(IndexError):
        packed(torch.tensor([index]))


def test_embeddings_with_a_largest_norm(tmp_path):
    """An embedding that scales its rows to a largest norm computes as a plain one, each time."""

    def make():
        return nn.Embedding(24, 16, max_norm=0.5)

    path = tmp_path / "m"
    diffq.save(QUANTIZERS["qat"](seeded(lambda: nn.Embedding(24, 16))), path)
    plain, packed = both(make, path)
    for _ in range(2):
        torch.testing.assert_close(packed(torch.tensor([3, 4])), plain(torch.tensor([3, 4])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts(dtype, tmp_path):
    """A cast model holds the cast weights; a model of another dtype loads as it was saved."""
    plain, packed = both(ConvNet, saved(ConvNet, tmp_path / "m"))
    assert same_bits(state_of(packed.to(dtype)), state_of(plain.to(dtype)))

    def make():
        return mlp().to(dtype)

    plain, packed = both(make, saved(make, tmp_path / "n"))
    assert same_bits(state_of(packed), state_of(plain))
    assert packed[0].weight.dtype == dtype


def test_gradients_go_through(tmp_path):
    """Inputs and the other parameters get the gradients of a plain model, in training mode too."""
    plain, packed = both(mlp, saved(mlp, tmp_path / "m"))
    found = []
    for model in (plain, packed):
        inputs = torch.linspace(-1, 1, 32).view(2, 16).requires_grad_()
        model.train()(inputs).square().sum().backward()
        found.append([inputs.grad, model[0].bias.grad, model[2].bias.grad])
    assert close(*found)
    assert not packed[0].weight.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode, tmp_path):
    """Forwards work in each mode without gradients, after a load in that mode as well."""
    path = saved(TiedModules, tmp_path / "m")
    plain, packed = both(TiedModules, path)
    inputs = tokens()
    with mode():
        assert close(packed(inputs), plain(inputs))
        loaded = diffq.load(path, on_meta(TiedModules), packed=True).eval()
        assert close(loaded(inputs), plain(inputs))


def test_one_weight_at_a_time(tmp_path, monkeypatch):
    """Without gradients, the decoded weight of a layer is freed before the next is decoded."""
    packed = diffq.load(saved(mlp, tmp_path / "m"), mlp(), packed=True)
    whole, decoded, alive = PackedWeight.decode, [], []

    def decode(self):
        alive.append(sum(reference() is not None for reference in decoded))
        weight = whole(self)
        decoded.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(PackedWeight, "decode", decode)
    with torch.no_grad():
        packed(torch.randn(2, 16))
    assert alive == [0, 0]


def test_compiled_models(tmp_path):
    """A compiled packed model computes what the plain one does."""
    plain, packed = both(mlp, saved(mlp, tmp_path / "m"))
    inputs = torch.randn(3, 16)
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled(inputs), plain(inputs))


def test_constant_weights(tmp_path):
    """Constant weights, zeros among them, decode to their constants."""

    def make():
        model = mlp()
        with torch.no_grad():
            model[0].weight.fill_(-0.25)
            model[2].weight.zero_()
        return model

    plain, packed = both(make, saved(make, tmp_path / "m"))
    assert same_bits(state_of(packed), state_of(plain))


def test_activations_beside(tmp_path):
    """A model with quantized activations loads packed, and rounds its activations."""

    def make():
        model = seeded(mlp)
        return model, diffq.ActivationQuantizer(model)

    model, activations = make()
    quantizer = QUANTIZERS["qat"](model)
    with activations.calibrate():
        model(torch.randn(8, 16))
    diffq.save(quantizer, tmp_path / "m")
    plain, packed = make()[0], make()[0]
    diffq.load(tmp_path / "m", plain)
    diffq.load(tmp_path / "m", packed, packed=True)
    inputs = torch.randn(3, 16)
    with torch.no_grad():
        assert close(packed.eval()(inputs), plain.eval()(inputs))


def test_tied_to_another_kind_of_module(tmp_path):
    """A weight that a module of another kind holds too is decoded at the load."""

    class Head(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return F.linear(x, self.weight)

    def make():
        embed = nn.Embedding(24, 16)
        return nn.Sequential(embed, nn.Linear(16, 16), Head(embed.weight))

    packed = diffq.load(saved(make, tmp_path / "m"), make(), packed=True)
    assert packed[0].weight is packed[2].weight
    assert isinstance(packed[0].weight, nn.Parameter)
    assert isinstance(packed[1].packed_weight, PackedWeight)
