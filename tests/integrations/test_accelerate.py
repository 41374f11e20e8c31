"""Accelerate: prepared training, its checkpoints, and models that are offloaded."""

import pytest
import torch

from tests.compare import FEW, close, same_bits
from tests.integrations.tiny import (
    EXTRAS,
    KINDS,
    evaluates_as_shipped,
    floats,
    library,
    perturb,
    prepared,
    same_weights,
    shipped,
)
from tests.models import QUANTIZERS, ConvNet, TiedModules, seeded, snapshot_of, step, tokens
from tests.processors import repeatable

library("accelerate")
library("safetensors")
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from safetensors.torch import load_model  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps one state a process, and refuses another one."""
    yield
    reset()


def reset():
    """Forgets the accelerators that were made before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def training(make=TiedModules, kind="diffq", seed=0, **options):
    """A prepared model with its optimizer, and the accelerator and quantizer."""
    accelerator = Accelerator(cpu=True, **options)
    model = seeded(make, seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    quantizer = QUANTIZERS[kind](model)
    quantizer.setup_optimizer(optimizer, lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer, quantizer


def steps(count, accelerator, model, optimizer, quantizer, inputs):
    """Trains as the documentation of Accelerate does."""
    for _ in range(count):
        with accelerator.accumulate(model):
            loss = model(inputs).square().mean() + 100 * quantizer.model_size()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@repeatable()
@pytest.mark.parametrize("kind", KINDS)
def test_resume(kind, tmp_path):
    """`load_state` restores a tied model, what is learned, the optimizer and random numbers."""
    inputs = tokens()
    accelerator, *parts = training(kind=kind)
    steps(2, accelerator, *parts, inputs)
    accelerator.save_state(tmp_path)
    steps(2, accelerator, *parts, inputs)
    other, *others = training(kind=kind, seed=1)
    other.load_state(tmp_path)
    steps(2, other, *others, inputs)
    assert same_bits(snapshot_of(others[0]), snapshot_of(parts[0]))
    assert not close(floats(others[0]), floats(seeded(TiedModules)))


def test_load_state_into_the_same_model(tmp_path):
    """What eval computed before `load_state` is not what it computes afterwards."""
    inputs = tokens()
    accelerator, *parts = training()
    accelerator.save_state(tmp_path)
    before = snapshot_of(parts[0])
    steps(2, accelerator, *parts, inputs)
    assert evaluates_as_shipped(parts[0], TiedModules, inputs)
    accelerator.load_state(tmp_path)
    assert same_bits(snapshot_of(parts[0]), before)
    assert evaluates_as_shipped(parts[0], TiedModules, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_save_model(kind, tmp_path):
    """`save_model` writes the float weights under their plain names."""
    accelerator, model, optimizer, quantizer = training(kind=kind)
    steps(2, accelerator, model, optimizer, quantizer, tokens())
    accelerator.save_model(model, tmp_path)
    plain = seeded(TiedModules, 1)
    missing, unexpected = load_model(plain, tmp_path / "model.safetensors", strict=False)
    assert not missing
    assert set(unexpected) <= EXTRAS
    assert same_weights(plain, model)


def test_autocast():
    """Under bfloat16 the bits learn, and the unwrapped model evaluates as its file in float32."""
    accelerator, model, optimizer, quantizer = training(ConvNet, mixed_precision="bf16")
    x = torch.randn(4, 3, 8, 8)
    steps(4, accelerator, model, optimizer, quantizer, x)
    assert quantizer.mean_bits() < 8
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert all(tensor.dtype == torch.float32 for tensor in floats(unwrapped).values())
    assert evaluates_as_shipped(unwrapped, ConvNet, x)


@pytest.mark.parametrize("unwrap", [True, False])
@torch.no_grad()
def test_detached_after_autocast(unwrap):
    """Accelerate keeps a forward on the model itself, and a detached model computes as a plain one.

    Where it was not unwrapped, it goes on under bfloat16, whose digits the comparison allows for.
    """
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    attached = seeded(ConvNet)
    quantizer = QUANTIZERS["qat"](attached, bits=2)
    model, plain = (accelerator.prepare_model(each) for each in (attached, seeded(ConvNet)))
    x = torch.randn(4, 3, 8, 8)
    if unwrap:
        model, plain = (
            accelerator.unwrap_model(each, keep_fp32_wrapper=False) for each in (model, plain)
        )
    roundings = FEW if unwrap else 2**19
    assert not close(model.eval()(x), plain.eval()(x), roundings)
    quantizer.detach()
    assert close(model.eval()(x), plain(x), roundings)


def test_accumulation():
    """Two accumulated batches are one step, on the whole gradient."""
    x = torch.randn(8, 3, 8, 8)
    found = []
    for count in (1, 2):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=count)
        model = seeded(ConvNet).eval()  # the same statistics of BatchNorm for each batch
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        quantizer = QUANTIZERS["qat"](model)
        quantizer.setup_optimizer(optimizer)
        model, optimizer = accelerator.prepare(model, optimizer)
        for batch in x.chunk(count):
            steps(1, accelerator, model, optimizer, quantizer, batch)
        found.append(floats(model))
        reset()
    assert close(found[1], found[0])
    assert not close(found[0], floats(seeded(ConvNet)))


def on_cpu(model, folder):
    """Weights in a state dict on the CPU, meta tensors in the model."""
    cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model, folder):
    """Weights in files."""
    disk_offload(model, folder, execution_device=torch.device("cpu"))


def dispatched(model, folder):
    """Some modules in files, the others in memory."""
    places = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    places[next(iter(places))] = "disk"
    dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", [on_cpu, on_disk, dispatched])
@torch.no_grad()
def test_offload(offload, kind, tmp_path):
    """An attached model whose weights are elsewhere evaluates as without offload, each time."""
    model, quantizer = prepared(ConvNet, kind)
    perturb(model)
    x = torch.randn(4, 3, 8, 8)
    wanted = shipped(quantizer, ConvNet())(x)
    offload(model.eval(), str(tmp_path))
    assert any(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):
        assert close(model(x), wanted)


@torch.no_grad()
def test_offload_of_a_tied_model(tmp_path):
    """Tied weights are offloaded as one, and quantized as one."""
    model, quantizer = prepared(TiedModules)
    inputs = tokens()
    wanted = shipped(quantizer, TiedModules())(inputs)
    on_cpu(model.eval(), tmp_path)
    assert close(model(inputs), wanted)


def test_plain_loop_after_preparing():
    """A quantizer that is attached to the prepared model serves it too."""
    model = seeded(TiedModules)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    quantizer = QUANTIZERS["diffq"](model)
    quantizer.setup_optimizer(optimizer.optimizer, lr=0.1)
    inputs = tokens()
    for _ in range(2):
        step(model, optimizer, inputs, quantizer, lam=100)
    assert quantizer.mean_bits() < 8
    assert evaluates_as_shipped(model, TiedModules, inputs)
