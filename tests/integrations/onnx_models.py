"""Models for the tests of ONNX files with integers, and what onnxruntime decodes of such files."""

import io
from functools import cache, partial

import onnx
import onnxruntime
import torch
from torch import nn

import diffq
from diffq.storage.state import record_tensor
from tests.models import QUANTIZERS, seeded, tokens


class Images(nn.Module):
    """Residual convolutions with BatchNorm, on 3 x 16 x 16 images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.body = nn.Conv2d(32, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 96, 3, stride=2, padding=1)
        self.head = nn.Linear(96, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.body(x))
        return self.head(torch.relu(self.down(x)).mean((2, 3)))


class Sequence(nn.Module):
    """A recurrent layer over embeddings."""

    def __init__(self, kind, width=80):
        super().__init__()
        self.embed = nn.Embedding(24, width)
        self.rnn = kind(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 24)

    def forward(self, words):
        return self.head(self.rnn(self.embed(words))[0])


class Language(nn.Module):
    """A transformer whose head is tied to its embedding."""

    def __init__(self, words=256, width=64):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        return self.head(self.body(self.embed(words)))


#: Name to a function that makes a model, and one that makes its input.
MODELS = {
    "images": (Images, partial(torch.randn, 2, 3, 16, 16)),
    "gru": (partial(Sequence, nn.GRU), tokens),
    "lstm": (partial(Sequence, nn.LSTM), tokens),
    "language": (Language, tokens),
}


def trained(name, kind="diffq", **options):
    """An attached model in eval mode with bits from 2 to 9, its quantizer, and an input."""
    make, make_input = MODELS[name]
    model = seeded(make)
    quantizer = QUANTIZERS[kind](model, **{"min_size": 0.001, **options})
    quantizer.no_optimizer()
    with torch.no_grad():
        for parameter in quantizer.learned_parameters():
            if kind == "diffq":
                parameter.copy_(torch.randn(parameter.shape) - 1.5)
    return model.eval(), quantizer, make_input()


def exported(source, *inputs, **options):
    """The ONNX file of a quantizer, or of a stored model."""
    file = io.BytesIO()
    diffq.export.onnx(source, file, inputs, **options)
    return file.getvalue()


@cache
def case(name, kind="diffq"):
    """A trained model, its quantizer, an input and its ONNX file, for tests that change none."""
    model, quantizer, x = trained(name, kind)
    return model, quantizer, x, exported(quantizer, x)


def run(data, *inputs):
    """The outputs of a file in onnxruntime, as tensors."""
    session = onnxruntime.InferenceSession(data)
    given = [value.name for value in session.get_inputs()]
    fed = dict(zip(given, (x.numpy() for x in inputs), strict=True))
    return [torch.from_numpy(value) for value in session.run(None, fed)]


def records_of(data, quantizer):
    """Name to tensor of the weights that a file decodes, as the quantizer's records do."""
    snapshot = quantizer.snapshot()
    records = dict(snapshot.records)
    records |= {name: records[other] for name, other in snapshot.aliases.items()}
    values = [name for node in onnx.load_from_string(data).graph.node for name in node.output]
    return {name: record_tensor(records[name]) for name in values if name in records}


def showing(data, names):
    """A file with more outputs: its values of these names."""
    model = onnx.load_from_string(data)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    return model.SerializeToString()


def decoded(data, quantizer, *inputs):
    """Name to tensor of the weights that a file decodes in onnxruntime, and of the records'."""
    wanted = records_of(data, quantizer)
    found = run(showing(data, wanted), *inputs)[-len(wanted) :]
    return dict(zip(wanted, found, strict=True)), wanted
