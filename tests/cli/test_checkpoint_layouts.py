"""Checkpoints as trainers write them: where the state dict is, and under which names."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import diffq
from diffq.cli import main
from diffq.cli.layouts import find_state
from tests.holder import bits_of

STATE = nn.Linear(4, 4).state_dict()


@pytest.fixture
def pack(tmp_path, monkeypatch, capsys):
    """Packs a checkpoint: (exit code, stderr, the names of the file)."""
    monkeypatch.chdir(tmp_path)

    def call(content, *options, save=torch.save):
        save(content, "in.pt")
        code = main(["pack", "in.pt", "out.diffq", "--bits", "6", "--min-size", "0", *options])
        err = capsys.readouterr().err
        return code, err, list(diffq.load("out.diffq")) if code == 0 else None

    return call


# --- Where the state dict is ---


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"state_dict": STATE, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, "state_dict"),
        ({"model": {"state_dict": STATE, "model_args": {}}, "optimizer": {}}, "model.state_dict"),
        ({"a": {"b": {"c": STATE}}, "rng": torch.zeros(3)}, "a.b.c"),
        ({"models": [STATE]}, "models.0"),
        ({"net.v2": {"best.pt": STATE}}, "net.v2.best.pt"),
        ({"model": STATE, "opt": torch.optim.Adam([torch.ones(2)]).state_dict()}, "model"),
        ({"a": {"b": {}, "b.c": STATE}}, "a.b.c"),
    ],
)
def test_nested_state_dicts(content, key, pack):
    """The only state dict is taken with a note of its key; the key itself is taken silently."""
    code, err, names = pack(content)
    assert (code, names) == (0, list(STATE))
    assert err == f"diffq: note: took the state dict under --key {key}\n"
    assert pack(content, "--key", key) == (0, "", list(STATE))


def test_several_state_dicts(pack):
    """Where there are several, the error lists their keys at any depth, shortest first."""
    content = {"model": {"student": STATE, "teacher": dict(STATE)}, "ema": dict(STATE), "step": 1}
    code, err, _ = pack(content)
    assert code == 1
    assert "'ema', 'model.student', 'model.teacher': pass --key ema." in err
    code, err, _ = pack(content, "--key", "model")
    assert code == 1
    assert "under 'model'. There are some under 'ema'" in err
    assert pack(content, "--key", "model.teacher")[0] == 0


def test_optimizer_state_is_no_state_dict(pack):
    """The tensors of an optimizer are not taken for a model."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    assert "Save model.state_dict()" in pack({"optimizer": optimizer.state_dict()})[1]
    assert pack({"net": STATE, "optimizer": optimizer.state_dict()})[2] == list(STATE)


def test_a_key_is_never_guessed():
    """Names with dots are found as they are before they are split."""
    one, other = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    loaded = {"a.b": {"c": one}, "a": {"b.c": other, "b": {"c": other}}}
    assert find_state("x", loaded, "a.b.c").state["w"] is one["w"]
    assert find_state("x", {"a": {"b.c": one}}, "a.b.c").state["w"] is one["w"]


@pytest.mark.parametrize("deep", [1, 7])
def test_a_checkpoint_that_contains_itself(deep):
    """A cycle is an error, not a recursion without end."""
    loaded = {"step": 1}
    inner = loaded
    for _ in range(deep):
        inner["next"] = inner = {"step": 2}
    inner["next"] = loaded
    with pytest.raises(diffq.ConfigError, match="no state dict"):
        find_state("x", loaded, None)


def _contains_itself():
    content = {"model": STATE}
    content["self"] = content
    return content


def _names_itself():
    state = dict(STATE)
    state["self"] = state
    return {"model": state}


def _shared(width=60, height=60):
    """Containers that each hold the next many times: more paths than can be walked."""
    lists = [[]]
    for _ in range(height):
        lists.append([lists[-1]] * width)
    return {"model": STATE, "lists": lists[-1], "dicts": dict.fromkeys("abc", lists[-1])}


def _cyclic(width=60):
    """A list that is each of its own elements."""
    cycle = []
    cycle.extend([cycle] * width)
    return {"model": STATE, "cycle": cycle}


@pytest.mark.parametrize(
    "make",
    [
        _contains_itself,
        _names_itself,
        _shared,
        _cyclic,
        lambda: {"model": STATE, "best": {"model": STATE}},
        lambda: {"last": {"model": STATE}, "model": STATE},
        lambda: {"model": {**STATE, "settings": _shared()["lists"]}},
    ],
)
def test_shared_containers(make, pack):
    """Whatever else leads to the one state dict, or holds no tensor, it is the only one."""
    code, err, names = pack(make())
    assert code == 0, err
    assert names == list(STATE)
    assert "took the state dict under --key model\n" in err


def test_shared_containers_without_a_state_dict(pack):
    """A cycle without tensors is an error, not a walk without end."""
    assert "has no state dict" in pack({"a": _cyclic()["cycle"]})[1]
    cycle = [torch.ones(2)]
    cycle.extend([cycle] * 60)
    assert "has no state dict" in pack({"a": cycle})[1]


def test_a_state_dict_at_any_depth():
    """A state dict is found however deep it is, and the shallower one first."""
    loaded = deep = {"w": torch.ones(1)}
    for _ in range(50_000):
        loaded = {"a": loaded}
    found = find_state("x", loaded, None)
    assert found.state["w"] is deep["w"]
    assert found.notes == (f"took the state dict under --key {'.'.join('a' * 50_000)}",)
    with pytest.raises(diffq.ConfigError, match=r"under 'b', 'z\.a"):
        find_state("x", {"z": loaded, "b": {"w": torch.ones(1)}}, "c")


# --- What is beside the tensors ---


def test_numbers_beside_tensors(pack):
    """Numbers, text, None and settings beside the tensors are left out, and a note names them."""
    others = {"epoch": 3, "lr": 0.1, "name": "x", "none": None, "args": {"depth": [1, 2]}}
    code, err, names = pack({**STATE, **others})
    assert (code, names) == (0, list(STATE))
    assert err == (
        "diffq: note: left out, because they are no tensors: epoch, lr, name, none, args\n"
    )
    assert "a0, a1, a2, a3, a4, ..." in pack({**STATE, **{f"a{i}": i for i in range(9)}})[1]


def test_tensors_beside_a_state_dict(pack):
    """A tensor beside a nested state dict does not make the whole a state dict."""
    code, err, names = pack({"step": torch.tensor(3), "model": STATE})
    assert (code, names) == (0, list(STATE))
    assert "--key model" in err


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_prefixes_of_wrappers(prefix, pack):
    """Names of a wrapped model stay, and a note says so."""
    code, err, names = pack({prefix + name: tensor for name, tensor in STATE.items()})
    assert (code, names) == (0, [prefix + name for name in STATE])
    assert repr(prefix) in err


# --- Models with a quantizer attached ---


def _net():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize("kind", [diffq.DiffQuantizer, diffq.ProductQuantizer])
@pytest.mark.parametrize("trained", [False, True])
def test_an_attached_model(kind, trained, pack):
    """The checkpoint of an attached model gives the file of its plain weights, and a note."""
    net = _net()
    plain = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    options = {"codebook_size": 16} if kind is diffq.ProductQuantizer else {}
    quantizer = kind(net, min_size=0, **options)
    quantizer.no_optimizer()
    if trained and kind is diffq.DiffQuantizer:
        quantizer.freeze_bits()
    code, err, names = pack(net.state_dict())
    assert code == 0
    assert set(names) == set(plain)
    assert "a quantizer was attached" in err
    assert "diffq.save(quantizer" in err
    packed = {name: bits_of(tensor) for name, tensor in diffq.load("out.diffq").items()}
    diffq.load("out.diffq", _net())
    net = _net()
    net.load_state_dict(plain)
    pack(net.state_dict())
    assert {name: bits_of(tensor) for name, tensor in diffq.load("out.diffq").items()} == packed


def test_an_attached_model_in_safetensors(pack):
    """Names in a safetensors file are translated too, and those that `diff` compares."""
    safetensors = pytest.importorskip("safetensors.torch")
    net = nn.Linear(16, 16)
    torch.save(net.state_dict(), "plain.pt")
    diffq.DiffQuantizer(net, min_size=0)
    code, err, names = pack(net.state_dict(), save=safetensors.save_file)
    assert code == 0, err
    assert set(names) == {"weight", "bias"}
    assert main(["diff", "plain.pt", "in.pt"]) == 0


#: Quantizers to the options that `overrides` can give one tensor.
OPTIONS = {
    "diffq": (diffq.DiffQuantizer, {"group_size": 4}),
    "diffq-fixed": (diffq.DiffQuantizer, {"bits": 5}),
    "qat": (diffq.QATQuantizer, {"bits": 5}),
    "quant-noise": (diffq.QuantNoiseQuantizer, {"bits": 5}),
    "lsq": (diffq.LSQQuantizer, {"bits": 5}),
    "product": (diffq.ProductQuantizer, {"codebook_size": 16}),
}
#: How a model is before a quantizer is attached.
SHAPES = {
    "plain": lambda net: None,
    "override": lambda net: None,
    "tied": lambda net: setattr(net[1], "weight", net[0].weight),
    "pruned": lambda net: (
        prune.l1_unstructured(net[0], "weight", 0.5) and diffq.parametrize_pruning(net)
    ),
    "weight_norm": lambda net: parametrizations.weight_norm(net[0]),
    "orthogonal": lambda net: parametrizations.orthogonal(net[0]),
}


#: A ProductQuantizer takes no pruned weights.
CASES = [case for case in product(OPTIONS, SHAPES) if case != ("product", "pruned")]


def _shaped(shape):
    """A model of this shape, and a copy of its state dict."""
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    SHAPES[shape](net)
    return net, {name: tensor.clone() for name, tensor in net.state_dict().items()}


def _assert_packed(result, plain):
    """Checks that the file has the tensors of a plain state dict, and that a note says so."""
    code, err, names = result
    assert code == 0, err
    assert set(names) == set(plain)
    assert "a quantizer was attached" in err
    packed = diffq.load("out.diffq")
    for name, tensor in plain.items():
        torch.testing.assert_close(packed[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("quantizer", "shape"), CASES)
def test_every_attached_model(quantizer, shape, pack):
    """What the plain model has is packed under its names, whatever quantizer is attached."""
    net, plain = _shaped(shape)
    kind, options = OPTIONS[quantizer]
    given = {"overrides": {"?.weight": options}} if shape == "override" else options
    kind(net, min_size=0, **given)
    _assert_packed(pack(net.state_dict(), "--bits", "15"), plain)


def test_fixed_codewords_are_refused(pack):
    """Once codewords are trained in the weights' place, the stale weights are not packed."""
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    quantizer = diffq.ProductQuantizer(net, min_size=0, codebook_size=16)
    quantizer.no_optimizer()
    assert "0.weight" in quantizer.quantize_stage()
    _assert_stale(pack(net.state_dict()))
    quantizer.detach(quantized=True)
    assert pack(net.state_dict())[0] == 0


def _assert_stale(result):
    code, err, _ = result
    assert code == 1
    assert "'0.weight' as it was before quantize_stage()" in err
    assert "detach(quantized=True)" in err


# --- Checkpoints from when quantizers were parametrizations ---

UNSET = torch.zeros(1, dtype=torch.uint8)
#: Quantizers to what they stored of a tensor besides the tensor.
EARLIER = {
    "diffq": lambda tensor: {"logits": torch.zeros(tensor.numel() // 4), "_extra_state": UNSET},
    "diffq-fixed": lambda tensor: {"_extra_state": torch.tensor([1, 5], dtype=torch.uint8)},
    "qat": lambda tensor: {},
    "quant-noise": lambda tensor: {},
    "lsq": lambda tensor: {"scale": torch.ones(1)},
    "product": lambda tensor: {
        "codebook": torch.zeros(16, 8),
        "indices": torch.zeros(32, dtype=torch.int32),
        "_extra_state": UNSET,
    },
}


def _earlier(state, quantizer):
    """The state dict that a model had when a quantizer was the last of its parametrizations."""
    found = {}
    for name, tensor in state.items():
        owner, _, attribute = name.rpartition(".")
        if quantizer == "product" and attribute == "bias":
            found[name] = tensor
            continue
        if "parametrizations" in name:
            stem, place = f"{name.partition('.weight.')[0]}.weight", 1
            found[name] = tensor
        else:
            stem, place = f"{owner}.parametrizations.{attribute}", 0
            found[f"{stem}.original"] = tensor
        stored = EARLIER[quantizer](tensor)
        found.update((f"{stem}.{place}.{ending}", value) for ending, value in stored.items())
    return found


@pytest.mark.parametrize(("quantizer", "shape"), CASES)
def test_every_earlier_checkpoint(quantizer, shape, pack):
    """The plain weights are packed where they are stored; the checkpoint is refused otherwise."""
    _, plain = _shaped(shape)
    result = pack(_earlier(plain, quantizer), "--bits", "15")
    if quantizer in ("diffq", "diffq-fixed", "product") and shape in ("plain", "override", "tied"):
        _assert_packed(result, plain)
    else:
        assert result[0] == 1
        assert "diffq.save(quantizer" in result[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda net: _earlier(net.state_dict(), "qat"),
        lambda net: _earlier(net.state_dict(), "lsq"),
        lambda net: _earlier((parametrizations.weight_norm(net[0]) and net).state_dict(), "diffq"),
        lambda net: (
            parametrize.register_parametrization(net[0], "weight", nn.Identity())
            and net.state_dict()
        ),
    ],
    ids=["qat", "lsq", "weight_norm", "identity"],
)
def test_checkpoints_that_are_refused(make, pack):
    """Where the names do not tell that the stored tensor is the weight, nothing is written."""
    code, err, _ = pack(make(nn.Sequential(nn.Linear(16, 16))))
    assert code == 1
    assert "diffq.save(quantizer" in err
    assert "'0.weight'" in err
    assert err.count("\n") == 1
    assert not Path("out.diffq").exists()


def test_earlier_fixed_codewords_are_refused(pack):
    """Stale weights of codewords that were trained are not packed from these either."""
    state = _earlier(_shaped("plain")[1], "product")
    state["0.parametrizations.weight.0._extra_state"] = UNSET + 1
    _assert_stale(pack(state))


@pytest.mark.parametrize("other", ["weight_norm", "spectral_norm", "orthogonal"])
def test_other_parametrizations(other, pack):
    """What other parametrizations store is packed under its own names, and a note says so."""
    net = nn.Sequential(getattr(parametrizations, other)(nn.Linear(16, 16)))
    code, err, names = pack(net.state_dict())
    assert code == 0
    assert set(names) == set(net.state_dict())
    assert "other parametrizations compute 0.weight" in err
