"""States and files of the earlier package: every layout, real files, damage and hostile pickles."""

import argparse
import copy
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffq
from diffq.cli.convert import add_parser, convert, make_model
from diffq.errors import ConfigError, DiffqError, FormatError, MismatchError, StateError
from diffq.format.records import GridRecord
from diffq.storage.legacy.entries import GridEntry
from diffq.storage.legacy.layout import is_legacy
from diffq.storage.legacy.load import legacy_snapshot, load_legacy
from diffq.storage.legacy.planes import unpack_shorts, unpack_words
from diffq.storage.legacy.unpickle import KNOWN, read_file
from diffq.storage.state import record_tensor
from tests.compare import same_bits
from tests.holder import Holder, all_bits
from tests.legacy.make_golden import CASES, FOLDER, MIN_SIZE, build
from tests.models import MODELS

EXPECTED = np.load(FOLDER / "expected.npz")


# --- An encoder of its own, one element after the other ---


def pack_words(values, planes):
    """int64 words [lines, planes, 32]."""
    words = np.zeros((-(-len(values) // 2048), planes, 32), np.uint64)
    for element, value in enumerate(values):
        line, place = divmod(element, 2048)
        bit, word = divmod(place, 32)
        for plane in range(planes):
            words[line, plane, word] |= np.uint64((int(value) >> plane & 1) << bit)
    return words


def pack_shorts(values, planes):
    """int16 words [planes, width]."""
    width = -(-len(values) // 16)
    words = np.zeros((planes, width), np.uint16)
    for element, value in enumerate(values):
        bit, word = divmod(element, width)
        for plane in range(planes):
            words[plane, word] |= np.uint16((int(value) >> plane & 1) << bit)
    return words.view(np.int16)


PACKERS = {
    "int64": lambda values, planes: torch.from_numpy(pack_words(values, planes).view(np.int64)),
    "int16": lambda values, planes: torch.from_numpy(pack_shorts(values, planes)),
    "uint64": pack_words,
}


def stand_in(name):
    """A class as meta holds it."""
    return type(name, (), {})


def state_of(quantized, others=(), float16=(), meta=None):
    """A state as the earlier package makes it; without `meta`, one of version 0.1."""
    state = {"quantized": list(quantized), "float16": list(float16), "others": list(others)}
    return state if meta is None else {**state, "meta": meta}


def meta_of(klass, packing=None, **init_kwargs):
    """What a state says of itself."""
    return {
        "klass": stand_in(klass),
        "init_kwargs": {"min_size": 0, **init_kwargs},
        "packed": packing is not None,
        "torch_pack": packing == "int16",
    }


def diffq_entry(levels, bits, limits, packing, min_bits):
    """The entry of a DiffQ tensor from levels [groups, group_size] and bits [groups]."""
    if packing is None:
        dtype = np.uint8 if bits.max() <= 8 else np.int16
        return torch.from_numpy(levels.astype(dtype)), limits, torch.from_numpy(bits)
    pack = PACKERS[packing]
    empty = pack([], 0) if packing == "uint64" else None
    slots = [
        pack(levels[bits == width].ravel(), width) if (bits == width).any() else empty
        for width in range(1, 15)
    ]
    planes = int((bits - min_bits).max()).bit_length()
    return slots, limits, pack(bits - min_bits, planes)


def value_of(level, bits, low, high):
    """One value as the earlier package computes it, in float32."""
    f = np.float32
    return f(f(f(f(level) * f(1 / (2**bits - 1))) * f(high - low)) + f(low))


# --- Bit planes ---


@given(
    count=st.integers(0, 4200),
    bits=st.integers(1, 15),
    seed=st.integers(0, 99),
    packing=st.sampled_from(["int64", "int16"]),
)
@settings(max_examples=30)
def test_planes_round_trip(count, bits, seed, packing):
    """Both packings of integers of 1 to 15 bits, of any number, unpack to the same integers."""
    values = np.random.default_rng(seed).integers(0, 2**bits, count)
    unpack = unpack_words if packing == "int64" else unpack_shorts
    unpacked = unpack(PACKERS[packing](values, bits).numpy(), count)
    assert unpacked.dtype == np.uint16
    assert unpacked.tolist() == values.tolist()


@pytest.mark.parametrize(
    ("unpack", "shape"),
    [
        (unpack_words, (2, 3, 32)),
        (unpack_words, (1, 3, 31)),
        (unpack_words, (1, 16, 32)),
        (unpack_words, (3, 32)),
        (unpack_shorts, (3, 127)),
        (unpack_shorts, (16, 128)),
        (unpack_shorts, (128,)),
    ],
)
def test_planes_of_another_shape(unpack, shape):
    """Words of another shape than 2048 elements need are refused."""
    with pytest.raises(FormatError):
        unpack(np.zeros(shape, np.int64 if unpack is unpack_words else np.int16), 2048)


# --- Real files ---


def filled(case, number=7.0):
    """The model of a golden file with other values."""
    model = build(case)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(number)
    return model


def resavable(case):
    """A golden state that can be pickled here: the class that it names does not exist."""
    state = read_file(FOLDER / f"{case}.th")
    del state["meta"]["klass"]
    return state


def same_bytes(one, other):
    """Whether two arrays are equal bit for bit."""
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.mark.parametrize("case", CASES)
def test_golden_values(case):
    """A file of the earlier package loads to the values that it restores itself, to the bit."""
    model = filled(case)
    kept = {name: id(tensor) for name, tensor in model.named_parameters()}
    assert load_legacy(FOLDER / f"{case}.th", model) is model
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == kept
    names = [key.partition("/")[2] for key in EXPECTED if key.partition("/")[0] == case]
    assert sorted(names) == sorted(kept)
    for name, parameter in model.named_parameters():
        assert same_bytes(parameter.detach().numpy(), EXPECTED[f"{case}/{name}"])
    assert all((buffer == 7).all() for buffer in model.buffers())


@pytest.mark.parametrize("case", CASES)
def test_golden_files_convert(case, tmp_path):
    """A converted file has the same levels, bits and ranges; its values are equal but for the
    last bits of the largest weight, and equal to the bit for LSQ and for raw tensors."""
    model = filled(case)
    before = all_bits(model)
    convert(FOLDER / f"{case}.th", tmp_path / "new.diffq", model)
    assert all_bits(model) == before
    loaded = diffq.load(tmp_path / "new.diffq", filled(case, 1.0))
    legacy = load_legacy(FOLDER / f"{case}.th", filled(case))
    snapshot = legacy_snapshot(FOLDER / f"{case}.th", model)
    for name, tensor in loaded.state_dict(keep_vars=True).items():
        other = legacy.state_dict(keep_vars=True)[name]
        record = snapshot.records[snapshot.aliases.get(name, name)]
        if isinstance(record, GridRecord):
            last_bits = 2**-9 if other.dtype == torch.float16 else 2**-20
            error = (tensor.double() - other.double()).abs().max()
            assert error <= last_bits * float(np.abs(record.ranges).max())
        else:
            assert same_bits(tensor, other)


def test_golden_levels_and_ranges():
    """A record holds the levels, bits and range of the state as they are."""
    state = read_file(FOLDER / "diffq-g8-unpacked.th")
    levels, (low, high), bits = state["quantized"][0]
    records = legacy_snapshot(state, build("diffq-g8-unpacked")).records
    for case in ("diffq-g8-unpacked", "diffq-g8-torch-pack"):
        record = legacy_snapshot(FOLDER / f"{case}.th", build(case)).records["embed.weight"]
        assert record.levels.tolist() == levels.ravel().tolist()
        assert record.bits.tolist() == bits.tolist()
        assert record.ranges.tolist() == [[low, high]]
        assert (record.group_size, record.min_bits) == (8, 2)
    names = [n for n in build("diffq-g8").state_dict() if "again" not in n and n != "head.weight"]
    assert list(records) == names


def test_converted_ties_and_buffers():
    """A snapshot names ties as aliases and takes buffers from the model."""
    model = filled("uniform-8", 3.0)
    snapshot = legacy_snapshot(FOLDER / "uniform-8.th", model)
    assert snapshot.aliases == {
        "again.weight": "shared.weight",
        "again.bias": "shared.bias",
        "head.weight": "embed.weight",
    }
    assert (record_tensor(snapshot.records["norm.running_mean"]) == 3).all()


def test_float16_stays_float16(tmp_path):
    """What the earlier package stored as float16 is converted as float16."""
    records = legacy_snapshot(FOLDER / "diffq-float16.th", build("diffq-float16")).records
    assert records["head.bias"].stored_dtype == "float16"
    assert records["head.bias"].dtype == "float32"


# --- Hand-made states of every layout ---


@given(data=st.data(), seed=st.integers(0, 99), group_size=st.sampled_from([0, 1, 4, 8]))
@settings(max_examples=40)
def test_diffq_layouts(data, seed, group_size):
    """Unpacked levels, both packings and the NumPy words of 0.2.0 load to the same values."""
    random = np.random.default_rng(seed)
    size = 8 * data.draw(st.integers(1, 40))
    groups = size // group_size if group_size else 1
    min_bits = data.draw(st.integers(1, 4))
    bits = random.integers(min_bits, 15, groups).astype(np.uint8)
    levels = random.integers(0, 2 ** bits[:, None].astype(int), (groups, size // groups))
    low, high = sorted(random.normal(size=2).astype(np.float32).tolist())
    expected = [
        value_of(level, int(width), low, high)
        for width, row in zip(bits, levels, strict=True)
        for level in row
    ]
    bias = torch.randn(3)
    for packing in (None, *PACKERS):
        entry = diffq_entry(levels, bits, (low, high), packing, min_bits)
        kwargs = {"group_size": group_size, "min_bits": min_bits, "exclude": ["b"]}
        state = state_of([entry], [bias], meta=meta_of("DiffQuantizer", packing, **kwargs))
        model = Holder({"w": torch.zeros(4, size // 4), "b": torch.zeros(3)})
        load_legacy(state, model)
        assert same_bytes(model.w.detach().numpy().ravel(), np.array(expected))
        assert same_bits(model.b, bias)


@given(bits=st.integers(1, 15), seed=st.integers(0, 99), packing=st.sampled_from([None, "int64"]))
@settings(max_examples=30)
def test_uniform_layouts(bits, seed, packing):
    """Uniform levels of 1 to 15 bits load, packed or not."""
    random = np.random.default_rng(seed)
    levels = random.integers(0, 2**bits, (5, 7))
    low, high = sorted(random.normal(size=2).astype(np.float32).tolist())
    stored = torch.from_numpy(levels.astype(np.uint8 if bits <= 8 else np.int16))
    if packing:
        stored = PACKERS[packing](levels.ravel(), bits)
    meta = meta_of("UniformQuantizer", packing, bits=float(bits))
    model = load_legacy(
        state_of([(stored, (low, high))], meta=meta), Holder({"w": torch.zeros(5, 7)})
    )
    expected = [[value_of(level, bits, low, high) for level in row] for row in levels]
    assert same_bytes(model.w.detach().numpy(), np.array(expected))


@given(
    bits=st.integers(2, 15),
    seed=st.integers(0, 99),
    packing=st.sampled_from([None, "int64", "int16"]),
)
@settings(max_examples=30)
def test_lsq_layouts(bits, seed, packing):
    """LSQ indices of 2 to 15 bits load, packed or not, and convert to the same bits."""
    random = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    index = random.integers(-half, half, (5, 7))
    scale = torch.tensor(random.normal(), dtype=torch.float32)
    stored = torch.from_numpy(index.astype(np.int16))
    if packing:
        stored = PACKERS[packing](index.ravel() + half, bits)
    state = state_of([(stored, scale)], meta=meta_of("LSQ", packing, bits=bits))
    model = load_legacy(state, Holder({"w": torch.zeros(5, 7)}))
    expected = index.astype(np.float32) * scale.numpy()
    assert same_bytes(model.w.detach().numpy(), expected)
    assert same_bytes(legacy_snapshot(state, model).records["w"].values(), expected)


@given(
    bits=st.integers(1, 15),
    low=st.floats(-(2.0**99), 2.0**99, width=32),
    width=st.floats(0, 2.0**99, width=32),
    seed=st.integers(0, 9),
)
def test_converted_values_are_close(bits, low, width, seed):
    """A converted grid differs by less than 2**-20 of its largest magnitude."""
    low, high = float(np.float32(low)), float(np.float32(low + width))
    levels = np.random.default_rng(seed).integers(0, 2**bits, 50).astype(np.uint16)
    entry = GridEntry(levels, np.full(1, bits, np.uint8), 50, bits, low, high)
    record = entry.record((50,), "float32")
    largest = max(abs(low), abs(high))
    error = np.abs(entry.values().astype(float) - record.values()).max()
    assert error <= 2**-20 * largest + 1e-44


def test_version_0_1():
    """A state without meta loads with the earlier quantizer's arguments given."""
    levels = torch.randint(0, 8, (20, 8), dtype=torch.uint8)
    bits = torch.full((20, 1), 3, dtype=torch.uint8)
    state = state_of([(levels, (-1.0, 1.0), bits)], [torch.ones(100)])
    make = {"w": torch.zeros(10, 16), "b": torch.zeros(100)}
    model = load_legacy(state, Holder(make), settings={"min_size": 120 * 4 / 2**20})
    assert model.w.view(-1)[0] == value_of(int(levels[0, 0]), 3, -1.0, 1.0)
    for wrong in (None, {"min_size": 0}):
        with pytest.raises(MismatchError, match="settings="):
            load_legacy(state, Holder(make), settings=wrong)
    with pytest.raises(ConfigError, match=r"settings may have bits, .*'size'"):
        load_legacy(state, Holder(make), settings={"size": 0})


def test_version_0_1_uniform_and_lsq():
    """States without meta that need the bitwidth take it from the settings."""
    levels = torch.randint(0, 8, (4, 4), dtype=torch.uint8)
    given_settings = {"bits": 3, "min_size": 0}
    model = load_legacy(
        state_of([(levels, (0.0, 7.0))]), Holder({"w": torch.ones(4, 4)}), settings=given_settings
    )
    assert torch.allclose(model.w, levels.float(), atol=1e-5)
    index = levels.short() - 4
    model = load_legacy(
        state_of([(index, torch.tensor(0.5))]),
        Holder({"w": torch.ones(4, 4)}),
        settings=given_settings,
    )
    assert same_bits(model.w, index * 0.5)


def test_version_0_2_0_file(tmp_path):
    """A file with pickled NumPy words loads, without NumPy's own unpickling."""
    bits = np.array([2, 5, 3, 5] * 5, np.uint8)
    levels = np.random.default_rng(0).integers(0, 4, (20, 8))
    entry = diffq_entry(levels, bits, (-1.0, 1.0), "uint64", 2)
    state = state_of([entry], meta=meta_of("DiffQuantizer", "uint64", group_size=8))
    expected = load_legacy(state, Holder({"w": torch.zeros(160)})).w
    del state["meta"]["klass"]
    torch.save(state, tmp_path / "old.th")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "old.th", weights_only=True)
    model = load_legacy(tmp_path / "old.th", Holder({"w": torch.zeros(160)}))
    assert same_bits(model.w, expected)


@pytest.mark.parametrize("name", ["tied-head", "tied-modules", "shared-module", "two-names"])
def test_ties_are_counted_once(name):
    """A tied parameter has one entry, at its first place."""
    model = MODELS[name][0]()
    entries = [
        (torch.full(p.shape, 5, dtype=torch.uint8), (float(i), i + 1.0))
        for i, p in enumerate(model.parameters())
    ]
    load_legacy(state_of(entries, meta=meta_of("UniformQuantizer")), model)
    for i, parameter in enumerate(model.parameters()):
        assert (parameter == value_of(5, 8, i, i + 1.0)).all()


def test_ties_that_are_excluded_by_one_name():
    """A tied parameter is selected under each of its names, and its levels win."""
    entry = (torch.full((24, 16), 5, dtype=torch.uint8), (0.0, 51.0))
    body = (torch.full((16, 16), 1, dtype=torch.uint8), (0.0, 51.0))
    bias, raw = torch.ones(16), torch.full((24, 16), 2.0)
    kwargs = {"min_size": 16 * 4 / 2**20}
    for exclude, quantized, others in (
        ("head.*", [entry, body], [bias]),
        ("embed.*", [body, entry], [raw, bias]),
    ):
        meta = meta_of("UniformQuantizer", exclude=[exclude], **kwargs)
        model = load_legacy(state_of(quantized, others, meta=meta), MODELS["tied-modules"][0]())
        assert same_bits(model.embed.weight, torch.ones(24, 16))
        assert torch.allclose(model.body.weight, torch.tensor(0.2))


def test_min_size_is_exclusive():
    """A parameter of exactly min_size MB is not quantized."""
    model = Holder({"w": torch.zeros(2621), "v": torch.zeros(2622)})
    entry = (torch.zeros(2622, dtype=torch.uint8), (1.0, 2.0))
    state = state_of([entry], [torch.ones(2621)], meta=meta_of("UniformQuantizer"))
    del state["meta"]["init_kwargs"]["min_size"]
    load_legacy(state, model)
    assert (model.w == 1).all()
    assert (model.v == 1).all()


# --- Where a state is ---


def test_key(tmp_path):
    """A state inside of a package is found by its key, and the error names the key."""
    state = resavable("uniform-8")
    torch.save({"a": {"state": state}, "state": {**state, "__quantized": True}}, tmp_path / "p.th")
    for key in ("a.state", "state"):
        load_legacy(tmp_path / "p.th", build("uniform-8"), key=key)
    with pytest.raises(StateError, match="pass key='state'"):
        load_legacy(tmp_path / "p.th", build("uniform-8"))
    with pytest.raises(StateError, match=r"There is no 'b' of key 'a.b'"):
        load_legacy(tmp_path / "p.th", build("uniform-8"), key="a.b")


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Saves a training package whose classes cannot be imported afterwards."""

    def _save(*names):
        content = {"state": resavable("uniform-8"), "args": [], "kwargs": {}}
        for name in names:
            module, _, short = name.rpartition(".")
            made = type(short, (), {"__module__": module, "__reduce__": _reduce})
            for parent in (module.partition(".")[0], module):
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
            setattr(sys.modules[module], short, made)
            content["klass"] = made
            content["kwargs"][short] = made()
        torch.save(content, tmp_path / "package.th")
        for name in names:
            monkeypatch.delitem(sys.modules, name.rpartition(".")[0])
        return tmp_path / "package.th"

    def _reduce(self):
        return type(self), (1, 2), {"of": "a model"}

    return _save


def test_package_of_demucs(package):
    """The classes that Demucs pickles along need not exist, and nothing of them is called."""
    path = package("demucs.hdemucs.HDemucs", "demucs.htdemucs.HTDemucs")
    load_legacy(path, build("uniform-8"), key="state")


def test_stand_ins(package):
    """The error names a class that is not known, and a stand-in for it lets the file load."""
    path = package("nowhere.models.Net")
    with pytest.raises(StateError, match=r"stand_ins=\['nowhere.models.Net'\]"):
        load_legacy(path, build("uniform-8"), key="state")
    load_legacy(path, build("uniform-8"), key="state", stand_ins=["nowhere.models.Net"])
    assert "nowhere.models" not in sys.modules
    for wrong in ("", "a b", "a..b", 3):
        with pytest.raises(ConfigError, match="stand_ins"):
            load_legacy(path, build("uniform-8"), stand_ins=[wrong])


def test_states_of_the_present_package():
    """A state of the present package is pointed to the function that reads it."""
    model = nn.Linear(4, 4)
    state = diffq.QATQuantizer(model, min_size=0).get_quantized_state()
    assert not is_legacy(state)
    with pytest.raises(StateError, match="restore_quantized_state"):
        load_legacy(state, nn.Linear(4, 4))


# --- Hostile and damaged files ---


class _Call:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def _hostile(marker):
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    system = _Call(os.system, (command,))
    return {
        "os.system": system,
        "eval": _Call(eval, (code,)),
        "exec": _Call(exec, (code,)),
        "import": _Call(__import__, ("this_module_does_not_exist",)),
        "getattr": _Call(getattr, ("", "join")),
        "open": _Call(open, (str(marker), "w")),
        "subprocess": _Call(__import__("subprocess").call, (["touch", str(marker)],)),
        "pickle": _Call(pickle.loads, (pickle.dumps(system),)),
        "argument": _Call(np._core.multiarray._reconstruct, (system, (0,), b"b")),
        "state": _Call(np.dtype, ("u8",), system),
        "numpy.load": _Call(np.load, (str(marker),)),
        "torch.load": _Call(torch.load, (str(marker),)),
        "runpy": _Call(__import__("runpy").run_path, (str(marker),)),
    }


@pytest.mark.parametrize("place", ["alone", "klass", "entry", "key", "old"])
@pytest.mark.parametrize("attack", _hostile(""))
def test_hostile_files(attack, place, tmp_path):
    """A file that calls something is refused, wherever the call is; it is never made."""
    marker, path = tmp_path / "marker", tmp_path / "hostile.th"
    call = _hostile(marker)[attack]
    state = resavable("uniform-8")
    if place in ("klass", "old"):
        state["meta"]["klass"] = call
    elif place == "entry":
        state["quantized"][0] = (call, (0.0, 1.0))
    elif place == "key":
        state["more"] = call
    torch.save(
        call if place == "alone" else state,
        path,
        _use_new_zipfile_serialization=place != "old",
    )
    model = build("uniform-8")
    before = all_bits(model)
    with pytest.raises(StateError) as raised:
        load_legacy(path, model)
    # torch's own message suggests to turn the protection off.
    assert "weights_only" not in str(raised.value)
    assert not marker.exists()
    assert all_bits(model) == before


def test_stand_ins_are_inert(tmp_path):
    """Even a stand-in for a dangerous function runs nothing: the name is not looked up."""
    marker, path = tmp_path / "marker", tmp_path / "hostile.th"
    state = resavable("uniform-8")
    state["more"] = _hostile(marker)["eval"]
    torch.save(state, path)
    load_legacy(path, build("uniform-8"), stand_ins=["builtins.eval"])
    assert not marker.exists()


def test_known_globals_stay_out_of_torch(tmp_path):
    """After a load, torch's own list of safe globals is as it was."""
    before = set(torch.serialization.get_safe_globals())
    load_legacy(FOLDER / "uniform-8.th", build("uniform-8"))
    with pytest.raises(StateError):
        read_file(__file__)
    assert set(torch.serialization.get_safe_globals()) == before
    assert not any(name in sys.modules for name in ("demucs", "diffq.diffq", "diffq.uniform"))
    assert len(set(KNOWN)) == len(KNOWN)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x80\x02.", b"\x80\x02}q\x00.", b"\x80\x02cos\nsystem\n.", b"x" * 999],
)
def test_files_of_something_else(content, tmp_path):
    """Bytes that are no file of torch.save are refused."""
    (tmp_path / "x.th").write_bytes(content)
    with pytest.raises(StateError):
        load_legacy(tmp_path / "x.th", build("uniform-8"))


def test_missing_files(tmp_path):
    """A file that is not there, or a folder, is an OSError."""
    for path in (tmp_path / "missing.th", tmp_path):
        with pytest.raises(OSError, match=r"missing.th|directory|denied"):
            load_legacy(path, build("uniform-8"))


def test_archives_that_inflate(tmp_path):
    """An archive that unpacks to more bytes than it has is refused before it is unpacked."""
    with (
        zipfile.ZipFile(FOLDER / "uniform-8.th") as old,
        zipfile.ZipFile(tmp_path / "bomb.th", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        new.writestr("uniform-8/data/99", bytes(10**7))
    with pytest.raises(StateError, match="would unpack to"):
        load_legacy(tmp_path / "bomb.th", build("uniform-8"))


@given(data=st.data(), case=st.sampled_from(["uniform-8", "diffq-old-zip", "lsq-4"]))
@settings(max_examples=100)
def test_damaged_files(data, case, tmp_path_factory):
    """A file that is cut short or has other bytes loads, or is refused with the model unchanged."""
    content = bytearray((FOLDER / f"{case}.th").read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x.th"
    path.write_bytes(content)
    model = build(case)
    before = all_bits(model)
    try:
        load_legacy(path, model)
    except DiffqError:
        assert all_bits(model) == before


def _replace(*path):
    """A change of one value of a state."""
    *keys, value = path

    def _change(state):
        for key in keys[:-1]:
            if isinstance(state[key], tuple):
                state[key] = list(state[key])
            state = state[key]
        state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return _change


DAMAGE = {
    "no list": ("uniform-8", _replace("quantized", 3)),
    "others is no list": ("uniform-8", _replace("others", {"a": 1})),
    "both raw lists": ("uniform-8", _replace("float16", [torch.zeros(3).half()])),
    "meta is no dict": ("uniform-8", _replace("meta", [])),
    "unknown class": ("uniform-8", _replace("meta", "klass", lambda _: dict)),
    "other class": ("uniform-8", _replace("meta", "klass", lambda _: stand_in("LSQ"))),
    "init_kwargs is no dict": ("uniform-8", _replace("meta", "init_kwargs", 3)),
    "bits beyond": ("uniform-8", _replace("meta", "init_kwargs", "bits", 16)),
    "bits not whole": ("uniform-8", _replace("meta", "init_kwargs", "bits", 7.5)),
    "min_size text": ("uniform-8", _replace("meta", "init_kwargs", "min_size", "0")),
    "min_size NaN": ("uniform-8", _replace("meta", "init_kwargs", "min_size", float("nan"))),
    "exclude text": ("uniform-8", _replace("meta", "init_kwargs", "exclude", "head")),
    "detect_bound": ("uniform-8", _replace("meta", "init_kwargs", "detect_bound", "no")),
    "group_size": ("diffq-g8", _replace("meta", "init_kwargs", "group_size", -8)),
    "min_bits": ("diffq-g8", _replace("meta", "init_kwargs", "min_bits", 0)),
    "min_bits shifts": ("diffq-g8", _replace("meta", "init_kwargs", "min_bits", 3)),
    "min_bits too high": ("diffq-g8", _replace("meta", "init_kwargs", "min_bits", 14)),
    "entry is no tuple": ("uniform-8", _replace("quantized", 0, torch.zeros(3))),
    "entry is short": ("uniform-8", _replace("quantized", 0, (torch.zeros(3),))),
    "range is short": ("uniform-8", _replace("quantized", 0, 1, [1.0])),
    "range is reversed": ("uniform-8", _replace("quantized", 0, 1, [1.0, 0.0])),
    "range is infinite": ("uniform-8", _replace("quantized", 0, 1, [0.0, float("inf")])),
    "range is NaN": ("uniform-8", _replace("quantized", 0, 1, [float("nan"), 1.0])),
    "range overflows": ("uniform-8", _replace("quantized", 0, 1, [-3e38, 3e38])),
    "range beyond float32": ("uniform-8", _replace("quantized", 0, 1, [-1e300, 0.0])),
    "range is text": ("uniform-8", _replace("quantized", 0, 1, ["0", "1"])),
    "fewer planes": ("uniform-8", _replace("quantized", 0, 0, lambda words: words[:, 1:].clone())),
    "other words": ("uniform-8", _replace("quantized", 0, 0, lambda words: words.int())),
    "fewer words": ("uniform-8", _replace("quantized", 0, 0, lambda words: words[..., 1:].clone())),
    "more lines": ("uniform-8", _replace("quantized", 0, 0, lambda words: words.repeat(2, 1, 1))),
    "flat words": ("uniform-8", _replace("quantized", 0, 0, lambda words: words.flatten())),
    "no words": ("uniform-8", _replace("quantized", 0, 0, None)),
    "expanded words": (
        "uniform-8",
        _replace("quantized", 0, 0, torch.ones(1).long().expand(1, 8, 32)),
    ),
    "other packing": ("uniform-8", _replace("meta", "torch_pack", True)),
    "said unpacked": ("uniform-8", _replace("meta", "packed", False)),
    "said packed": ("uniform-3-unpacked", _replace("meta", "packed", True)),
    "level too high": ("uniform-3-unpacked", _replace("quantized", 0, 0, lambda x: x + 8)),
    "level negative": ("uniform-15-unpacked", _replace("quantized", 0, 0, lambda x: -x - 1)),
    "float levels": ("uniform-3-unpacked", _replace("quantized", 0, 0, lambda x: x.float())),
    "no stream": ("diffq-g8", _replace("quantized", 0, 0, 1, None)),
    "stream too much": ("diffq-g8", _replace("quantized", 0, 0, 6, torch.zeros(1, 7, 32).long())),
    "stream twice": ("diffq-g8", _replace("quantized", 0, 0, 6, torch.zeros(1, 2, 32).long())),
    "streams are no list": ("diffq-g8", _replace("quantized", 0, 0, torch.zeros(3))),
    "flat stream": ("diffq-g8", _replace("quantized", 0, 0, 1, torch.zeros(64).long())),
    "bit map too short": ("diffq-g8", _replace("quantized", 0, 2, torch.zeros(0, 2, 32).long())),
    "bit map flat": ("diffq-g8", _replace("quantized", 0, 2, torch.zeros(64).long())),
    "bit map is wide": ("diffq-g8", _replace("quantized", 0, 2, torch.zeros(1, 16, 32).long())),
    "bits of zero": ("diffq-g8-unpacked", _replace("quantized", 0, 2, lambda x: x * 0)),
    "bits of 16": ("diffq-g8-unpacked", _replace("quantized", 0, 2, lambda x: x * 0 + 16)),
    "fewer bits": ("diffq-g8-unpacked", _replace("quantized", 0, 2, lambda x: x[1:].clone())),
    "flat levels": ("diffq-g8-unpacked", _replace("quantized", 0, 0, lambda x: x.flatten())),
    "level over bits": ("diffq-g8-unpacked", _replace("quantized", 0, 2, lambda x: x * 0 + 1)),
    "scale is NaN": ("lsq-4", _replace("quantized", 0, 1, torch.tensor(float("nan")))),
    "scale overflows": ("lsq-4", _replace("quantized", 0, 1, torch.tensor(3e38))),
    "two scales": ("lsq-4", _replace("quantized", 0, 1, torch.ones(2))),
    "index too high": ("lsq-4-unpacked", _replace("quantized", 0, 0, lambda x: x * 0 + 8)),
    "index too low": ("lsq-4-unpacked", _replace("quantized", 0, 0, lambda x: x * 0 - 9)),
    "raw is no tensor": ("uniform-8", _replace("others", 0, 3)),
    "raw is sparse": ("uniform-8", _replace("others", 0, lambda x: x.to_sparse())),
    "raw is expanded": ("uniform-8", _replace("others", 0, lambda x: x[:1].expand(x.shape))),
    "half is not": ("diffq-float16", _replace("float16", 0, lambda x: x.float())),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_states(what):
    """Each kind of damage is a StateError, and the model stays as it was."""
    case, change = DAMAGE[what]
    state = copy.deepcopy(read_file(FOLDER / f"{case}.th"))
    load_legacy(state, build(case))
    change(state)
    model = filled(case)
    before = all_bits(model)
    with pytest.raises(StateError):
        load_legacy(state, model)
    assert all_bits(model) == before


ARRAYS = {
    "no state": lambda array: None,
    "short": lambda array: array.state[:3],
    "other dtype": lambda array: (*array.state[:2], _Dtype("i8"), False, array.state[4]),
    "big-endian": lambda array: (*array.state[:2], _Dtype("u8", ">"), False, array.state[4]),
    "objects": lambda array: (*array.state[:2], _Dtype("O8"), False, [1]),
    "Fortran": lambda array: (*array.state[:3], True, array.state[4]),
    "shape": lambda array: (1, (1, -1, 32), *array.state[2:]),
    "shape text": lambda array: (1, ("1", 8, 32), *array.state[2:]),
    "huge shape": lambda array: (1, (2**40, 2**40, 32), *array.state[2:]),
    "no shape": lambda array: (1, 3, *array.state[2:]),
    "short data": lambda array: (*array.state[:4], array.state[4][1:]),
    "text data": lambda array: (*array.state[:4], "x"),
}


def _Dtype(code, order="<"):
    from diffq.storage.legacy.unpickle import StandInDtype

    dtype = StandInDtype(code, False, True)
    dtype.__setstate__((3, order, None, None, None, -1, -1, 0))
    return dtype


@pytest.mark.parametrize("what", ARRAYS)
def test_damaged_numpy_words(what, tmp_path):
    """NumPy arrays of other contents or contradicting pieces are refused."""
    words = pack_words(np.arange(80) % 256, 8)
    torch.save(state_of([(words, (0.0, 1.0))]), tmp_path / "x.th")
    state = read_file(tmp_path / "x.th")
    state["meta"] = meta_of("UniformQuantizer", "uint64")
    load_legacy(state, Holder({"w": torch.zeros(80)}))
    array = state["quantized"][0][0]
    array.state = ARRAYS[what](array)
    with pytest.raises(StateError):
        load_legacy(state, Holder({"w": torch.zeros(80)}))


@pytest.mark.parametrize("packing", ["int64", "int16"])
def test_levels_of_15_bits_that_were_lost(packing):
    """A packed state lacks the levels of groups of 15 bits; the error says so."""
    bits = np.array([15, 2, 15, 2], np.uint8)
    entry = diffq_entry(np.ones((4, 8), int), bits, (0.0, 1.0), packing, 2)
    state = state_of([entry], meta=meta_of("DiffQuantizer", packing, group_size=8))
    with pytest.raises(StateError, match=r"w has 2 groups of 15 bits.*packed=False"):
        load_legacy(state, Holder({"w": torch.zeros(32)}))


# --- Other models ---


MISMATCHES = {
    "fewer": lambda m: m.__delattr__("conv"),
    "more": lambda m: m.register_parameter("more", nn.Parameter(torch.zeros(99))),
    "more raw": lambda m: m.register_parameter("more", nn.Parameter(torch.zeros(9))),
    "shape": lambda m: m.__setattr__("conv", nn.Conv1d(6, 4, 3, bias=False)),
    "larger": lambda m: m.__setattr__("conv", nn.Conv1d(4, 8, 3, bias=False)),
    "smaller": lambda m: m.__setattr__("conv", nn.Conv1d(1, 70, 1, bias=False)),
    "raw shape": lambda m: m.__setattr__("norm", nn.BatchNorm1d(23)),
    "untied": lambda m: m.__setattr__("head", nn.Linear(8, 10)),
    "meta": lambda m: m.to("meta"),
    "complex": lambda m: m.norm.register_parameter(
        "weight", nn.Parameter(torch.zeros(24, dtype=torch.complex64))
    ),
    "integers": lambda m: m.conv.register_parameter(
        "weight", nn.Parameter(torch.zeros(6, 4, 3, dtype=torch.int32), requires_grad=False)
    ),
    "lazy": lambda m: m.__setattr__("norm", nn.LazyBatchNorm1d()),
    "quantizer": lambda m: diffq.QATQuantizer(m, min_size=MIN_SIZE),
}


#: Unpacked DiffQ levels have a number but no shape, packed levels neither, up to their padding.
UNSEEN = {("shape", "diffq-g8"), ("shape", "diffq-g8-unpacked"), ("shape", "uniform-8")} | {
    ("larger", "diffq-g8"),
    ("larger", "uniform-8"),
}


@pytest.mark.parametrize("case", ["uniform-8", "lsq-4-unpacked", "diffq-g8", "diffq-g8-unpacked"])
@pytest.mark.parametrize("what", MISMATCHES)
def test_other_models(what, case):
    """A state of another model is a MismatchError, and nothing is changed."""
    if (what, case) in UNSEEN:
        pytest.skip("such states do not hold the shape")
    model = filled(case)
    MISMATCHES[what](model)
    before = {} if what in ("meta", "lazy") else all_bits(model)
    with pytest.raises(MismatchError):
        load_legacy(FOLDER / f"{case}.th", model)
    assert before == ({} if what in ("meta", "lazy") else all_bits(model))


def test_groups_that_do_not_divide():
    """A packed DiffQ state for a model whose weights do not divide into groups is refused."""
    entry = diffq_entry(np.ones((4, 8), int), np.full(4, 2, np.uint8), (0.0, 1.0), "int64", 2)
    state = state_of([entry], meta=meta_of("DiffQuantizer", "int64", group_size=8))
    with pytest.raises(MismatchError, match="do not divide into groups of 8"):
        load_legacy(state, Holder({"w": torch.zeros(31)}))


def test_model_of_another_dtype():
    """A half-precision model gets the float32 values rounded to its dtype."""
    model = load_legacy(FOLDER / "diffq-g8.th", build("diffq-g8").half())
    expected = torch.from_numpy(EXPECTED["diffq-g8/conv.weight"]).half()
    assert same_bits(model.conv.weight, expected)


def test_parametrized_models():
    """A parametrized model loads by its original parameters, but cannot be converted."""
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False)))
    entries = [
        (torch.ones(p.shape, dtype=torch.uint8), (1.0, 2.0)) for _, p in model.named_parameters()
    ]
    state = state_of(entries, meta=meta_of("UniformQuantizer", bits=1))
    load_legacy(state, model)
    assert all((p == 2).all() for p in model.parameters())
    with pytest.raises(MismatchError, match="plain model"):
        legacy_snapshot(state, model)


# --- Command line ---


def _parse(*arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["convert", *arguments])


def _run(*arguments):
    args = _parse(*arguments)
    return args.run(args)


@pytest.fixture
def factory(monkeypatch, tmp_path):
    """The current directory has a module `zoo` with factories."""
    (tmp_path / "zoo.py").write_text(
        "from tests.legacy.make_golden import build\n"
        "class Zoo:\n"
        "    @staticmethod\n"
        "    def net(): return build('diffq-g8')\n"
        "def needs(x): return x\n"
        "def wrong(): return 3\n"
        "net = build('diffq-g8')\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "zoo:Zoo.net"
    sys.modules.pop("zoo", None)


def test_command(factory, tmp_path, capsys):
    """`diffq convert` writes a file that loads to the old file's values."""
    new, path = str(tmp_path / "new.diffq"), list(sys.path)
    assert _run(str(FOLDER / "diffq-g8.th"), new, "--model", factory) == 0
    assert sys.path == path
    printed = capsys.readouterr()
    assert "10 tensors, 3 of them quantized" in printed.out
    assert "norm.running_mean" in printed.err
    model = diffq.load(new, build("diffq-g8"))
    expected = torch.from_numpy(EXPECTED["diffq-g8/embed.weight"])
    assert torch.allclose(model.embed.weight, expected, atol=1e-6)
    diffq.verify(new)


def test_command_with_all_options(factory, tmp_path, capsys):
    """The options reach the reader, and --json prints one document."""
    state = read_file(FOLDER / "diffq-g8-unpacked.th")
    del state["meta"]
    torch.save({"state": state, "more": _Call(stand_in, ("x",))}, tmp_path / "old.th")
    arguments = [str(tmp_path / "old.th"), str(tmp_path / "new.diffq"), "--model", factory]
    arguments += ["--key", "state", "--set", f"min_size={MIN_SIZE}", "--codec", "packed", "--json"]
    with pytest.raises(StateError, match=rf"names '{__name__}.stand_in'"):
        _run(*arguments)
    assert not (tmp_path / "new.diffq").exists()
    assert _run(*arguments, "--stand-in", f"{__name__}.stand_in", "-q") == 0
    printed = capsys.readouterr()
    assert f'"bytes": {(tmp_path / "new.diffq").stat().st_size}' in printed.out
    assert printed.err == ""


def test_factories(factory):
    """What is no factory of a model is a ConfigError; a model itself is one."""
    assert isinstance(make_model("zoo:net"), nn.Module)
    for wrong in (
        "zoo",
        "zoo:",
        ":net",
        "zoo:missing",
        "missing_zoo:net",
        "zoo:needs",
        "zoo:wrong",
    ):
        with pytest.raises(ConfigError, match="--model"):
            make_model(wrong)


def test_settings_of_the_command(capsys):
    """--set takes JSON values."""
    base = ["a", "b", "--model", "c:d"]
    args = _parse(*base, "--set", "bits=4", "--set", 'exclude=["*.bias"]')
    assert dict(args.set) == {"bits": 4, "exclude": ["*.bias"]}
    for wrong in ("bits", "bits=", "bits=four"):
        with pytest.raises(SystemExit):
            _parse(*base, "--set", wrong)
        assert "JSON" in capsys.readouterr().err
