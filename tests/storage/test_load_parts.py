"""Loading a part of a file, onto a device, and the types that callers see."""

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import diffq
from tests.holder import Holder, all_bits, bits_of
from tests.models import TiedModules, mlp

ROOT = Path(__file__).parents[2]


def _saved(model, path):
    diffq.save(diffq.QATQuantizer(model, min_size=0), path)
    return path


@pytest.fixture
def path(tmp_path):
    """The file of a small network."""
    return _saved(mlp(), tmp_path / "m.diffq")


# --- A part ---


def test_a_new_head(path):
    """strict=False loads the names that are shared, leaves the others, and warns of them."""
    model = nn.Sequential(*mlp()[:2], nn.Linear(32, 8, bias=False), nn.Linear(8, 3))
    before, stored = bits_of(model[3].weight), diffq.load(path)
    with pytest.warns(UserWarning, match="3 names") as caught:
        assert diffq.load(path, model, strict=False) is model
    for word in ("not stored: 3.weight", "not stored: 3.bias", "not in the model: 2.bias"):
        assert word in str(caught[0].message)
    assert caught[0].filename == __file__
    assert bits_of(model[3].weight) == before
    for name in ("0.weight", "0.bias", "2.weight"):
        assert bits_of(model.state_dict()[name]) == bits_of(stored[name])


def test_a_model_that_fits(path):
    """strict=False loads a model that fits whole, without a warning."""
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffq.load(path, model, strict=False)
    assert all_bits(model) == all_bits(diffq.load(path, mlp()))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 9)), "shape"),
        (lambda: nn.Sequential(nn.Linear(16, 32).half()), "dtype"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 32)), "not in the model: 0.weight"),
        (nn.ReLU, "not in the model"),
    ],
    ids=["shape", "dtype", "no name", "empty"],
)
def test_what_strict_does_not_excuse(make, word, path):
    """Other shapes and dtypes, and a model that shares no name, are errors that change nothing."""
    model = make()
    before = all_bits(model)
    with pytest.raises(diffq.MismatchError, match=word):
        diffq.load(path, model, strict=False)
    assert all_bits(model) == before


def test_further_names_of_what_is_loaded(tmp_path):
    """A tie that only the file, or only the model, has is loaded, and not warned of."""
    tied = _saved(TiedModules(), tmp_path / "tied.diffq")
    embed = Holder({"w": torch.randn(4, 4)})
    embed.v = embed.w
    one = _saved(Holder({"w": torch.randn(4, 4)}), tmp_path / "one.diffq")
    alone = nn.ModuleDict({"head": nn.Linear(16, 24, bias=False), "body": nn.Linear(16, 16)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffq.load(tied, alone, strict=False)
        diffq.load(one, embed, strict=False)
    assert bits_of(alone["head"].weight) == bits_of(diffq.load(tied)["embed.weight"])
    assert bits_of(embed.v) == bits_of(diffq.load(one)["w"])


def test_damage_outside_of_the_part(path):
    """A file that is damaged where the model takes nothing is refused all the same."""
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    model = nn.Sequential(nn.Linear(16, 32))
    before = all_bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(diffq.FormatError):
            diffq.load(path, model, strict=False)
    assert all_bits(model) == before


def test_strict_needs_a_model(path):
    """strict=False without a model is an error: there is nothing to compare with."""
    with pytest.raises(diffq.ConfigError, match="model"):
        diffq.load(path, strict=False)


# --- Devices ---


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_device_for_the_dict(device, tmp_path):
    """Without a model, the tensors are on the device that was asked for; ties stay tied."""
    path = _saved(TiedModules(), tmp_path / "m.diffq")
    state = diffq.load(path, device=device)
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    assert state["head.weight"] is state["embed.weight"]
    assert {tensor.device.type for tensor in diffq.load(path).values()} == {"cpu"}


@pytest.mark.parametrize(
    "device",
    [torch.float16, torch.ones(1), True, 1.5, b"cpu", [], "", "foo", -1, 10**30, "vulkan"],
    ids=repr,
)
@pytest.mark.parametrize("model", [None, nn.Linear(2, 2)], ids=["dict", "model"])
def test_what_is_no_device(device, model, tmp_path):
    """What Tensor.to would take for a cast, and no device at all: refused before reading."""
    with pytest.raises(diffq.ConfigError, match=r"device must be one of this machine.*Omit"):
        diffq.load(tmp_path / "missing", model, device=device)


@pytest.mark.parametrize("error", [AssertionError, RuntimeError, ModuleNotFoundError])
def test_a_device_that_the_machine_lacks(error, path, monkeypatch):
    """Whatever torch raises for a device that is not there, the error is one of diffq's."""

    def missing(*args, **options):
        raise error("Torch not compiled with it. Or worse.")

    monkeypatch.setattr(torch, "empty", missing)
    with pytest.raises(diffq.ConfigError, match=r"got 'cuda': Torch not compiled with it\. Omit"):
        diffq.load(path, device="cuda")


def test_a_device_besides_a_model(path):
    """With a model, the device must be its own, or nothing is read."""
    diffq.load(path, mlp(), device="cpu")
    with pytest.raises(diffq.ConfigError, match=r"'0\.weight' is on cpu and device is meta"):
        diffq.load(path, mlp(), device="meta")


# --- Types ---

_SNIPPET = """\
import io
import torch
from torch import nn
import diffq

class Net(nn.Module):
    width = 3

def use(path: str) -> None:
    reveal_type(diffq.load(path, Net()))
    reveal_type(diffq.load(path))
    reveal_type(diffq.load(path, device="cuda"))
    reveal_type(diffq.load(io.BytesIO(), Net(), strict=False))
    with open(path, "wb") as file:
        reveal_type(diffq.save({}, file))
    diffq.load(path, strict=False)
    diffq.load(path, Net(), True)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None,
    reason="mypy is not installed: pip install 'diffq[dev]'",
)
def test_types_of_load(tmp_path):
    """mypy sees the model's own class, or a dict of tensors, and refuses calls that fail."""
    (tmp_path / "snippet.py").write_text(_SNIPPET)
    command = [sys.executable, "-m", "mypy", str(tmp_path / "snippet.py")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    types = re.findall(r'Revealed type is "(.*)"', run.stdout)
    # Versions of mypy differ in how they write the names of built-in types.
    assert [found.replace("builtins.", "") for found in types] == [
        "snippet.Net",
        "dict[str, torch._tensor.Tensor]",
        "dict[str, torch._tensor.Tensor]",
        "snippet.Net",
        "int",
    ]
    assert re.findall(r"snippet.py:(\d+): error", run.stdout) == ["16", "17"]
