"""ONNX files that store integers in place of float weights, run by onnxruntime."""

import io
import math
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import zstandard
from torch import nn

import diffq
from tests.compare import close, same_bits
from tests.integrations.tiny import library
from tests.models import seeded

onnx = library("onnx")
library("onnxscript")
onnxruntime = library("onnxruntime")

from diffq.export import graph  # noqa: E402
from tests.integrations.onnx_models import (  # noqa: E402
    MODELS,
    Images,
    Language,
    case,
    decoded,
    exported,
    run,
    trained,
)

#: Another runtime sums in another order, and fuses operations.
OTHER_RUNTIME = 2**12

CASES = [
    *((name, "diffq") for name in MODELS),
    ("images", "qat-channel"),
    ("images", "lsq"),
    ("language", "product"),
    ("language", "qat"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_weights_bit_for_bit(name, kind):
    """onnxruntime decodes every quantized weight to the bits of the record, and evaluates alike."""
    model, quantizer, x, data = case(name, kind)
    found, wanted = decoded(data, quantizer, x)
    assert same_bits(found, wanted)
    aliases = quantizer.snapshot().aliases
    quantized = {plan.name for plan in quantizer.plan if plan.quantized}
    assert {aliases.get(name, name) for name in found} == quantized
    with torch.no_grad():
        assert close(run(data, x)[0], model(x), OTHER_RUNTIME)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_size(name, kind, tmp_path):
    """After zstd, the file takes at most 1.6 times what diffq's own takes."""
    _, quantizer, _, data = case(name, kind)
    ours = diffq.save(quantizer, tmp_path / "model.diffq")
    assert len(zstandard.ZstdCompressor(19).compress(data)) <= 1.6 * ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_half_precision(dtype):
    """Tensors that are stored as float16, or restored to another dtype, are decoded to its bits."""
    model = nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 30)).to(dtype).eval()
    quantizer = diffq.DiffQuantizer(model, min_size=0, exclude=["1.*"], float16=True)
    data = exported(quantizer, torch.randn(3, 50, dtype=dtype))
    constants = {c.name: c.data_type for c in onnx.load_from_string(data).graph.initializer}
    assert ("1.weight" in constants) == (dtype in (torch.float16, torch.bfloat16))
    if dtype != torch.bfloat16:  # onnxruntime multiplies no matrices of it.
        found, wanted = decoded(data, quantizer, torch.randn(3, 50, dtype=dtype))
        assert same_bits(found, wanted)


def test_ties_are_stored_once():
    """A tied weight is stored once, whichever of its names the graph reads."""
    _, quantizer, _, data = case("language")
    sizes = Counter()
    for constant in onnx.load_from_string(data).graph.initializer:
        if ".levels" in constant.name:
            sizes[constant.name.rpartition(".")[0]] += math.prod(constant.dims)
    records = quantizer.snapshot().records.values()
    assert sorted(sizes.values()) == sorted(r.numel for r in records if r.coded is not None)


def test_runtime_folds(tmp_path):
    """onnxruntime decodes when it loads the file: no node of the decoding is left to run."""
    _, _, _, data = case("language")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(data, options)
    left = {node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node}
    assert left.isdisjoint({"Cast", "TopK", "ScatterND"})


def test_dynamic_shapes():
    """Axes that are said to be dynamic take other sizes."""
    model, quantizer, x = trained("images")
    batch = torch.export.Dim("batch", min=1, max=64)
    names = {"input_names": ["image"], "output_names": ["classes"]}
    data = exported(quantizer, x, dynamic_shapes=({0: batch},), **names)
    more = torch.randn(5, 3, 16, 16)
    session = onnxruntime.InferenceSession(data)
    assert [value.name for value in session.get_outputs()] == ["classes"]
    (found,) = session.run(["classes"], {"image": more.numpy()})
    with torch.no_grad():
        assert close(torch.from_numpy(found), model(more), OTHER_RUNTIME)


def test_keyword_arguments():
    """Arguments by keyword are passed to the model."""
    _, quantizer, x, data = case("gru")
    file = io.BytesIO()
    diffq.export.onnx(quantizer, file, (), {"words": x})
    assert close(run(file.getvalue(), x), run(data, x), OTHER_RUNTIME)


def test_stored_models(tmp_path):
    """A path, an open file, a stored model and a state give the file that the quantizer gives."""
    _, quantizer, x = trained("images")
    path, wanted = tmp_path / "model.diffq", tmp_path / "quantizer.onnx"
    diffq.save(quantizer, path)
    diffq.export.onnx(quantizer, wanted, (x,))
    plain = Images().eval()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with diffq.open(path) as stored:
        sources = [path, io.BytesIO(path.read_bytes()), stored, quantizer.get_quantized_state()]
        for source in sources:
            diffq.export.onnx(source, tmp_path / "stored.onnx", (x,), model=plain)
            assert (tmp_path / "stored.onnx").read_bytes() == wanted.read_bytes()
    assert same_bits(dict(plain.state_dict()), before)


def test_model_stays_as_it_was():
    """An export leaves the attached model as it was: it evaluates and trains."""
    model, quantizer, x = trained("images")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported(quantizer, x)
    assert diffq.quantizer_of(model) is quantizer
    assert same_bits(dict(model.state_dict()), before)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_activations_and_pruning():
    """Activations in 8 bits are computed, and pruned weights decode to zero."""
    model = seeded(Images)
    nn.utils.prune.l1_unstructured(model.body, "weight", amount=0.5)
    diffq.parametrize_pruning(model)
    activations, x = diffq.ActivationQuantizer(model.eval()), torch.randn(2, 3, 16, 16)
    with activations.calibrate():
        model(x)
    quantizer = diffq.QATQuantizer(model, min_size=0.001)
    data = exported(quantizer, x)
    found, wanted = decoded(data, quantizer, x)
    assert same_bits(found, wanted)
    assert (found["body.weight"] == 0).float().mean() >= 0.5
    with torch.no_grad():
        assert close(run(data, x)[0], model(x), OTHER_RUNTIME)


def test_page(tmp_path, monkeypatch):
    """The code of docs/export.md runs as written, but for that of ExecuTorch."""
    monkeypatch.chdir(tmp_path)
    model, quantizer, x = trained("images")
    diffq.save(quantizer, "model.diffq")
    names = {"model": model, "quantizer": quantizer, "x": x, "Model": Images, "torch": torch}
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for block in (block for block in blocks if "executorch" not in block):
        exec(block, names)
    assert close(torch.from_numpy(names["output"]), names["plain_model"](x), OTHER_RUNTIME)


def test_nothing_of_the_source():
    """The file holds neither lines nor paths of the user's code, which torch notes."""
    _, _, _, data = case("images")
    assert os.path.dirname(__file__).encode() not in data


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    """Where the export fails, the old file is intact and no other is left."""
    _, quantizer, x = trained("images")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(graph, "MAX_BYTES", 1000)
    with pytest.raises(diffq.ConfigError, match="An ONNX file has at most 1000 bytes, got"):
        diffq.export.onnx(quantizer, path, (x,))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    assert diffq.export.onnx(quantizer, path, (x,)) == path.stat().st_size > 1000


def test_inputs_that_do_not_run():
    """Inputs that the model does not take are an error with the model's own."""
    _, quantizer, x = trained("images")
    with pytest.raises(diffq.ConfigError, match=r"must run on the inputs.*: .*channels"):
        diffq.export.onnx(quantizer, io.BytesIO(), (x[:, :2],))


def test_what_torch_cannot_export():
    """A model that runs, but that torch cannot export, is torch's error."""

    class Eigen(nn.Linear):
        def forward(self, x):
            return torch.linalg.eigvals(super().forward(x))

    quantizer = diffq.QATQuantizer(Eigen(8, 8).eval(), min_size=0)
    with pytest.raises(torch.onnx.OnnxExporterError):
        diffq.export.onnx(quantizer, io.BytesIO(), (torch.randn(8, 8),))


def test_graphs_that_onnx_refuses():
    """A graph that torch exports wrongly is an error, and not a file that does not load."""
    model = nn.LSTM(24, 40, 2, bidirectional=True, proj_size=12).eval()
    quantizer = diffq.QATQuantizer(model, min_size=0)
    with pytest.raises(diffq.ConfigError, match="ONNX refuses this one"):
        diffq.export.onnx(quantizer, io.BytesIO(), (torch.randn(3, 2, 24),))


def test_another_model():
    """A file that does not fit the model is an error that names the tensors."""
    model, quantizer, x, _ = case("images")
    state = quantizer.get_quantized_state()
    with pytest.raises(diffq.MismatchError, match=r"not in the model: body\.bias"):
        diffq.export.onnx(state, io.BytesIO(), (x,), model=Language().eval())
    with pytest.raises(diffq.MismatchError, match="this one has a quantizer"):
        diffq.export.onnx(state, io.BytesIO(), (x,), model=model)


def test_arguments():
    """Training mode, a detached quantizer, and a model too many or too few are errors."""
    model, quantizer, x = trained("images")
    refuse = [
        ((quantizer, x), {}, "inputs must be a tuple"),
        ((quantizer, (x,)), {"model": Images()}, "A quantizer has its model"),
        ((quantizer.get_quantized_state(), (x,)), {}, "Pass a plain model"),
    ]
    for (source, inputs), options, message in refuse:
        with pytest.raises(diffq.ConfigError, match=message):
            diffq.export.onnx(source, io.BytesIO(), inputs, **options)
    model.norm.train()
    with pytest.raises(diffq.ConfigError, match="'norm' is in training mode"):
        diffq.export.onnx(quantizer, io.BytesIO(), (x,))
    state = quantizer.get_quantized_state()
    with pytest.raises(diffq.ConfigError, match="'the model' is in training mode"):
        diffq.export.onnx(state, io.BytesIO(), (x,), model=Images())
    quantizer.detach()
    with pytest.raises(diffq.AttachError, match="was detached"):
        diffq.export.onnx(quantizer, io.BytesIO(), (x,))
