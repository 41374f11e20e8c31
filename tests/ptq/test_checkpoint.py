"""`quantize_checkpoint`: a state dict in, a file out, as `diffq pack` writes it."""

import io

import pytest
import torch
from torch import nn

import diffq
from diffq.cli import main
from tests.compare import same_bits

MEGABYTE = 2**20


def net(seed=0):
    """Two layers of weights to quantize, a norm, and biases that are not."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 64))


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(80, 40)
        self.head = nn.Linear(40, 80, bias=False)
        self.head.weight = self.embed.weight


def bytes_of(quantized):
    """The file, as it is written."""
    file = io.BytesIO()
    assert quantized.save(file) == len(file.getvalue())
    return file.getvalue()


COMMANDS = [
    (["--bits", "5"], {"bits": 5}),
    (["--bits", "3", "--group-size", "16"], {"bits": 3, "group_size": 16}),
    (["--target-mb", "0.02"], {"target_mb": 0.02}),
    (["--target-mb", "0.02", "--group-size", "0"], {"target_mb": 0.02, "group_size": 0}),
    (["--target-mb", "0.02", "--per-channel"], {"target_mb": 0.02, "per_channel": True}),
    (
        ["--target-mb", "0.04", "--codec", "rans", "--include", "*.weight", "--exclude", "0.*"],
        {"target_mb": 0.04, "codec": "rans", "include": ["*.weight"], "exclude": ["0.*"]},
    ),
    (
        ["--bits", "4", "--float16", "--min-size", "0", "--metadata", "classes=10"],
        {"bits": 4, "float16": True, "min_size": 0, "metadata": {"classes": 10}},
    ),
]


@pytest.mark.parametrize(("arguments", "options"), COMMANDS)
def test_the_file_is_that_of_the_command_line(arguments, options, tmp_path, capsys):
    """Each option gives, byte for byte, the file of `diffq pack` with the same option."""
    state = net().state_dict()
    torch.save(state, tmp_path / "net.pt")
    packed = tmp_path / "net.diffq"
    assert main(["pack", str(tmp_path / "net.pt"), str(packed), *arguments]) == 0
    assert bytes_of(diffq.quantize_checkpoint(state, **options)) == packed.read_bytes()


@pytest.mark.parametrize("options", [{"bits": 4}, {"target_mb": 0.02}])
def test_the_values_are_those_of_the_file(options, tmp_path):
    """state_dict(), the file and the quantized state hold the same values, in the same order."""
    model = net()
    quantized = diffq.quantize_checkpoint(model.state_dict(), **options)
    quantized.save(tmp_path / "net.diffq")
    loaded = diffq.load(tmp_path / "net.diffq")
    values = quantized.state_dict()
    restored = diffq.restore_quantized_state(net(1), quantized.get_quantized_state()).state_dict()
    assert list(values) == list(model.state_dict())
    for name, value in values.items():
        assert same_bits(value, loaded[name])
        assert same_bits(value, restored[name])
    assert not same_bits(values["0.weight"], model.state_dict()["0.weight"])
    net(1).load_state_dict(values)


def test_the_state_dict_stays_as_it_is():
    """Quantizing changes no tensor that was given."""
    state = net().state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    diffq.quantize_checkpoint(state, 0.02)
    assert all(same_bits(state[name], tensor) for name, tensor in before.items())


def test_size_mb_is_the_size_of_the_file():
    """size_mb counts every byte of the file, and is at most the target."""
    quantized = diffq.quantize_checkpoint(net().state_dict(), 0.02, metadata={"note": "x" * 50})
    assert quantized.size_mb == len(bytes_of(quantized)) / MEGABYTE
    assert 0.97 * 0.02 < quantized.size_mb <= 0.02


def test_ties_stay():
    """Tied names share one decoded tensor, and one row of the table."""
    quantized = diffq.quantize_checkpoint(Tied().state_dict(), bits=4)
    values = quantized.state_dict()
    assert values["embed.weight"] is values["head.weight"]
    assert "embed.weight = head.weight" in repr(quantized)


def test_the_table_lists_what_is_quantized():
    """The table has a line for each quantized tensor, with its mean bits, and lines up."""
    title, header, rule, *rows = repr(
        diffq.quantize_checkpoint(net().state_dict(), bits=4)
    ).splitlines()
    assert title.startswith("QuantizedCheckpoint, a file of 0.0")
    assert header.split() == ["tensor", "shape", "groups", "bits", "MB"]
    assert [row.split()[:4] for row in rows[:2]] == [
        ["0.weight", "96x64", "1", "4.00"],
        ["3.weight", "64x96", "1", "4.00"],
    ]
    assert "without levels" in rows[2]
    assert {len(row) for row in (header, *rows)} == {len(rule)}


def test_progress_is_reported():
    """`report` is told about both phases of the search."""
    told = []
    diffq.quantize_checkpoint(net().state_dict(), 0.02, report=lambda *step: told.append(step))
    assert {what for what, *_ in told} == {"measuring errors", "searching bitwidths"}


def test_a_terminal_shows_a_bar(monkeypatch):
    """By default a line on a terminal tells how far the search is."""
    monkeypatch.setattr("sys.stderr", screen := io.StringIO())
    diffq.quantize_checkpoint(net().state_dict(), 0.02)
    assert screen.getvalue() == ""
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("time.monotonic", iter(range(10**6)).__next__)
    diffq.quantize_checkpoint(net().state_dict(), 0.02)
    assert "quantizing [" in screen.getvalue()


REFUSED = [
    ({}, "got neither"),
    ({"bits": 4, "target_mb": 1.0}, "got both"),
    ({"target_mb": -1.0}, "target_mb must be a number"),
    ({"target_mb": 0.0}, "smallest file"),
    ({"bits": 16}, "bits must be"),
    ({"bits": 4, "sensitivity": {}}, "sensitivity chooses bitwidths"),
    ({"bits": 4, "codec": "zip"}, "The codec is"),
    ({"target_mb": 1.0, "group_size": 8, "per_channel": True}, "group_size=8 and per_channel"),
    ({"target_mb": 1.0, "include": "head"}, "list of name patterns"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_arguments_that_break_a_rule(options, message):
    """Each is a ConfigError that names the argument."""
    with pytest.raises(diffq.ConfigError, match=message):
        diffq.quantize_checkpoint(net().state_dict(), **options)


def test_metadata_is_checked_before_the_work():
    """Metadata that is no JSON is refused before any error is measured."""
    told = []
    with pytest.raises(diffq.FormatError):
        diffq.quantize_checkpoint(
            net().state_dict(), 0.02, metadata={"a": object()}, report=lambda *s: told.append(s)
        )
    assert told == []


@pytest.mark.parametrize("given", [net(), "net.safetensors", None])
def test_other_things_than_a_state_dict(given):
    """A model or a path is refused, with what to pass instead."""
    with pytest.raises(diffq.ConfigError, match=r"Pass model\.state_dict\(\)"):
        diffq.quantize_checkpoint(given, bits=4)


def test_the_state_dict_of_an_attached_model():
    """It is refused, because its learned bits would be lost without a word."""
    model = net()
    diffq.DiffQuantizer(model, min_size=0)
    with pytest.raises(diffq.ConfigError, match=r"'_diffq\.learned'.*detach"):
        diffq.quantize_checkpoint(model.state_dict(), bits=4)


def test_a_state_that_is_quantized_already():
    """It is refused, with the call that writes it as it is."""
    state = diffq.quantize_checkpoint(net().state_dict(), bits=4).get_quantized_state()
    with pytest.raises(diffq.ConfigError, match=r"quantized already.*diffq\.save"):
        diffq.quantize_checkpoint(state, bits=4)


def test_a_checkpoint_around_the_state_dict():
    """A dict that holds the state dict under a key is refused, with the key."""
    with pytest.raises(diffq.ConfigError, match=r"got dict for 'model'.*state dict that is in it"):
        diffq.quantize_checkpoint({"model": dict(net().state_dict())}, bits=4)


def test_save_names_the_other_save():
    """diffq.save refuses the result, whose file is encoded already, and says so."""
    quantized = diffq.quantize_checkpoint(net().state_dict(), bits=4)
    with pytest.raises(diffq.ConfigError, match=r"its own save\(path\)"):
        diffq.save(quantized, "unused.diffq")
