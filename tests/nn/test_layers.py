"""LayerDrop, sharing in chunks, every other layer."""

import copy
import itertools

import pytest
import torch
from torch import nn

import diffq
from diffq.errors import ConfigError
from tests.compare import close, same_bits
from tests.holder import quantizers_in, weight_quantizers
from tests.models import computed_weight, evaluate_alike


class Residual(nn.Module):
    """x + f(x), width 8."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, scale=1.0):
        return x + scale * torch.tanh(self.inner(x))


class Net(nn.Module):
    """A stem, residual layers in a list, and a head."""

    def __init__(self, count=4):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Residual() for _ in range(count))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _net(count=4, rate=None):
    model = Net(count)
    if rate is not None:
        model.layers = diffq.LayerDrop(model.layers, rate)
    return model


def _layers(kind, count):
    plain = [Residual() for _ in range(count)]
    return kind(*plain) if kind is nn.Sequential else kind(plain)


# LayerDrop


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_names_stay(kind):
    """LayerDrop keeps the names, order and identity of the parameters of what it replaces."""
    layers = _layers(kind, 3)
    drop = diffq.LayerDrop(layers)
    assert [n for n, _ in drop.named_parameters()] == [n for n, _ in layers.named_parameters()]
    assert all(a is b for a, b in zip(drop.parameters(), layers.parameters(), strict=True))


def test_eval_uses_every_layer():
    """In eval mode the output is that of the plain list, whatever the rate."""
    model = _net()
    dropping = copy.deepcopy(model)
    dropping.layers = diffq.LayerDrop(dropping.layers, 1.0)
    x = torch.randn(5, 8)
    assert close(dropping.eval()(x), model.eval()(x))


def test_training_leaves_out_whole_layers():
    """An output in training is that of some of the layers, in their order."""
    drop = diffq.LayerDrop([Residual() for _ in range(4)], 0.5)
    x = torch.randn(5, 8)
    possible = []
    for choice in itertools.product((False, True), repeat=4):
        wanted = x
        for layer, chosen in zip(drop.children(), choice, strict=True):
            wanted = layer(wanted) if chosen else wanted
        possible.append(wanted)
    outputs = [drop(x) for _ in range(9)]
    seen = [[close(output, wanted) for wanted in possible] for output in outputs]
    assert all(any(equal) for equal in seen)
    assert len({tuple(equal) for equal in seen}) > 3


def test_rate_is_a_probability():
    """Layers are left out independently, as often as the rate says."""
    drop = diffq.LayerDrop([nn.Identity() for _ in range(50)], 0.2)
    left_out = [50 - len(list(drop)) for _ in range(200)]
    # 10,000 draws: the mean of 10 a forward is known to 0.2, the deviation is 2.83.
    assert abs(sum(left_out) / 200 - 10) < 0.8
    assert 1.5 < torch.tensor(left_out).double().std() < 4.5


@pytest.mark.parametrize(("rate", "kept"), [(0, 4), (1, 0)])
def test_extreme_rates(rate, kept):
    """Rate 0 keeps every layer, rate 1 none."""
    assert len(list(diffq.LayerDrop([Residual() for _ in range(4)], rate))) == kept


def test_a_seed_repeats_the_draws():
    """Equal seeds leave out equal layers, so that checkpointing and resuming can replay them."""
    drop = diffq.LayerDrop([Residual() for _ in range(8)], 0.5)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([list(drop) for _ in range(4)])
    assert runs[0] == runs[1]


def test_further_arguments_reach_the_layers():
    """A call passes further arguments to each layer."""
    drop = diffq.LayerDrop([Residual(), Residual()], 0.0)
    x = torch.randn(2, 8)
    first, second = drop.children()
    assert close(drop(x, scale=2.0), second(first(x, 2.0), 2.0))


def test_slices_keep_the_rate():
    """A slice is a LayerDrop of the same rate; an index gives a layer, also in training."""
    drop = diffq.LayerDrop([Residual() for _ in range(4)], 1.0)
    assert drop[1:].rate == 1.0
    assert list(drop[1:].children()) == list(drop.children())[1:]
    assert drop[2] is list(drop.children())[2]


def test_encoder_of_torch():
    """LayerDrop takes the place of the list in torch's transformer encoder."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    wanted = model(x)
    model.layers = diffq.LayerDrop(model.layers, 0.0)
    assert close(model(x), wanted)
    model.layers.rate = 1.0
    assert close(model(x), x)


def test_wrong_rate():
    """A rate that is no probability is refused."""
    with pytest.raises(ConfigError, match="rate must be a number, from 0 to 1, got 2"):
        diffq.LayerDrop([], 2)


@pytest.mark.parametrize("shared", [False, True])
def test_dropped_layers_get_no_size_gradient(shared):
    """The size moves the bits of the layers that ran since the last step, and of no other."""
    model = _net()
    if shared:
        diffq.share_layers(model.layers)
    model.layers = diffq.LayerDrop(model.layers, 0.5)
    quantizer = diffq.DiffQuantizer(model, min_size=0, include=["weight"])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    quantizer.setup_optimizer(optimizer)
    seen = set()
    for layer in model.layers.children():
        layer.register_forward_hook(lambda layer, *_: seen.add(layer))
    moved = 0
    for _ in range(20):
        seen.clear()
        model(torch.randn(5, 8))
        model.zero_grad()
        quantizer.model_size().backward()
        optimizer.step()
        quantizers = weight_quantizers(model)
        for name, layer in model.layers.named_children():
            grad = quantizers[f"layers.{name}.inner.weight"].grad
            assert grad.all() if layer in seen else not grad.any()
        moved += len(seen)
        assert quantizers["stem.weight"].grad.all()
    assert 0 < moved < 20 * len(list(model.layers.children()))


# Sharing


def test_share_layers():
    """With chunks of two, each second layer is the first one again."""
    model = _net(5)
    plain = list(model.layers)
    assert diffq.share_layers(model.layers) is model.layers
    wanted = [plain[0], plain[0], plain[2], plain[2], plain[4]]
    assert [model.layers[i] for i in range(5)] == wanted


@pytest.mark.parametrize("kind", [diffq.DiffQuantizer, diffq.QATQuantizer])
def test_shared_layers_are_stored_once(kind, tmp_path):
    """A model with shared layers has half their size, and loads into one that shares them too."""
    model, other = Net(), Net()
    full = kind(Net(), min_size=0).true_model_size()
    for net in (model, other):
        diffq.share_layers(net.layers)
    quantizer = kind(model, min_size=0)
    layer = kind(Residual(), min_size=0).true_model_size()
    assert quantizer.true_model_size() == pytest.approx(full - 2 * layer)
    diffq.save(quantizer, tmp_path / "model.diffq")
    diffq.load(tmp_path / "model.diffq", other)
    assert other.layers[0] is other.layers[1]
    assert evaluate_alike(other, model, torch.randn(3, 8))


def test_different_layers_are_not_shared():
    """Layers with other shapes are refused, and nothing has changed."""
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 8))
    before = list(layers)
    with pytest.raises(ConfigError, match="layers 2 and 3 differ"):
        diffq.share_layers(layers)
    assert list(layers) == before


@pytest.mark.parametrize("chunk", [0, 1.5, True])
def test_wrong_chunk(chunk):
    """A chunk is a whole number of layers."""
    for call in (diffq.share_layers, diffq.every_other_layer):
        with pytest.raises(ConfigError, match="chunk must be a whole number"):
            call(nn.ModuleList(), chunk)


# Every other layer


@pytest.mark.parametrize(
    ("chunk", "kept"), [(1, [0, 2, 4, 6]), (2, [0, 1, 4, 5]), (3, [0, 1, 2, 6]), (8, [*range(7)])]
)
@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential, diffq.LayerDrop])
def test_every_other_layer(kind, chunk, kept):
    """The first of every two chunks is kept, in a list of the same kind, numbered from 0."""
    layers = _layers(kind, 7)
    plain = list(layers.children())
    result = diffq.every_other_layer(layers, chunk)
    assert type(result) is kind
    assert list(result.children()) == [plain[i] for i in kept]
    assert list(result._modules) == [str(i) for i in range(len(kept))]
    assert len(layers) == 7


def test_every_other_layer_of_layer_drop_keeps_the_rate():
    """What LayerDrop trained can be trained on after pruning."""
    assert diffq.every_other_layer(diffq.LayerDrop([Residual()], 0.3)).rate == 0.3


@pytest.mark.parametrize("chunk", [1, 2])
def test_learned_bits_survive_pruning(chunk):
    """The pruned model with the pruned state computes, in eval, with the weights of the whole."""
    model = _net(6, rate=0.5)
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    for weight in quantizers_in(model):
        weight.logits.uniform_(-2, 2)
    small = _net(6)
    small.layers = diffq.every_other_layer(small.layers, chunk)
    smaller = diffq.DiffQuantizer(small, min_size=0)
    small.load_state_dict(diffq.every_other_layer_state(model.state_dict(), "layers", chunk))
    kept = itertools.chain.from_iterable(
        range(start, min(start + chunk, 6)) for start in range(0, 6, 2 * chunk)
    )
    for new, old in enumerate(kept):
        weight = computed_weight(model.eval(), f"layers.{old}.inner.weight")
        assert same_bits(computed_weight(small.eval(), f"layers.{new}.inner.weight"), weight)
    assert smaller.true_model_size() < quantizer.true_model_size()


@pytest.mark.parametrize("kind", [diffq.QATQuantizer, diffq.LSQQuantizer, diffq.ProductQuantizer])
def test_other_quantizers_survive_pruning(kind):
    """What any quantizer learned and keeps of the layers that stay is loaded, also in a part."""
    model = nn.ModuleDict({"net": _net(4), "head": nn.Linear(8, 8)})
    options = {"block_size": 4, "codebook_size": 3} if kind is diffq.ProductQuantizer else {}
    kind(model["net"], min_size=0, **options).no_optimizer()
    small = nn.ModuleDict({"net": _net(4), "head": nn.Linear(8, 8)})
    small["net"].layers = diffq.every_other_layer(small["net"].layers)
    kind(small["net"], min_size=0, **options).no_optimizer()
    small.load_state_dict(diffq.every_other_layer_state(model.state_dict(), "net.layers"))
    for new, old in enumerate((0, 2)):
        weight = computed_weight(model.eval(), f"net.layers.{old}.inner.weight")
        assert same_bits(computed_weight(small.eval(), f"net.layers.{new}.inner.weight"), weight)
    wanted, got = (weight_quantizers(each["net"]) for each in (model, small))
    assert same_bits(got["layers.1.inner.weight"].kept(), wanted["layers.2.inner.weight"].kept())


def test_tied_layers_of_which_the_first_goes():
    """What was learned of shared layers is kept as long as one of them is."""
    model, small = _net(6), _net(6)
    for net in (model, small):
        diffq.share_layers(net.layers, 3)
    small.layers = diffq.every_other_layer(small.layers)
    for net in (model, small):
        diffq.DiffQuantizer(net, min_size=0).no_optimizer()
    for weight in quantizers_in(model):
        weight.logits.uniform_(-2, 2)
    small.load_state_dict(diffq.every_other_layer_state(model.state_dict(), "layers"))
    for new, old in enumerate((0, 2, 4)):
        weight = computed_weight(model.eval(), f"layers.{old}.inner.weight")
        assert same_bits(computed_weight(small.eval(), f"layers.{new}.inner.weight"), weight)


def test_state_of_the_layers_alone():
    """The state of a list by itself is pruned under the empty name."""
    layers = nn.ModuleList(Residual() for _ in range(4))
    state = diffq.every_other_layer_state(layers.state_dict(), "")
    diffq.every_other_layer(layers).load_state_dict(state)
    assert len(state) == 4


def test_state_without_such_layers():
    """A name under which no layers are numbered is refused."""
    with pytest.raises(ConfigError, match=r"layers named blocks\.0, blocks\.1"):
        diffq.every_other_layer_state(Net().state_dict(), "blocks")
