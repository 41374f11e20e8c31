"""How kernels are launched, and when their addresses are uploaded."""

import pytest
import torch

from tests.compare import same_bits
from tests.kernels import backend

DEVICE = backend.device()

from diffq.kernels import probe  # noqa: E402
from diffq.kernels.launch import Addresses, Launch  # noqa: E402


class Kernel:
    """Stands for a kernel of Triton and for what is compiled of it; notes its launches."""

    def __init__(self, compiled=None):
        self.compiled, self.calls = compiled, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.calls.append((grid, arguments, options))
            return self.compiled

        return launch


@pytest.mark.parametrize("direct", [False, True])
def test_first_and_later_launches(direct, monkeypatch):
    """The first launch is Triton's. Later ones are too, or go with all constants past it."""
    monkeypatch.setattr(Launch, "direct", direct)
    compiled = Kernel()
    kernel = Kernel(compiled)
    launch = Launch(kernel, (4, True), num_warps=8)
    for count in (1, 2, 3):
        launch(count, "a", 0.5)
    usual = [((n,), ("a", 0.5, 4, True), {"num_warps": 8}) for n in (1, 2, 3)]
    assert kernel.calls == (usual[:1] if direct else usual)
    past = [((n, 1, 1), ("a", 0.5, 4, True), {}) for n in (2, 3)]
    assert compiled.calls == (past if direct else [])


def test_probe(monkeypatch):
    """The first kernel of all computes what it should."""
    monkeypatch.setattr(Launch, "direct", False)
    probe.run(DEVICE)


def test_probe_of_a_triton_that_launches_one_way_only(monkeypatch):
    """Where what is compiled cannot be launched, or wrongly, launches are Triton's."""
    monkeypatch.setattr(Launch, "direct", False)
    for second in (TypeError("one argument too many"), False):
        results = [True, second]

        def answer(*_, results=results):
            result = results.pop(0)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(probe, "_is_right", answer)
        probe.run(DEVICE)
        assert not Launch.direct


def test_probe_of_wrong_numbers(monkeypatch):
    """A Triton that computes wrong numbers, or an old one, is an error."""
    monkeypatch.setattr(probe, "_is_right", lambda *_: False)
    with pytest.raises(RuntimeError, match="wrong numbers"):
        probe.run(DEVICE)
    monkeypatch.setattr(probe.triton, "__version__", "3.2.0")
    with pytest.raises(RuntimeError, match=r"3\.3 or newer, got 3\.2\.0; torch 2\.7 brings it"):
        probe.run(DEVICE)


def test_addresses():
    """The table follows the weights and their flags, and is uploaded only when one changes."""
    addresses = Addresses(DEVICE)
    weights = [torch.zeros(16, device=DEVICE), torch.zeros(32, device=DEVICE)]
    addresses.update(weights, [False, True])
    first = addresses.table
    assert same_bits(first[:, 1].cpu(), torch.tensor([0, 1]))
    assert first[:, 0].tolist() == [weight.data_ptr() for weight in weights]
    assert addresses.aligned
    addresses.update(weights, [False, True])
    assert addresses.table is first
    addresses.update([weights[0], torch.zeros(17, device=DEVICE)[1:]], [False, True])
    assert addresses.table is not first
    assert not addresses.aligned
