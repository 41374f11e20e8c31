"""Random models: strategies that hypothesis draws, and shrinks where a claim fails.

An `Architecture` is plain data. It prints as the call that makes it, and builds the same model
as often as it is asked to.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from tests.layers import NORMS, Layer

BATCH = 3
VOCABULARY = 11

#: Layers after which something else flows. "features" are [batch, width], a "sequence" is
#: [batch, time, width], and an "image2" is [batch, channels, height, width].
TURNS = {
    ("pool", "sequence"): "features",
    ("transposed", "sequence"): "image1",
    ("transposed", "image1"): "sequence",
}


class Network(nn.Module):
    """The model of an architecture."""

    def __init__(self, architecture, plain):
        super().__init__()
        if architecture.embedding:
            self.embed = nn.Embedding(VOCABULARY, architecture.embedding)
        self.layers = nn.ModuleList(layer.make(plain) for layer in architecture.layers)
        self.tie = architecture.tie
        if self.tie == "module":
            self.head = nn.Linear(architecture.embedding, VOCABULARY, bias=False)
            self.head.weight = self.embed.weight

    def forward(self, x):
        if hasattr(self, "embed"):
            x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        if self.tie == "module":
            return self.head(x)
        return F.linear(x, self.embed.weight) if self.tie == "read" else x


@dataclass(frozen=True)
class Architecture:
    """A model as data.

    Attributes:
        shape: of one input, without the batch.
        embedding: width of an embedding of the inputs, which are tokens then; 0 for none.
        layers: from the input to the output.
        tie: a head that shares the embedding's weight: "module", "read" by F.linear, or none.
        frozen: the places of parameters that are not trained, modulo their number.
    """

    shape: tuple
    embedding: int
    layers: tuple
    tie: str | None
    frozen: tuple = ()

    def build(self, dtype=torch.float32, plain=False, seed=0):
        """The model; the same for the same seed."""
        torch.manual_seed(seed)
        model = Network(self, plain).to(dtype)
        parameters = list(model.parameters())
        for place in self.frozen if parameters else ():
            parameters[place % len(parameters)].requires_grad_(False)
        return model

    def inputs(self, dtype=torch.float32):
        """A batch of inputs; the same each time."""
        torch.manual_seed(1)
        if self.embedding:
            return torch.randint(VOCABULARY, (BATCH, *self.shape))
        return torch.randn(BATCH, *self.shape).to(dtype)


SMALL = st.integers(1, 6)
LENGTH = st.integers(1, 5)
WIDTH = st.integers(1, 8)
FLAG = st.booleans()

#: A parametrization that is there before the quantizer, now and then.
NORMED = st.sampled_from([None, None, *NORMS])

# Each function below draws one layer for what flows into it, of this shape.


def _activation(draw, shape):
    return Layer(draw(st.sampled_from(["ReLU", "GELU", "Tanh", "PReLU", "Dropout"])), {})


def _scale(draw, shape):
    return Layer("scale", {"numel": draw(SMALL)})


def _unused(draw, shape):
    return Layer("unused", {"width": draw(SMALL)})


def _linear(draw, shape, out=None):
    options = {"in_features": shape[-1], "out_features": out or draw(SMALL), "bias": draw(FLAG)}
    return Layer("Linear", options, draw(NORMED))


def _repeated_linear(draw, shape):
    return _repeated(draw, _linear(draw, shape, shape[-1]))


def _repeated(draw, layer):
    """A layer that keeps the shape, used twice or tied to another one."""
    if draw(FLAG):
        return Layer("twice", {"module": layer, "names": draw(st.sampled_from([1, 2]))})
    return Layer("tied", {"module": Layer(layer.kind, layer.options)})


def _checkpointed(draw, shape):
    options = {"module": _linear(draw, shape), "use_reentrant": draw(FLAG)}
    return Layer("checkpointed", options)


def _norm(draw, shape):
    options = {"normalized_shape": shape[-1], "elementwise_affine": draw(FLAG)}
    return Layer(draw(st.sampled_from(["LayerNorm", "RMSNorm"])), options)


def _batch_norm(draw, shape):
    dims = max(len(shape) - 1, 1)
    options = {"affine": draw(FLAG), "track_running_stats": draw(FLAG)}
    return Layer(f"BatchNorm{dims}d", {"num_features": shape[0], **options})


def _recurrent_layer(draw, shape):
    cell = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    size, bias, both = draw(st.integers(2, 5)), draw(FLAG), draw(FLAG)
    options = {"cell": cell, "input_size": shape[-1], "hidden_size": size, "bias": bias}
    options |= {"num_layers": draw(st.integers(1, 2)), "bidirectional": both}
    if cell == "LSTM" and draw(FLAG):
        options["proj_size"] = draw(st.integers(1, size - 1))
    return Layer("recurrent", options)


def _heads(draw, width):
    return draw(st.sampled_from([n for n in range(1, width + 1) if width % n == 0]))


def _attention(draw, shape):
    options = {"width": shape[-1], "heads": _heads(draw, shape[-1])}
    return Layer("attention", {**options, "bias": draw(FLAG), "need_weights": draw(FLAG)})


def _encoder_layer(draw, shape):
    options = {"width": shape[-1], "heads": _heads(draw, shape[-1])}
    return Layer("encoder", {**options, "norm_first": draw(FLAG)})


def _pool(draw, shape):
    return Layer("pool", {})


def _transposed(draw, shape):
    return Layer("transposed", {})


def _flatten(draw, shape):
    return Layer("Flatten", {})


def _convolution(draw, shape):
    channels, *space = shape
    kernel = draw(st.integers(1, min(3, *space)))
    options = {"in_channels": channels, "out_channels": draw(SMALL), "kernel_size": kernel}
    options |= {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 1))}
    return Layer(f"Conv{len(space)}d", {**options, "bias": draw(FLAG)}, draw(NORMED))


def _grouped_convolution(draw, shape):
    channels, *space = shape
    options = {"in_channels": channels, "out_channels": channels, "kernel_size": 1}
    return Layer(f"Conv{len(space)}d", {**options, "groups": _heads(draw, channels)})


def _repeated_convolution(draw, shape):
    channels, *space = shape
    options = {"in_channels": channels, "out_channels": channels, "kernel_size": 3, "padding": 1}
    return _repeated(draw, Layer(f"Conv{len(space)}d", options))


def _transposed_convolution(draw, shape):
    channels, *space = shape
    if max(space) > 5:
        return _flatten(draw, shape)
    options = {"in_channels": channels, "out_channels": draw(SMALL), "bias": draw(FLAG)}
    options |= {"kernel_size": draw(st.integers(2, 3)), "stride": draw(st.integers(1, 2))}
    return Layer(f"ConvTranspose{len(space)}d", options, draw(NORMED))


def _group_norm(draw, shape):
    return Layer("GroupNorm", {"num_groups": _heads(draw, shape[0]), "num_channels": shape[0]})


ANYWHERE = [_activation, _scale, _unused]
WIDE = [_linear, _repeated_linear, _checkpointed, _norm]
IMAGE = [
    _convolution,
    _grouped_convolution,
    _repeated_convolution,
    _transposed_convolution,
    _batch_norm,
    _group_norm,
    _flatten,
]
LAYERS = {
    "features": [*WIDE, _batch_norm, *ANYWHERE],
    "sequence": [
        *(_recurrent_layer, _attention, _encoder_layer, _transposed, _pool),
        *WIDE,
        *ANYWHERE,
    ],
    "image1": [*IMAGE, _transposed, *ANYWHERE],
    "image2": [*IMAGE, *ANYWHERE],
    "image3": [*IMAGE, *ANYWHERE],
}


def _flow_after(layer, flow):
    return "features" if layer.kind == "Flatten" else TURNS.get((layer.kind, flow), flow)


def _shape_after(layer, shape):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return tuple(layer.make(plain=True)(torch.zeros(BATCH, *shape)).shape[1:])


def _start(draw):
    """What flows in first, and its shape."""
    flow = draw(st.sampled_from(list(LAYERS)))
    if flow == "features":
        return flow, (draw(WIDTH),)
    if flow == "sequence":
        return flow, (draw(LENGTH), draw(WIDTH))
    return flow, (draw(SMALL), *(draw(LENGTH) for _ in range(int(flow[-1]))))


@st.composite
def architectures(draw):
    """Models of one to six layers of every kind above, with an embedding before or a tied head."""
    flow, flowing = _start(draw)
    shape, embedding, tie = flowing, 0, None
    if flow == "sequence" and draw(FLAG):
        shape, embedding = flowing[:1], flowing[-1]
        tie = draw(st.sampled_from([None, "module", "read"]))
    layers = []
    for _ in range(draw(st.integers(1, 6))):
        layer = draw(st.sampled_from(LAYERS[flow]))(draw, flowing)
        layers.append(layer)
        flow, flowing = _flow_after(layer, flow), _shape_after(layer, flowing)
    if tie:
        layers.append(_linear(draw, flowing, embedding))
    frozen = draw(st.lists(st.integers(0, 30), max_size=2))
    return Architecture(shape, embedding, tuple(layers), tie, tuple(frozen))
