"""The line that tells how far k-means is."""

import io
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import diffq
from diffq.quantizers import progress
from diffq.quantizers.progress import ProgressBar


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """stderr as a terminal."""
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    return stream


def test_tells_the_share_that_is_done(terminal):
    """The line has the task, a bar, the share of all steps, and what is being worked on."""
    with ProgressBar("k-means", 8, delay=0) as bar:
        bar.advance(2, "layer.0")
        assert terminal.getvalue().endswith("k-means [######..................] 25% layer.0")
        bar.advance(6, "layer.1")
        assert terminal.getvalue().endswith(f"k-means [{'#' * 24}] 100% layer.1")
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_short_tasks_print_nothing(terminal):
    """A task that is over before the delay leaves no line."""
    with ProgressBar("k-means", 2, delay=60) as bar:
        bar.advance(1, "a")
    assert "k-means" not in terminal.getvalue()


def test_nothing_without_a_terminal(monkeypatch):
    """Nothing is printed where stderr is a file."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    with ProgressBar("k-means", 2, delay=0) as bar:
        bar.advance(1, "a")
    assert stream.getvalue() == ""


def test_an_error_clears_the_line(terminal):
    """The line does not stay in the way of a traceback."""
    with suppress(ValueError), ProgressBar("k-means", 2, delay=0) as bar:
        bar.advance(1, "a")
        raise ValueError
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_codebooks_tell_their_progress(terminal, monkeypatch):
    """Learning codebooks tells which tensor it is at, and ends at no more than all of it."""
    module = "diffq.quantizers.product.quantizer"
    monkeypatch.setattr(f"{module}.ProgressBar", lambda *a: ProgressBar(*a, delay=0))
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    torch.manual_seed(0)
    diffq.ProductQuantizer(model, min_size=0, block_size=4, codebook_size=16)
    text = terminal.getvalue()
    assert "0.weight" in text
    assert "1.weight" in text
    shares = [int(part.split("%")[0].split()[-1]) for part in text.split("\r") if "%" in part]
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] <= 100
