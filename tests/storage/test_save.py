"""Models to files and back: bit for bit, and the same bytes each time."""

import inspect
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import diffq
from diffq.cli.convert import convert
from diffq.format import threads
from diffq.format.container import encode, encode_parts
from diffq.ptq.budget import quantize_to_size
from tests.holder import all_bits, blank, reloaded, weight_quantizers
from tests.models import (
    MODELS,
    QUANTIZERS,
    ConvNet,
    TiedModules,
    evaluate_alike,
    mlp,
    pairs,
    seeded,
)

CODECS = ["zstd", "rans", "packed"]
PAIRS = pytest.mark.parametrize(("model", "method"), pairs(MODELS, QUANTIZERS))
ROOT = Path(__file__).parents[2]


def _attached(make, method="diffq"):
    """A model that has seen data in training, with many bitwidths, and its quantizer."""
    model = seeded(make)
    quantizer = QUANTIZERS[method](model)
    quantizer.no_optimizer()
    for weight_quantizer in weight_quantizers(model).values():
        if hasattr(weight_quantizer, "logits"):
            nn.init.normal_(weight_quantizer.logits, std=2)
    return model, quantizer


def _qat(model, **options):
    return diffq.QATQuantizer(model, min_size=0, **options)


def _saved(model, path, **options):
    """The file of a model that is quantized with QAT."""
    diffq.save(_qat(model, **options), path)
    return path


# --- There and back ---


@PAIRS
def test_loaded_models_compute_the_same(model, method, tmp_path):
    """A plain model that a file was loaded into computes with the weights of eval."""
    make, inputs = MODELS[model]
    attached, quantizer = _attached(make, method)
    x = seeded(inputs)
    attached(x)
    diffq.save(quantizer, tmp_path / "m.diffq")
    fresh = blank(make())
    assert diffq.load(tmp_path / "m.diffq", fresh) is fresh
    assert evaluate_alike(fresh, attached, x)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", QUANTIZERS)
def test_codecs_load_the_same(method, codec, tmp_path):
    """With either codec, the file holds the values of the quantized state."""
    _, quantizer = _attached(ConvNet, method)
    diffq.save(quantizer, tmp_path / "m.diffq", codec)
    restored = diffq.restore_quantized_state(ConvNet(), quantizer.get_quantized_state())
    assert all_bits(diffq.load(tmp_path / "m.diffq", ConvNet())) == all_bits(restored)


def test_packed_is_packed(tmp_path):
    """ "rans", the default, makes the smallest file of levels that repeat, then "zstd"."""
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.normal_().pow_(3)
    quantizer = _qat(layer, bits=5)
    sizes = {codec: diffq.save(quantizer, tmp_path / codec, codec) for codec in CODECS}
    assert sizes["rans"] < sizes["zstd"] < sizes["packed"]
    diffq.save(quantizer, tmp_path / "default")
    assert (tmp_path / "default").read_bytes() == (tmp_path / "rans").read_bytes()
    versions = {codec: (tmp_path / codec).read_bytes()[8:10] for codec in CODECS}
    assert versions == {"rans": b"\x01\x01", "zstd": b"\x01\x00", "packed": b"\x01\x00"}


@pytest.mark.parametrize(
    "function",
    [
        *(encode, encode_parts, diffq.save, diffq.QATQuantizer.compressed_model_size),
        *(quantize_to_size, convert),
    ],
)
def test_one_default(function):
    """All that writes or measures a file takes the same codec by default."""
    assert inspect.signature(function).parameters["codec"].default == "rans"


def test_load_keeps_the_parameters(tmp_path):
    """Parameters stay the same objects with their flags; the mode of the model stays too."""
    model = mlp().train()
    model[0].weight.requires_grad_(False)
    before = dict(model.named_parameters())
    diffq.load(_saved(mlp(), tmp_path / "m.diffq"), model)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert [p.requires_grad for p in before.values()] == [False, True, True, True]
    assert model.training


@pytest.mark.parametrize("model", MODELS)
def test_load_without_a_model(model, tmp_path):
    """Without a model, a dict comes back that load_state_dict takes, with the same values."""
    make = MODELS[model][0]
    path = _saved(make(), tmp_path / "m.diffq")
    state = diffq.load(path)
    fresh = make()
    fresh.load_state_dict(state)
    assert all_bits(fresh) == all_bits(diffq.load(path, make()))


def test_ties_share_a_tensor(tmp_path):
    """In the dict, tied names share one tensor object; other names do not."""
    state = diffq.load(_saved(TiedModules(), tmp_path / "m.diffq"))
    assert state["head.weight"] is state["embed.weight"]
    assert len({id(tensor) for tensor in state.values()}) == len(state) - 1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("method", QUANTIZERS)
def test_save_of_a_state(method, packed, tmp_path):
    """A quantized state, fresh or from torch.load, is saved to the bytes of its quantizer."""
    _, quantizer = _attached(TiedModules, method)
    size = diffq.save(quantizer, tmp_path / "quantizer", metadata={"a": 1})
    state = quantizer.get_quantized_state(packed)
    for name, source in {"fresh": state, "loaded": reloaded(state)}.items():
        assert diffq.save(source, tmp_path / name, metadata={"a": 1}) == size
        assert (tmp_path / name).read_bytes() == (tmp_path / "quantizer").read_bytes()


@pytest.mark.parametrize("make", [dict, mlp, lambda: mlp().state_dict(), lambda: "model", list])
def test_save_of_something_else(make, tmp_path):
    """What is neither a quantizer nor a quantized state is refused, and no file is made."""
    with pytest.raises((diffq.ConfigError, diffq.StateError), match="get_quantized_state"):
        diffq.save(make(), tmp_path / "m.diffq")
    assert list(tmp_path.iterdir()) == []


def test_unknown_codec(tmp_path):
    """A codec that does not exist is refused, and the old file stays."""
    path = _saved(mlp(), tmp_path / "m.diffq")
    before = path.read_bytes()
    with pytest.raises(diffq.ConfigError, match="lz4"):
        diffq.save(_qat(mlp()), path, codec="lz4")
    assert path.read_bytes() == before


# --- Sizes and bytes ---


@PAIRS
def test_sizes_of_files(model, method, tmp_path):
    """The file has exactly the bytes foretold, and 1 kB more than true_model_size at most."""
    _, quantizer = _attached(MODELS[model][0], method)
    for codec in CODECS:
        size = diffq.save(quantizer, tmp_path / codec, codec)
        assert os.path.getsize(tmp_path / codec) == size
        assert quantizer.compressed_model_size(codec) * 2**20 == size
        assert size <= quantizer.true_model_size() * 2**20 + 1000
    assert quantizer.compressed_model_size() == quantizer.compressed_model_size("rans")


_OTHER_PROCESS = """
import sys, torch, diffq
state = torch.load(sys.argv[1], weights_only=True)
for codec in ("zstd", "rans", "packed"):
    diffq.save(state, sys.argv[2] + codec, codec, {"b": [1, 2], "a": {"z": 1, "y": 2}})
"""


def test_the_same_bytes_each_time(tmp_path, monkeypatch):
    """One state gives the same bytes with 1 and 7 threads, and under another hash seed."""
    metadata = {"a": {"y": 2, "z": 1}, "b": [1, 2]}
    _, quantizer = _attached(ConvNet)
    torch.save(quantizer.get_quantized_state(), tmp_path / "state")
    expected = {}
    for codec in CODECS:
        for count in (1, 7):
            monkeypatch.setattr(threads, "_cores", lambda count=count: count)
            diffq.save(quantizer, tmp_path / codec, codec, metadata)
            data = (tmp_path / codec).read_bytes()
            assert expected.setdefault(codec, data) == data
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", _OTHER_PROCESS, tmp_path / "state", tmp_path / "other-"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120)
    for codec in CODECS:
        assert (tmp_path / f"other-{codec}").read_bytes() == expected[codec]


# --- Metadata ---


def test_metadata_comes_back(tmp_path):
    """A JSON object comes back equal, types included, and does not touch the tensors."""
    metadata = {"s": "é\n\u2028🙂", "i": 2**80, "f": 0.1, "n": None, "l": [True, {"": []}], "o": {}}
    model = mlp()
    quantizer = _qat(model)
    plain = diffq.save(quantizer, tmp_path / "plain")
    assert diffq.save(quantizer, tmp_path / "m.diffq", metadata=metadata) > plain
    with diffq.open(tmp_path / "m.diffq") as stored, diffq.open(tmp_path / "plain") as other:
        assert stored.metadata == metadata
        assert type(stored.metadata["i"]) is int
        assert other.metadata == {}
    one, other = (diffq.load(tmp_path / name, mlp()) for name in ("plain", "m.diffq"))
    assert all_bits(one) == all_bits(other)


@pytest.mark.parametrize(
    "metadata",
    [
        [1], "text", 5, {"a": float("nan")}, {"a": -float("inf")}, {"a": b"x"}, {"a": {1, 2}},
        {"a": torch.zeros(1)}, {"a": "x" * (1 << 20)}, {(1, 2): 3},
        # No dict, though just as false as an empty one.
        [], "", 0,
        # Keys that json.dumps would turn to text, so that another dict comes back.
        {1: "a"}, {True: "a"}, {None: "a"}, {"a": [{1.5: "a"}]},
    ],
    ids=lambda metadata: repr(metadata)[:30],
)  # fmt: skip
def test_wrong_metadata(metadata, tmp_path):
    """What is no JSON object is refused as metadata, and the old file stays as it was."""
    path = _saved(mlp(), tmp_path / "m.diffq")
    before = path.read_bytes()
    with pytest.raises(diffq.FormatError, match="metadata"):
        diffq.save(_qat(mlp()), path, metadata=metadata)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- Permissions ---


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o755])
def test_permissions_stay(mode, tmp_path):
    """A file that is saved over keeps its permissions."""
    path = _saved(mlp(), tmp_path / "m.diffq")
    path.chmod(mode)
    diffq.save(_qat(ConvNet()), path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    diffq.load(path, ConvNet())


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_of_new_files(mask, tmp_path):
    """A new file gets the permissions that `open` would give it."""
    old = os.umask(mask)
    try:
        _saved(mlp(), tmp_path / "m.diffq")
        (tmp_path / "other").touch()
    finally:
        assert os.umask(old) == mask
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes["m.diffq"] == modes["other"] == 0o666 & ~mask


def test_the_umask_stays(tmp_path, monkeypatch):
    """A save never changes the umask, not even for a moment: all threads share it."""
    seen, umask = [], os.umask
    monkeypatch.setattr(os, "umask", lambda mask: seen.append(mask) or umask(mask))
    _saved(mlp(), tmp_path / "m.diffq")
    assert seen == []


def test_a_read_only_folder():
    """In a folder that cannot be written, a save is a PermissionError, and the file stays."""
    with tempfile.TemporaryDirectory() as folder:
        path = _saved(mlp(), Path(folder) / "m.diffq")
        path.chmod(0o666)
        before = path.read_bytes()
        os.chmod(folder, 0o555)
        # Root may write everywhere.
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=r"m\.diffq"):
                _saved(ConvNet(), path)
            diffq.verify(path)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]
