"""Training on a GPU: every quantizer, dtypes, layouts, optimizers, checkpoints, files."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

import diffq
from tests.compare import close, same_bits
from tests.gpu import place
from tests.gpu.place import KINDS, LAYERS, OUTPUTS, Training, adam, cuda_only, sgd
from tests.holder import reloaded
from tests.models import MODELS, SUMS, ConvNet, computed, gradients, pairs, seeded, snapshot_of
from tests.processors import repeatable

pytestmark = pytest.mark.gpu

DEVICE = place.device()
DEVICES = list({DEVICE.type, "cpu"})


def _assert_files_hold_what_eval_computes(training, path):
    """A file and a state give plain models on every device the weights of eval, bit for bit."""
    diffq.save(training.quantizer, path)
    evaluated = computed(training.model.eval())
    state = reloaded(training.quantizer.get_quantized_state())
    for device in DEVICES:
        loaded = diffq.load(path, seeded(training.make, 1).to(device))
        restored = diffq.restore_quantized_state(seeded(training.make, 2).to(device), state)
        assert same_bits(computed(loaded), evaluated)
        assert same_bits(computed(restored), evaluated)


@pytest.mark.parametrize(("kind", "name"), pairs(KINDS, MODELS))
def test_train_evaluate_save_load(kind, name, tmp_path):
    """Training moves the weights. The file holds those of eval, and is as large as said."""
    training = Training(name, kind)
    before = snapshot_of(training.model)
    training.steps(3)
    after = snapshot_of(training.model)
    assert all(value.isfinite().all() for value in after.values())
    assert not same_bits(after, before)
    path = tmp_path / "model.diffq"
    _assert_files_hold_what_eval_computes(training, path)
    assert training.quantizer.compressed_model_size() * 2**20 == path.stat().st_size
    loaded = diffq.load(path, seeded(training.make, 1)).eval()
    with torch.no_grad():
        outputs = [model(training.inputs) for model in (loaded, training.model)]
    assert close(*outputs, OUTPUTS)


@cuda_only
@pytest.mark.parametrize(("kind", "name"), pairs(KINDS, LAYERS))
def test_no_synchronisation(kind, name):
    """After the first steps, none waits for the device: forward, size, backward and optimizer."""
    training = Training(name, kind).steps(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.steps(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "name"), pairs(KINDS, LAYERS))
def test_autocast(kind, name, dtype):
    """Under autocast, with a scaled loss and clipped gradients, weights learn and stay finite."""
    training = Training(name, kind)
    model, optimizer = training.model, training.optimizer
    before = snapshot_of(model)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256, enabled=dtype == torch.float16)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype):
            loss = model(training.inputs).square().mean() + training.quantizer.model_size()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert loss.isfinite()
    after = snapshot_of(model)
    assert all(value.isfinite().all() for value in after.values())
    assert not same_bits(after, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_weights(kind, dtype, tmp_path):
    """Weights of half types train, and files hold them bit for bit."""
    training = Training("encoder", kind, dtype, optimizer=sgd).steps(2)
    assert all(value.isfinite().all() for value in snapshot_of(training.model).values())
    _assert_files_hold_what_eval_computes(training, tmp_path / "model.diffq")


class Mixed(nn.Module):
    """Layers of four dtypes, and one whose weight is transposed in memory."""

    def __init__(self):
        super().__init__()
        dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
        self.layers = nn.ModuleList(nn.Linear(64, 64, dtype=dtype) for dtype in dtypes)
        transposed = self.layers[0].weight.detach().t().contiguous().t()
        self.layers[0].weight = nn.Parameter(transposed)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.bias.dtype)).tanh()
        return x


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "qat", "lsq"])
def test_several_dtypes_and_group_sizes(kind, tmp_path):
    """Tensors of any dtypes, memory layouts and sizes of groups train together, and all learn."""
    sizes = {"layers.1.weight": 1, "layers.2.weight": 12, "layers.3.weight": None, "*.bias": 2000}
    overrides = {pattern: {"group_size": size} for pattern, size in sizes.items()}
    options = {"overrides": overrides} if kind.startswith("diffq") else {}
    mixed = Mixed, lambda: torch.randn(4, 64)
    training = Training(mixed, kind, dtype=None, optimizer=sgd, **options)
    found = training.gradients()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
    _assert_files_hold_what_eval_computes(training, tmp_path / "model.diffq")


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=str
)
def test_implementations_of_adam(options):
    """Each implementation of Adam takes what is learned, and moves it as the plain loop does."""
    if "capturable" in options and DEVICE.type == "cpu":
        pytest.skip("CUDA alone has this")
    kinds = [partial(adam, **each) for each in ({"foreach": False}, options)]
    plain, other = (Training("mlp", "diffq-rounding", optimizer=kind) for kind in kinds)
    for training in (plain, other):
        training.step()
    assert close(snapshot_of(other.model), snapshot_of(plain.model), SUMS)


def test_channels_last(tmp_path):
    """Convolutions in channels_last are quantized as contiguous ones, and train alike."""
    _, make_input = MODELS["conv"]
    last = {"memory_format": torch.channels_last}
    pair = lambda: ConvNet().to(**last), lambda: make_input().contiguous(**last)
    plain, other = (Training(each, "qat", optimizer=sgd) for each in ("conv", pair))
    found = [training.gradients() for training in (plain, other)]
    assert close(*found, SUMS)
    _assert_files_hold_what_eval_computes(other, tmp_path / "model.diffq")


def test_attach_then_move(tmp_path):
    """A model that is attached on a CPU trains where it is moved, and evaluates on its return."""
    there = Training("mlp", "diffq-rounding", optimizer=sgd)
    model = seeded(MODELS["mlp"][0])
    quantizer = KINDS["diffq-rounding"](model)
    model.to(DEVICE)
    optimizer = sgd(model.parameters())
    quantizer.setup_optimizer(optimizer, lr=0.1)
    loss = model(there.inputs).square().mean() + 0.1 * quantizer.model_size()
    loss.backward()
    assert close(gradients(model), there.gradients(), SUMS)
    optimizer.step()
    evaluated = computed(model.eval())
    assert same_bits(computed(model.cpu()), evaluated)


@pytest.mark.parametrize("kind", ["diffq-rounding", "lsq"])
def test_moved_parameters(kind):
    """A step reads parameters where they are, when something else has replaced their memory."""
    plain, moved = (Training("mlp", kind, optimizer=sgd).steps(1) for _ in range(2))
    before = [parameter.data for parameter in moved.model.parameters()]
    for parameter in moved.model.parameters():
        parameter.data = parameter.data.clone()
    for old in before:
        old.fill_(torch.nan)
    assert close(moved.gradients(), plain.gradients(), SUMS)


@pytest.mark.parametrize("kind", ["diffq", "qat", "lsq", "product"])
def test_a_copy(kind):
    """A deep copy of a training goes on by itself."""
    training = Training("mlp", kind, optimizer=sgd).steps(1)
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    kept = snapshot_of(training.model)
    loss = model(training.inputs).square().mean()
    loss.backward()
    optimizer.step()
    assert same_bits(snapshot_of(training.model), kept)
    assert not same_bits(snapshot_of(model), kept)
    assert diffq.quantizer_of(model) is not training.quantizer


@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding", "quant-noise", "lsq"])
@repeatable()
def test_resume(kind):
    """A training that is cut goes on from its checkpoint, bit for bit."""
    whole = Training("mlp", kind).steps(2)
    file = io.BytesIO()
    torch.save({"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()}, file)
    torch.manual_seed(7)
    whole.steps(2)
    file.seek(0)
    checkpoint = torch.load(file)
    resumed = Training("mlp", kind)
    resumed.model.load_state_dict(checkpoint["model"])
    resumed.optimizer.load_state_dict(checkpoint["optimizer"])
    torch.manual_seed(7)
    resumed.steps(2)
    assert same_bits(snapshot_of(resumed.model), snapshot_of(whole.model))


def test_activations(tmp_path):
    """Quantized activations and weights train together, and come back from a file."""
    model = seeded(MODELS["mlp"][0]).to(DEVICE)
    inputs = torch.randn(32, 16, device=DEVICE)
    activations = diffq.ActivationQuantizer(model)
    with activations.calibrate():
        model(inputs)
    quantizer = KINDS["diffq"](model)
    quantizer.no_optimizer()
    model(inputs).sum().backward()
    diffq.save(quantizer, tmp_path / "model.diffq")
    evaluated = computed(model.eval())
    fresh = seeded(MODELS["mlp"][0], 1).to(DEVICE)
    diffq.ActivationQuantizer(fresh)
    assert same_bits(computed(diffq.load(tmp_path / "model.diffq", fresh)), evaluated)
