"""Files into plain models: whatever their tensors are, and all or nothing."""

import io
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffq
from diffq.cli import main
from tests.compare import same_bits
from tests.holder import Holder, all_bits, bits_of, blank
from tests.models import QUANTIZERS, ConvNet, TiedModules, computed_weight, mlp

CODECS = ["zstd", "rans", "packed"]


def _qat(model, **options):
    return diffq.QATQuantizer(model, min_size=0, **options)


def _saved(model, path, **options):
    """The file of a model that is quantized with QAT."""
    diffq.save(_qat(model, **options), path)
    return path


def _trip(path, make, **options):
    """What a model's QAT weights are, and a blank copy that the file was loaded into."""
    model = make()
    target = blank(model)
    quantizer = _qat(model, **options)
    diffq.save(quantizer, path)
    return all_bits(quantizer.detach(quantized=True)), diffq.load(path, target)


def _refused(path, model, *words, error=diffq.MismatchError, **options):
    """Checks that a load is refused with these words, and changes no bit of the model."""
    before = all_bits(model)
    with pytest.raises(error) as caught:
        diffq.load(path, model, **options)
    assert all_bits(model) == before
    for word in words:
        assert word in str(caught.value)


# --- Into other tensors ---


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, codec, tmp_path):
    """Models of half, bfloat16 and float64 come back bit for bit, in their dtype."""
    model = ConvNet().to(dtype)
    target = blank(model)
    quantizer = _qat(model, exclude=["norm.*", "head.bias"])
    diffq.save(quantizer, tmp_path / "m.diffq", codec)
    diffq.load(tmp_path / "m.diffq", target)
    assert all_bits(target) == all_bits(quantizer.detach(quantized=True))
    assert target.down.weight.dtype == dtype


def test_float16_storage(tmp_path):
    """Parameters stored as float16 load into the float32 model that they came from."""
    expected, loaded = _trip(tmp_path / "m.diffq", ConvNet, float16=True, exclude=["*.bias"])
    assert all_bits(loaded) == expected
    assert loaded.down.bias.dtype == torch.float32


def test_channels_last(tmp_path):
    """A channels_last model is filled with the right values and stays channels_last."""
    make = lambda: ConvNet().to(memory_format=torch.channels_last)  # noqa: E731
    expected, loaded = _trip(tmp_path / "m.diffq", make)
    assert all_bits(loaded) == expected
    assert loaded.down.weight.is_contiguous(memory_format=torch.channels_last)


def test_not_contiguous(tmp_path):
    """Transposed and strided targets get their own values; what lies between them stays."""
    path = _saved(Holder({"a": torch.randn(6, 4), "b": torch.randn(5)}), tmp_path / "m.diffq")
    wide, between = torch.full((4, 6), 7.0), torch.full((10,), 7.0)
    target = Holder({"a": wide.t(), "b": between[::2]})
    diffq.load(path, target)
    expected = diffq.load(path)
    assert same_bits(target.a, expected["a"])
    assert same_bits(between[::2], expected["b"])
    assert (between[1::2] == 7).all()


def test_a_view_of_a_larger_tensor(tmp_path):
    """A contiguous target inside of a larger tensor is filled alone."""
    path = _saved(Holder({"a": torch.randn(3, 4)}), tmp_path / "m.diffq")
    whole = torch.full((20,), 7.0)
    diffq.load(path, Holder({"a": whole[4:16].view(3, 4)}))
    assert same_bits(whole[4:16].view(3, 4), diffq.load(path)["a"])
    assert (whole[:4] == 7).all()
    assert (whole[16:] == 7).all()


def test_buffers_come_back(tmp_path):
    """Buffers of every kind of dtype are loaded bit for bit, NaN included; others are not."""
    buffers = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "count": torch.tensor(-(2**60)),
        "mask": torch.tensor([[True], [False]]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "bytes": torch.randint(256, (70,), dtype=torch.uint8),
        "empty": torch.zeros(0, 3, dtype=torch.float16),
    }
    model = Holder({"w": torch.randn(8, 8)}, buffers)
    model.register_buffer("temporary", torch.randn(3), persistent=False)
    target = blank(model)
    kept = bits_of(target.temporary)
    diffq.load(_saved(model, tmp_path / "m.diffq"), target)
    assert {name: bits_of(getattr(target, name)) for name in buffers} == {
        name: bits_of(tensor) for name, tensor in buffers.items()
    }
    assert bits_of(target.temporary) == kept


def test_a_model_without_tensors(tmp_path):
    """A model without a tensor can be saved and loaded."""
    path = _saved(nn.ReLU(), tmp_path / "m.diffq")
    assert diffq.load(path) == {}
    assert isinstance(diffq.load(path, nn.ReLU()), nn.ReLU)


# --- Constant tensors and budgets ---


@pytest.mark.parametrize("value", [0.0, -1.5, 1.0])
@pytest.mark.parametrize("method", QUANTIZERS)
def test_constant_tensors(method, value, tmp_path):
    """Tensors of one value are loaded as the value that eval computes."""
    model = nn.Linear(16, 8)
    nn.init.constant_(model.weight, value)
    quantizer = QUANTIZERS[method](model)
    diffq.save(quantizer, tmp_path / "m.diffq")
    expected = bits_of(computed_weight(model.eval(), "weight"))
    assert bits_of(diffq.load(tmp_path / "m.diffq", nn.Linear(16, 8)).weight) == expected


def _zeros(name, **tensors):
    """Makers of a model with one large tensor that takes next to nothing in a file."""
    return pytest.param(lambda: Holder({"w": torch.zeros(8, 8)}, tensors), id=name)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Holder({"w": torch.zeros(3_000_000)}), id="levels"),
        # Two float32 for each weight besides the weight itself.
        pytest.param(lambda: Holder({"w": torch.zeros(3_000_000, 1)}), id="ranges"),
        _zeros("float64", b=torch.zeros(1_500_000, dtype=torch.float64)),
        _zeros("complex128", b=torch.zeros(1_500_000, dtype=torch.complex128)),
    ],
)
def test_a_large_constant_tensor(make, tmp_path):
    """A file that decodes to far more than its content is read without options, and stays small."""
    path = _saved(make(), tmp_path / "m.diffq", per_channel=True, bits=4)
    assert os.path.getsize(path) < 100_000
    diffq.verify(path)
    with diffq.open(path) as stored:
        assert list(stored) == list(make().state_dict())
    assert list(diffq.load(path)) == list(make().state_dict())
    target = make()
    assert diffq.load(path, target) is target


_FILLS = {
    "zeros": torch.zeros,
    "ones": torch.ones,
    "mask": lambda *shape: torch.ones(shape).tril(),
    "bools": lambda *shape: torch.ones(shape, dtype=torch.bool).tril(),
    "ramp": lambda *shape: torch.arange(shape[0] * shape[1]).reshape(shape),
    "random": torch.randn,
}


@settings(max_examples=10)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(_FILLS)), st.integers(1, 2000), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(CODECS),
)
def test_what_save_writes_is_read_without_options(tensors, codec):
    """Whatever buffers and weights a model has, its file needs no larger budget."""
    parameters, buffers = {}, {}
    for number, (fill, width, buffer) in enumerate(tensors):
        tensor = _FILLS[fill](width, 1000)
        into = buffers if buffer or not tensor.is_floating_point() else parameters
        into[f"t{number}"] = tensor
    model = Holder(parameters, buffers)
    names = set(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.diffq"
        diffq.save(_qat(model, bits=2), path, codec)
        diffq.verify(path)
        with diffq.open(path) as stored:
            assert set(stored) == names
        assert set(diffq.load(path)) == names
        with redirect_stdout(io.StringIO()):
            assert main(["inspect", str(path)]) == 0


def test_a_budget_besides_a_model(tmp_path):
    """With a model, its own size is allowed whatever the budget says."""
    path = _saved(mlp(), tmp_path / "m.diffq")
    diffq.load(path, mlp(), budget=1)
    with pytest.raises(diffq.FormatError, match="budget"):
        diffq.load(path, budget=1)


# --- Into the wrong model, and damaged files ---


def _lazy():
    return nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 8))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mlp()[:1], ["not in the model", "2.weight"]),
        (lambda: nn.Sequential(*mlp(), nn.Linear(8, 8)), ["not stored", "3.weight"]),
        (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 9)), ["2.bias", "[9]"]),
        (lambda: mlp().half(), ["float16", "float32"]),
        (lambda: nn.Sequential(*mlp()[:2], nn.Linear(32, 8).double()), ["2.weight", "float64"]),
        (TiedModules, ["not in the model"]),
        (nn.ReLU, ["not in the model"]),
    ],
    ids=["missing", "extra", "shape", "dtype", "last-dtype", "other", "empty"],
)
def test_wrong_models(make, words, tmp_path):
    """A model that the file does not fit is refused by name, and not changed."""
    _refused(_saved(mlp(), tmp_path / "m.diffq"), make(), *words)


def test_meta_models(tmp_path):
    """A model on the meta device is refused, for it could keep nothing."""
    path = _saved(mlp(), tmp_path / "m.diffq")
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(diffq.MismatchError, match="meta"):
        diffq.load(path, model)


def test_lazy_models(tmp_path):
    """A model with parameters that have no shape yet is refused with an error of diffq."""
    path = _saved(mlp(), tmp_path / "m.diffq")
    with pytest.raises(diffq.MismatchError, match=r"0\.weight"):
        diffq.load(path, _lazy())


@pytest.mark.parametrize("method", QUANTIZERS)
def test_attached_models(method, tmp_path):
    """A model that has a quantizer is refused: its weights are not the plain ones."""
    model = mlp()
    quantizer = QUANTIZERS[method](model)
    diffq.save(quantizer, tmp_path / "m.diffq")
    _refused(tmp_path / "m.diffq", model, "detach")


def test_ties_of_other_values(tmp_path):
    """A model that ties what the file stores with different values is refused."""
    model = TiedModules()
    model.head.weight = nn.Parameter(torch.randn(24, 16))
    _refused(_saved(model, tmp_path / "m.diffq"), TiedModules(), "Untie")


def test_targets_that_overlap(tmp_path):
    """A tensor that is expanded from fewer elements is refused before others are changed."""
    make = lambda: Holder({"a": torch.randn(8, 8)}, {"mask": torch.ones(1).expand(4, 4)})  # noqa: E731
    _refused(_saved(make(), tmp_path / "m.diffq"), make(), "mask", error=diffq.DiffqError)


def test_inference_tensors(tmp_path):
    """Tensors made in inference mode, which may not be written, are refused before any is."""
    path = _saved(mlp(), tmp_path / "m.diffq", exclude=["*.bias"])
    with torch.inference_mode():
        model = mlp()
    _refused(path, model, "0.weight", error=diffq.DiffqError)


@pytest.mark.parametrize("codec", CODECS)
def test_damaged_files(codec, tmp_path):
    """A byte flipped anywhere, or a file cut anywhere, is refused, and no model is changed."""
    quantizer = _qat(TiedModules())
    path = tmp_path / "m.diffq"
    diffq.save(quantizer, path, codec, {"a": 1})
    data = path.read_bytes()
    for place in {*range(0, len(data), 23), *range(len(data) - 40, len(data))}:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        for damaged in (flipped, data[:place]):
            path.write_bytes(damaged)
            _refused(path, TiedModules(), error=diffq.FormatError)
            with pytest.raises(diffq.FormatError):
                diffq.load(path)
    path.write_bytes(data + b"\0")
    _refused(path, TiedModules(), error=diffq.FormatError)


@pytest.mark.parametrize("seed", range(3))
def test_one_damaged_segment_of_many(seed, tmp_path):
    """Damage in the last tensor is found before the first, which is sound, is written."""
    model = Holder({f"p{i}": torch.randn(300, 300) for i in range(4)})
    path = _saved(model, tmp_path / "m.diffq", bits=8)
    data = bytearray(path.read_bytes())
    data[-20_000 + 7919 * seed // 3] ^= 64
    path.write_bytes(data)
    _refused(
        path,
        blank(Holder({f"p{i}": torch.randn(300, 300) for i in range(4)})),
        error=diffq.FormatError,
    )
