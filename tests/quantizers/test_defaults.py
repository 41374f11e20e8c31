"""The default dtype and device of torch, which a program may set for its own tensors."""

import copy
from contextlib import contextmanager

import pytest
import torch

import diffq
from diffq.attach.plan import Rules
from diffq.ptq.budget import quantize_to_size
from diffq.ptq.state import Settings, quantize_state
from diffq.storage.state import to_state
from tests.models import QUANTIZERS, ConvNet, computed, seeded, snapshot_of, step
from tests.processors import repeatable

DTYPES = [torch.float16, torch.bfloat16, torch.float64]
INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

# In float32 on the CPU, whatever the defaults are later.
PLAIN = seeded(ConvNet)

KINDS = {
    **QUANTIZERS,
    "product-int8": lambda m: diffq.ProductQuantizer(
        m, min_size=0, block_size=1, codebook_size=4, centroids="int8", noise="exact"
    ),
    "product-clusters": lambda m: diffq.ProductQuantizer(
        m, min_size=0, block_size=1, codebook_size=4, picked="clusters", p=0.5
    ),
    "nothing": lambda m: diffq.QATQuantizer(m, min_size=0, exclude=["*.weight", "*.bias"]),
    "half": lambda m: diffq.QATQuantizer(m, min_size=0, exclude=["down.*"], float16=True),
}


@contextmanager
def _default(value):
    """A default dtype or device for a `with` block; None for torch's own."""
    if isinstance(value, torch.dtype):
        torch.set_default_dtype(value)
    elif value is not None:
        torch.set_default_device(value)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def _numbers(value):
    """A value with tensors as their dtype and bits, so that all can be compared."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        assert value.device.type == "cpu"
        return str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    return value


@repeatable()
def _history(kind, model, folder):
    """All that a quantizer makes in the life of a model."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    quantizer = KINDS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.5)
    made = {"attached": snapshot_of(model), "size": quantizer.model_size()}
    for _ in range(2):
        step(model, optimizer, INPUTS, quantizer)
    made["size with gradient"] = quantizer.model_size()
    if hasattr(quantizer, "quantize_stage"):
        quantizer.quantize_stage()
        step(model, optimizer, INPUTS, quantizer)
    if hasattr(quantizer, "freeze_bits"):
        quantizer.freeze_bits(rounding=True)
        step(model, optimizer, INPUTS, quantizer)
        made["frozen size"] = quantizer.model_size()
    model.load_state_dict(model.state_dict())
    made["eval"] = computed(model.eval())
    made["trained"] = snapshot_of(model)
    made["sizes"] = [quantizer.true_model_size(), quantizer.compressed_model_size()]
    made["bits"], made["mean"] = quantizer.bits(), repr(quantizer)
    made["state"] = quantizer.get_quantized_state()
    made["spelt out"] = quantizer.get_quantized_state(packed=False)
    diffq.save(quantizer, folder / "model.diffq")
    made["file"] = (folder / "model.diffq").read_bytes()
    made["loaded"] = diffq.load(folder / "model.diffq")
    plain = copy.deepcopy(PLAIN)
    diffq.restore_quantized_state(plain, made["state"])
    made["restored"] = snapshot_of(plain)
    return _numbers(made)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What each kind makes under torch's own defaults."""
    folder = tmp_path_factory.mktemp("expected")
    return {kind: _history(kind, copy.deepcopy(PLAIN), folder) for kind in KINDS}


@pytest.mark.filterwarnings("ignore::diffq.DiffqWarning")
@pytest.mark.parametrize("default", [*DTYPES, "meta"], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantizer_does_not_depend_on_defaults(kind, default, expected, tmp_path):
    """Learned parameters, buffers, sizes, states and files are those of the usual defaults."""
    model = copy.deepcopy(PLAIN)
    with _default(default):
        made = _history(kind, model, tmp_path)
    for part, right in expected[kind].items():
        assert made[part] == right, part


@pytest.mark.parametrize("observer", ["min-max", "histogram", "channel"])
@pytest.mark.parametrize("default", [*DTYPES, "meta"], ids=str)
@repeatable()
def test_activations_do_not_depend_on_defaults(observer, default):
    """Ranges of activations, and what they round to, are those of the usual defaults."""
    found = []
    for value in (None, default):
        model = copy.deepcopy(PLAIN).eval()
        with _default(value), torch.no_grad():
            torch.manual_seed(0)
            quantizer = diffq.ActivationQuantizer(model, observer=observer, p=0.5)
            assert all(bounds.dtype == torch.float32 for bounds in quantizer.ranges().values())
            with quantizer.calibrate():
                model(INPUTS)
            found.append(_numbers(quantizer.ranges()))
            model.train()(INPUTS)
    assert found[0] == found[1]


@pytest.mark.parametrize("default", [*DTYPES, "meta"], ids=str)
def test_compression_without_training_does_not_depend_on_defaults(default):
    """Nor do states that are quantized without a model, at one bitwidth or to a size."""
    state, found = snapshot_of(copy.deepcopy(PLAIN)), []
    for value in (None, default):
        with _default(value):
            settings = Settings(rules=Rules(min_size=0))
            small = quantize_to_size(state, 1500, settings).snapshot
            snapshots = [quantize_state(state, 4, settings), small]
            found.append([_numbers(to_state(snapshot)) for snapshot in snapshots])
    assert found[0] == found[1]


@pytest.mark.parametrize("default", [*DTYPES, "meta"], ids=str)
def test_layer_drop_does_not_depend_on_defaults(default):
    """The layers that a forward leaves out are the same."""
    drawn = []
    for value in (None, default):
        layers = diffq.LayerDrop([torch.nn.Identity() for _ in range(64)], 0.5)
        with _default(value):
            torch.manual_seed(0)
            drawn.append([list(layers._modules.values()).index(layer) for layer in layers])
    assert drawn[0] == drawn[1]


@pytest.mark.filterwarnings("ignore::diffq.DiffqWarning")
def test_sizes_beyond_float16():
    """A size that half precision cannot hold is right, and the type is documented."""
    with _default(torch.float16):
        model = torch.nn.Linear(2048, 512)
        size = diffq.QATQuantizer(model, min_size=10).model_size()
    assert size.dtype == torch.float32
    assert size.item() == pytest.approx(2 * (2048 * 512 + 512) / 2**20, rel=1e-6)
