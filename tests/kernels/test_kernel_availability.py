"""Where kernels run, and what is said where they cannot; needs no Triton."""

import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from diffq.errors import DiffqWarning
from diffq.kernels import availability
from diffq.kernels.availability import available
from diffq.kernels.weights import handles


def test_diffq_imports_no_triton():
    """Neither diffq, its quantizers nor the question whether there are kernels import Triton."""
    code = (
        "import sys, torch; before = 'triton' in sys.modules;"
        "import diffq, diffq.kernels.availability as k, diffq.kernels.weights;"
        "diffq.DiffQuantizer; k.available(torch.device('cpu'));"
        "print(before or 'triton' not in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"


@pytest.mark.parametrize("kind", ["cpu", "meta", "mps"])
def test_only_on_gpus(kind):
    """Kernels run on CUDA devices alone."""
    assert not available(torch.device(kind))


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch say that there is an H100, and lets a test say how a first launch goes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)

    def set_probe(run):
        fake = None if run is None else types.SimpleNamespace(run=run)
        monkeypatch.setitem(sys.modules, "diffq.kernels.probe", fake)
        monkeypatch.delattr("diffq.kernels.probe", raising=False)
        if fake is not None:
            monkeypatch.setattr("diffq.kernels.probe", fake, raising=False)

    availability._available.cache_clear()
    yield set_probe
    availability._available.cache_clear()


def test_first_launch_decides_once(gpu):
    """A device where the first launch works has kernels; it is launched once."""
    calls = []
    gpu(calls.append)
    assert all(available(torch.device("cuda:1")) for _ in range(3))
    assert calls == [torch.device("cuda:1")]


def test_failed_launch(gpu):
    """Where the first launch fails, one warning gives the reason and the remedy."""

    def fail(device):
        raise RuntimeError("Failed to find C compiler.")

    gpu(fail)
    with pytest.warns(DiffqWarning, match=r"RuntimeError: Failed to find C compiler.*such as gcc"):
        assert not available(torch.device("cuda:0"))
    assert not available(torch.device("cuda:0"))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")
def test_missing_triton(gpu):
    """Where Triton is missing, one warning says how to get it."""
    gpu(None)
    with pytest.warns(DiffqWarning, match="pip install triton"):
        assert not available(torch.device("cuda:0"))
    assert not available(torch.device("cuda:0"))


def test_old_gpu(gpu, monkeypatch):
    """GPUs that Triton does not compile for have no kernels, without a word."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    assert not available(torch.device("cuda:0"))


def test_handles():
    """Kernels take dense contiguous tensors of three dtypes in groups that a tile holds."""
    weight = nn.Parameter(torch.zeros(8, 4))
    assert handles(weight, 8)
    assert handles(weight.detach().half(), None)
    assert not handles(weight.double(), 8)
    assert not handles(weight.t(), 8)
    assert not handles(weight, 1025)
    assert not handles(weight[:0], 8)
    assert not handles(torch.empty(2**31, device="meta"), 8)
