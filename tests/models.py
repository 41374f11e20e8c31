"""Small models that several tests share, and what they do with them."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffq
from diffq.attach.attachment import attachment_of
from diffq.attach.classes import cover_of
from tests.compare import close, same_bits

#: Every public quantizer, with all tensors selected.
QUANTIZERS = {
    "diffq": partial(diffq.DiffQuantizer, min_size=0, group_size=4),
    "diffq-uniform": partial(diffq.DiffQuantizer, min_size=0, group_size=4, noise="uniform"),
    "diffq-rounding": partial(diffq.DiffQuantizer, min_size=0, group_size=4, noise="rounding"),
    "diffq-fixed": partial(diffq.DiffQuantizer, min_size=0, bits=5),
    "qat": partial(diffq.QATQuantizer, min_size=0, bits=4),
    "qat-channel": partial(diffq.QATQuantizer, min_size=0, bits=4, per_channel=True),
    "quant-noise": partial(diffq.QuantNoiseQuantizer, min_size=0, bits=4, p=0.5, block_size=4),
    "quant-noise-fit": partial(
        diffq.QuantNoiseQuantizer, min_size=0, bits=3, p=0.5, observer="histogram"
    ),
    "lsq": partial(diffq.LSQQuantizer, min_size=0, bits=4),
    "entropy": partial(diffq.EntropyQuantizer, min_size=0),
    "product": partial(diffq.ProductQuantizer, min_size=0, block_size=2, codebook_size=4),
}


def mlp():
    """16 features to 8."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


class TiedHead(nn.Module):
    """A language model whose head reads the embedding's weight outside of its forward."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.body = nn.Linear(16, 16)

    def forward(self, tokens):
        return F.linear(torch.tanh(self.body(self.embed(tokens))), self.embed.weight)


class TiedModules(nn.Module):
    """An embedding and a head that are two modules with one parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embed(tokens))))


class SharedModule(nn.Module):
    """One module under two names, used twice in a forward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class TwoNames(nn.Module):
    """One parameter under two names in one module."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.randn(16, 16) / 4)
        self.two = self.one

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.one)), self.two)


class ConvNet(nn.Module):
    """Convolutions up and down with BatchNorm, on 3 x 8 x 8 images."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.up(torch.relu(self.norm(self.down(x)))).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent layer between an embedding and a linear head."""

    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.embed = nn.Embedding(24, 12)
        self.rnn = kind(12, 10, batch_first=True, **options)
        size = options.get("proj_size") or 10
        self.head = nn.Linear(size * (2 if options.get("bidirectional") else 1), 24)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


def encoder(norm_first=False):
    """Two layers of a transformer encoder, width 16."""
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def tokens(batch=3, length=7):
    """Tokens for the models with an embedding."""
    return torch.randint(24, (batch, length))


#: Name to a function that makes the model, and one that makes its input.
MODELS = {
    "mlp": (mlp, lambda: torch.randn(5, 16)),
    "tied-head": (TiedHead, tokens),
    "tied-modules": (TiedModules, tokens),
    "shared-module": (SharedModule, lambda: torch.randn(5, 16)),
    "two-names": (TwoNames, lambda: torch.randn(5, 16)),
    "conv": (ConvNet, lambda: torch.randn(4, 3, 8, 8)),
    "lstm": (Recurrent, tokens),
    "lstm-deep": (partial(Recurrent, num_layers=2, bidirectional=True, proj_size=6), tokens),
    "gru": (partial(Recurrent, nn.GRU, bidirectional=True), tokens),
    "rnn": (partial(Recurrent, nn.RNN), tokens),
    "encoder": (encoder, lambda: torch.randn(3, 7, 16)),
    "encoder-norm-first": (partial(encoder, True), lambda: torch.randn(3, 7, 16)),
}


def pairs(ones, others):
    """Each of the first with two of the second, which all come up if they are not many more.

    Where a fault is in one or in the other, a test of each with each finds no more, and takes long.
    """
    others, half = list(others), len(others) // 2
    return [(one, others[(i + k) % len(others)]) for i, one in enumerate(ones) for k in (0, half)]


def seeded(make, seed=0):
    """What `make` makes with a fixed seed."""
    torch.manual_seed(seed)
    return make()


def step(model, optimizer, inputs, quantizer=None, lam=0.1):
    """One training step on a loss that uses every output; returns the loss."""
    optimizer.zero_grad()
    loss = model(inputs).square().mean()
    if quantizer is not None:
        loss = loss + lam * quantizer.model_size()
    loss.backward()
    optimizer.step()
    return loss.detach()


def learned(model):
    """Name and parameter of all that training moves from the start: codebooks wait for a stage."""
    product = isinstance(diffq.quantizer_of(model), diffq.ProductQuantizer)
    names = [(n, p) for n, p in model.named_parameters() if not product or n != "_diffq.learned"]
    return names


#: How close gradients are, in units of the last place: what is learned gets sums that cancel out,
#: while another sample of noise moves them by some thousandths and more.
SUMS = 2**12


def gradients(model):
    """Name to a copy of the gradient, of all parameters."""
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def snapshot_of(model):
    """A copy of the state dict."""
    return copy.deepcopy(dict(model.state_dict()))


def computed(model):
    """Name to a copy of each tensor that the modules of a model compute with in their mode."""
    found = {}
    with computing(model):
        for path, module in model.named_modules(remove_duplicate=False):
            if "parametrizations" in path.split("."):
                continue
            names = [
                *module._parameters.keys(),  # TorchScript's mappings are no iterables
                *module._buffers.keys(),
                *getattr(module, "parametrizations", []),
            ]
            found |= {f"{path}.{name}".strip("."): getattr(module, name) for name in names}
    found.pop("_diffq.learned", None)
    return {n: None if found[n] is None else found[n].detach().clone() for n in sorted(found)}


def computing(model):
    """A block in which a model, or a part of one, reads its tensors as in its forward."""
    cover, attachment = cover_of(model), attachment_of(model)
    if cover is not None:
        return cover.forwards.entered(cover.below)
    return nullcontext() if attachment is None else attachment.computing()


def computed_weight(model, name):
    """The tensor of this name that the model computes with in its mode, in the graph."""
    owner, _, attribute = name.rpartition(".")
    with computing(model):
        return getattr(model.get_submodule(owner), attribute)


def evaluate_alike(one, other, *inputs, **options):
    """Whether two models evaluate with the same weights, bit for bit, and so to close outputs."""
    with torch.no_grad():
        outputs = [model.eval()(*inputs, **options) for model in (one, other)]
        return same_bits(computed(one), computed(other)) and close(*outputs)


def restored(make, quantizer):
    """A fresh model in eval mode with the values of the quantizer's state."""
    fresh = diffq.restore_quantized_state(make(), quantizer.get_quantized_state())
    return fresh.eval()


class First(nn.Module):
    """The output of a recurrent layer without its state."""

    def forward(self, pair):
        return pair[0]


def attached(make, kind="diffq", **options):
    """A seeded model and its quantizer, which may train without an optimizer."""
    model = seeded(make)
    quantizer = QUANTIZERS[kind](model, **options)
    quantizer.no_optimizer()
    return model, quantizer


def nothing_held(model):
    """Whether no forward runs, and reading gives the Parameters."""
    attachment = attachment_of(model)
    return attachment is not None and attachment.forwards.current() is None


def fingerprint(model):
    """All that a quantizer could leave behind: classes, attributes, hooks, parameters."""
    return [
        (
            path,
            type(module),
            sorted(module.__dict__),
            [(name, id(p)) for name, p in module._parameters.items()],
            [(name, id(b)) for name, b in module._buffers.items()],
            list(module._modules),
            {key: len(value) for key, value in module.__dict__.items() if "hooks" in key},
            [id(weight) for weight in getattr(module, "_flat_weights", ())],
        )
        for path, module in model.named_modules(remove_duplicate=False)
    ]


def after_steps(name="mlp", quantizer="diffq", steps=2, **options):
    """A model after some steps, its quantizer and an input."""
    make, make_input = MODELS[name]
    model = seeded(make)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer = QUANTIZERS[quantizer](model, **options)
    quantizer.setup_optimizer(optimizer, lr=0.2)
    inputs = make_input()
    for _ in range(steps):
        step(model, optimizer, inputs, quantizer)
    return model, quantizer, inputs


def _hooks(model):
    return {
        (path, key): len(value)
        for path, module in model.named_modules()
        for key, value in module.__dict__.items()
        if "hooks" in key
    }


def state_of(model):
    """What an operation that failed must have left as it was."""
    return (
        [(path, type(module)) for path, module in model.named_modules()],
        {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        _hooks(model),
    )


def refused(model, error, make, *words):
    """Checks that `make(model)` raises `error` with all words, and changes nothing."""
    before, values = state_of(model), snapshot_of(model)
    with pytest.raises(error) as caught:
        make(model)
    assert isinstance(caught.value, diffq.DiffqError)
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert message.endswith((".", ")", "'")) or "\n" in message
    assert state_of(model) == before
    assert same_bits(snapshot_of(model), values) or any(
        not value.isfinite().all() for value in values.values()
    )
    return message
