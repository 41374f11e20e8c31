"""Weights that are exactly zero stay exactly zero: padding rows, pruned rows, masks."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import diffq
from diffq.attach.plan import Rules
from diffq.format.records import GridRecord
from diffq.ptq.budget import quantize_to_size
from diffq.ptq.state import Settings, quantize_state
from tests.compare import close, same_bits
from tests.holder import quantizers_in
from tests.models import computed, computed_weight, restored, seeded, snapshot_of, step
from tests.processors import repeatable

#: Every quantizer on a grid, with bitwidths of one, several and many groups.
GRIDS = {
    "gaussian": partial(diffq.DiffQuantizer, group_size=4),
    "uniform": partial(diffq.DiffQuantizer, group_size=5, noise="uniform"),
    "rounding": partial(diffq.DiffQuantizer, group_size=4, noise="rounding"),
    "whole": partial(diffq.DiffQuantizer, group_size=None),
    "fixed": partial(diffq.DiffQuantizer, bits=5),
    "fixed-rounding": partial(diffq.DiffQuantizer, bits=3, noise="rounding"),
    "qat": partial(diffq.QATQuantizer, bits=4),
    "qat-1": partial(diffq.QATQuantizer, bits=1),
    "qat-15": partial(diffq.QATQuantizer, bits=15),
    "qat-channel": partial(diffq.QATQuantizer, bits=3, per_channel=True),
    "qat-eval": partial(diffq.QATQuantizer, bits=4, training=False),
    "quant-noise": partial(diffq.QuantNoiseQuantizer, bits=4, p=0.5),
    "quant-noise-channel": partial(diffq.QuantNoiseQuantizer, bits=2, p=0.5, observer="channel"),
    "quant-noise-fit": partial(diffq.QuantNoiseQuantizer, bits=3, p=0.5, observer="histogram"),
    "quant-noise-all": partial(diffq.QuantNoiseQuantizer, bits=3, p=1, observer="histogram"),
}
product = partial(diffq.ProductQuantizer, block_size=4, codebook_size=8)
METHODS = GRIDS | {
    "lsq": partial(diffq.LSQQuantizer, bits=4),
    "product": partial(product, p=0.5),
    "product-exact": partial(product, p=1, noise="exact", centroids="int8"),
    "product-mean": partial(product, p=1, noise="mean", centroids="float32"),
}


class Padded(nn.Module):
    """An embedding whose row 3 is padding, and what pads give."""

    def __init__(self, kind=nn.Embedding, padding=3):
        super().__init__()
        self.table = kind(30, 16, padding_idx=padding)

    def forward(self, tokens):
        return self.table(tokens)


def tokens():
    """Some tokens, pads among them, in rows."""
    return torch.tensor([[1, 3, 5, 3], [3, 3, 3, 3], [29, 0, 3, 8]])


def attached(model, kind, **options):
    """The quantizer of all of a model's tensors, which may train without an optimizer."""
    quantizer = METHODS[kind](model, min_size=0, **options)
    quantizer.no_optimizer()
    return quantizer


def assert_files_equal(quantizer, make, path):
    """State and file give a plain model the weights that eval computes with."""
    model = quantizer.model.eval()
    diffq.save(quantizer, path)
    spelled = diffq.restore_quantized_state(make(), quantizer.get_quantized_state(packed=False))
    for plain in (restored(make, quantizer), diffq.load(path, make()), spelled):
        assert same_bits(computed(model), computed(plain))


# Padding rows


@pytest.mark.parametrize("kind", METHODS)
def test_padding_rows_stay_zero(kind, tmp_path):
    """Pads give exactly zero in each training forward, in eval, in states and in files."""
    model = seeded(Padded)
    quantizer = METHODS[kind](model, min_size=0)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer, lr=0.05)
    for _ in range(3):
        given = model(tokens())
        assert (given[tokens() == 3] == 0).all()
        # One of the two levels of one bit is zero, and the other as far away as the range.
        assert kind == "qat-1" or (given[tokens() != 3] != 0).any()
        step(model, optimizer, tokens(), quantizer)
    if kind in ("gaussian", "uniform", "whole"):
        quantizer.freeze_bits(rounding=kind == "uniform")
        assert (model(tokens())[tokens() == 3] == 0).all()
    assert (model.eval()(tokens())[tokens() == 3] == 0).all()
    assert_files_equal(quantizer, Padded, tmp_path / "model.diffq")
    assert (diffq.load(tmp_path / "model.diffq", Padded()).table.weight[3] == 0).all()
    assert (quantizer.detach(quantized=True).table.weight[3] == 0).all()


@pytest.mark.parametrize("kind", METHODS)
def test_bags_leave_pads_out(kind):
    """A padded EmbeddingBag, and pads that are summed by hand, give the sum without pads."""
    short, long = torch.tensor([[5, 6]]), torch.tensor([[5, 6] + [3] * 20])
    bag = seeded(partial(Padded, partial(nn.EmbeddingBag, mode="sum")))
    plain = seeded(Padded)
    for model in (bag, plain):
        attached(model, kind)
        model.eval()
    assert close(bag(short), bag(long))
    assert close(plain(short).sum(1), plain(long).sum(1))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_ranges_that_are_cut_at_zero(bits, sign, tmp_path):
    """Zeros stay where a fitted range gives up the few weights on one side of zero."""
    make = partial(nn.Linear, 8, 4, bias=False)
    for seed in range(30):
        model = seeded(make, seed)
        with torch.no_grad():
            model.weight.uniform_(0, 1).mul_(sign)
            model.weight[0, 0], model.weight[3] = -0.01 * sign, 0
        quantizer = diffq.QuantNoiseQuantizer(
            model, bits=bits, p=1, observer="histogram", min_size=0
        )
        quantizer.no_optimizer()
        assert (computed_weight(model, "weight")[3] == 0).all()
        assert (computed_weight(model.eval(), "weight")[3] == 0).all()
        assert_files_equal(quantizer, make, tmp_path / "model.diffq")


@pytest.mark.parametrize("kind", GRIDS)
def test_error_is_at_most_half_a_step(kind):
    """Weights move by half a step at most, those outside of a fitted range from its ends."""
    model = seeded(Padded)
    weight = model.table.weight.detach().clone()
    weight[7], weight[8] = weight.min() * 1.5, weight.max() * 1.2
    model.table.weight.data.copy_(weight)
    quantizer = attached(model, kind)
    record = quantizer.snapshot().records["table.weight"]
    bits = torch.from_numpy(record.bits).float()
    ends = torch.from_numpy(record.ranges).T.expand(2, len(bits))
    low, high = ends.repeat_interleave(record.group_size, 1)[:, : weight.numel()]
    steps = (high - low) / (2 ** bits.repeat_interleave(record.group_size)[: weight.numel()] - 1)
    wanted = weight.view(-1).clamp(low, high)
    error = (computed_weight(model.eval(), "table.weight").view(-1) - wanted).abs()
    assert record.zero_point
    assert (error <= 0.5 * steps * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("kind", ["gaussian", "qat", "lsq", "product"])
def test_tied_heads_have_the_padding_row(kind, tmp_path):
    """An embedding and a head with one weight have one zero row, in training, eval and file."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 30, bias=False)
            self.embed = nn.Embedding(30, 16, padding_idx=3)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model = seeded(Tied)
    quantizer = attached(model, kind)
    for _ in range(2):
        assert (model(tokens())[..., 3] == 0).all()
        model.eval()
    assert_files_equal(quantizer, Tied, tmp_path / "model.diffq")
    assert (diffq.load(tmp_path / "model.diffq", Tied()).head.weight[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", METHODS)
def test_dtypes(kind, dtype, tmp_path):
    """Zeros stay in every dtype of the weight."""
    make = partial(lambda dtype: seeded(Padded).to(dtype), dtype)
    model = make()
    quantizer = attached(model, kind)
    assert (model(tokens())[tokens() == 3] == 0).all()
    assert (model.eval()(tokens())[tokens() == 3] == 0).all()
    assert_files_equal(quantizer, make, tmp_path / "model.diffq")


# Pruned rows and masks


@pytest.mark.parametrize("kind", METHODS)
def test_pruned_rows_stay_zero(kind, tmp_path):
    """Rows of a Linear that were set to zero give the bias alone, in training, eval and file."""
    make = partial(nn.Linear, 16, 12)
    model = seeded(make)
    with torch.no_grad():
        model.weight[[0, 5, 11]] = 0
    quantizer = attached(model, kind, include=["weight"])
    for _ in range(2):
        assert close(model(torch.randn(4, 16))[:, 5], model.bias[5].expand(4))
        model.eval()
    assert_files_equal(quantizer, make, tmp_path / "model.diffq")
    weight = computed_weight(model, "weight")
    assert (weight[[0, 5, 11]] == 0).all()
    assert (weight != 0).any()


@pytest.mark.parametrize("kind", [*GRIDS, "lsq"])
def test_masks_that_training_applies_in_place(kind, tmp_path):
    """Masked weights are zero in eval at once, and in training from the next switch of mode."""
    make = partial(nn.Conv2d, 4, 8, 3, bias=False)
    model = seeded(make)
    mask = torch.rand(8, 4, 3, 3) < 0.5
    quantizer = attached(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    quantizer.setup_optimizer(optimizer)
    for epoch in range(2):
        for _ in range(2):
            assert epoch == 0 or (computed_weight(model, "weight")[~mask] == 0).all()
            step(model, optimizer, torch.randn(2, 4, 5, 5), quantizer)
            with torch.no_grad():
                model.weight.mul_(mask)
        model.eval()
        assert (computed_weight(model, "weight")[~mask] == 0).all()
        assert_files_equal(quantizer, make, tmp_path / "model.diffq")
        model.train()


@pytest.mark.parametrize("kind", METHODS)
def test_masks_that_eval_sees(kind):
    """A mask that is applied in eval mode shows in the next forward and export."""
    model = seeded(partial(nn.Linear, 16, 12, bias=False)).eval()
    quantizer = attached(model, kind)
    assert (computed_weight(model, "weight") != 0).any(1)[2]
    with torch.no_grad():
        model.weight[2] = 0
    assert (computed_weight(model, "weight")[2] == 0).all()
    assert (quantizer.snapshot().records["weight"].values()[2] == 0).all()


class Masked(nn.Module):
    """A mask of the user's own as a parametrization."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


@pytest.mark.parametrize("kind", [*GRIDS, "lsq"])
def test_masks_of_other_parametrizations(kind):
    """Zeros that another parametrization computes are kept too."""
    model = seeded(partial(nn.Linear, 16, 12))
    mask = torch.rand(12, 16) < 0.5
    parametrize.register_parametrization(model, "weight", Masked(mask))
    attached(model, kind)
    for _ in range(2):
        assert (computed_weight(model, "weight")[~mask] == 0).all()
        model.eval()


def test_channels_with_and_without_zeros(tmp_path):
    """Each channel's grid has a zero point where its range holds zero, and is plain elsewhere."""
    make = partial(nn.Conv2d, 3, 5, 3, bias=False)
    model = seeded(make)
    with torch.no_grad():
        model.weight[0, 1] = 0
        model.weight[1].abs_().add_(0.1)
        model.weight[2].abs_().neg_().sub_(0.1)
        model.weight[3] = 0
    plain = copy.deepcopy(model)
    with torch.no_grad():
        plain.weight[0, 1], plain.weight[3] = 0.01, 0.01
    quantizer = attached(model, "qat-channel")
    attached(plain, "qat-channel")
    weight = computed_weight(model.eval(), "weight")
    assert (weight[0, 1] == 0).all()
    assert (weight[3] == 0).all()
    assert same_bits(weight[1:3], computed_weight(plain.eval(), "weight")[1:3])
    assert_files_equal(quantizer, make, tmp_path / "model.diffq")


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.tensor([[0.0, 1e-45, -3e-45, 0.0]])])
@pytest.mark.parametrize("kind", GRIDS)
def test_tensors_of_zeros_and_of_the_smallest_numbers(kind, weight, tmp_path):
    """Where the step is zero, or nearly, zero stays zero."""
    make = partial(nn.Linear, 4, len(weight), bias=False)
    model = make()
    model.weight.data.copy_(weight)
    quantizer = attached(model, kind)
    for _ in range(2):
        assert (computed_weight(model, "weight")[weight == 0] == 0).all()
        model.eval()
    assert_files_equal(quantizer, make, tmp_path / "model.diffq")
    if not weight.any():
        # Readers of files without zero points read it too.
        assert not quantizer.snapshot().records["weight"].zero_point


@pytest.mark.parametrize("scale", [1e-45, -0.02, 0.0, 3.0])
def test_any_scale_keeps_zero(scale):
    """LSQ has a level at zero whatever its scale has become."""
    model = seeded(Padded)
    with torch.no_grad():
        model.table.weight.mul_(1e-38 if abs(scale) < 1e-30 else 1)
    quantizer = attached(model, "lsq")
    quantizers_in(model)[0].scale.fill_(scale)
    assert (model(tokens())[tokens() == 3] == 0).all()
    assert (model.eval()(tokens())[tokens() == 3] == 0).all()
    assert (quantizer.snapshot().records["table.weight"].values()[3] == 0).all()


# When zeros are looked for


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", METHODS)
def test_loading_a_state(kind, plain):
    """After load_state_dict, plain or attached, training and eval see the zeros of the state."""
    source, model = seeded(Padded), Padded(padding=None)
    if not plain:
        attached(source, kind)
    attached(model, kind)
    model.load_state_dict(source.state_dict())
    for _ in range(2):
        assert (model(tokens())[tokens() == 3] == 0).all()
        model.eval()


def test_loading_a_part():
    """Loading a part of the model is enough."""
    model = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 4))
    attached(model, "gaussian")
    model[0].load_state_dict(seeded(Padded).table.state_dict())
    assert (computed_weight(model, "0.weight")[3] == 0).all()


class Starting(nn.Module):
    """Weights that start at zero and leave it, beside a padding row that stays."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 16, padding_idx=3)
        self.last = nn.Linear(16, 16)
        nn.init.zeros_(self.last.weight)

    def forward(self, tokens):
        return self.last(self.table(tokens)) + self.table(tokens)


@pytest.mark.parametrize("kind", METHODS)
@repeatable()
def test_resume(kind):
    """A resumed training equals the uninterrupted one bit for bit, whatever zeros went."""

    def run(steps, load=None):
        model = seeded(Starting, 0 if load is None else 5)
        quantizer = METHODS[kind](model, min_size=0)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        quantizer.setup_optimizer(optimizer, lr=0.3)
        if load is not None:
            model.load_state_dict(load["model"])
            optimizer.load_state_dict(load["optimizer"])
        for index in steps:
            torch.manual_seed(index)
            step(model.train(), optimizer, tokens(), quantizer)
        state = {"model": snapshot_of(model), "optimizer": copy.deepcopy(optimizer.state_dict())}
        return state, quantizer.get_quantized_state()

    whole = run(range(5))
    resumed = run(range(3, 5), run(range(3))[0])
    assert same_bits(whole[0]["model"], resumed[0]["model"])
    for name, entry in whole[1]["tensors"].items():
        assert same_bits(entry, resumed[1]["tensors"][name])


@pytest.mark.parametrize("kind", METHODS)
def test_copies(kind):
    """Deep copies and moving averages keep zeros in training and in eval."""
    model = seeded(Padded)
    attached(model, kind)
    average = AveragedModel(model)
    average.update_parameters(model)
    average.update_parameters(model)
    for copied in (copy.deepcopy(model), average.module):
        for _ in range(2):
            assert (copied(tokens())[tokens() == 3] == 0).all()
            copied.eval()
        record = diffq.quantizer_of(copied).snapshot().records["table.weight"]
        assert (record.values()[3] == 0).all()


@pytest.mark.parametrize("kind", METHODS)
def test_compiled(kind):
    """Compiled forwards keep zeros, and see those that came by the next switch of mode."""
    torch.compiler.reset()
    model = seeded(Padded)
    attached(model, kind)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        assert (compiled(tokens())[tokens() == 3] == 0).all()
        with torch.no_grad():
            model.table.weight[5] = 0
        model.eval()
    assert (compiled(tokens())[0, 2] == 0).all()


class Called(TorchDispatchMode):
    """The names of the operations that run, and of those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("padding", [None, 3])
def test_training_does_not_wait_for_the_device(kind, padding):
    """Training reads nothing back, and looks for zeros only where there may be some."""
    model = nn.Sequential(nn.Embedding(30, 16, padding_idx=padding))
    attached(model, kind)
    model(tokens()).sum().backward()
    with Called() as called:
        for _ in range(2):
            model.train()(tokens()).sum().backward()
    if not kind.startswith("product"):  # on a CPU, its search waits for nothing
        assert "_local_scalar_dense" not in called.names
    if padding is None:
        assert not {"eq", "any", "ne"} & set(called.names)


# Without zeros


@pytest.mark.parametrize("kind", GRIDS)
def test_tensors_without_zeros_keep_their_grid(kind):
    """Zeros of one tensor move no other tensor's grid, and none that have gone."""
    one, two = seeded(partial(nn.Linear, 8, 8)), seeded(partial(nn.Linear, 8, 8))
    gone = nn.Linear(8, 8)
    pairs = [nn.Sequential(one, seeded(Padded)), nn.Sequential(two)]
    for model in (*pairs, gone):
        attached(model, kind)
    gone.load_state_dict(seeded(partial(nn.Linear, 8, 8)).state_dict())
    for model in (*pairs, gone):
        model.eval()
    records = [diffq.quantizer_of(pair).snapshot().records["0.weight"] for pair in pairs]
    assert not records[0].zero_point
    weight = computed_weight(pairs[0], "0.weight")
    assert same_bits(weight, computed_weight(pairs[1], "0.weight"))
    assert same_bits(weight, computed_weight(gone, "weight"))
    low, high = records[0].ranges.T
    assert {low.min(), high.max()} <= {*records[1].ranges.reshape(-1)}


# Post-training quantization


@pytest.mark.parametrize("options", [{}, {"group_size": 5}, {"per_channel": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_post_training_quantization(options, dtype):
    """A state dict's zeros stay zero, at one bitwidth and at those that fill a size."""
    state = {"weight": seeded(lambda: torch.randn(40, 50)).to(dtype), "other": torch.randn(40, 50)}
    state["weight"][[3, 7]] = 0
    state["weight"][:, 9] = 0
    settings = Settings(rules=Rules(min_size=0), **options)
    fitted = quantize_to_size(state, 2600, settings)
    for snapshot in (
        *(quantize_state(state, bits, settings) for bits in (1, 4, 15)),
        fitted.snapshot,
    ):
        record = snapshot.records["weight"]
        assert isinstance(record, GridRecord)
        assert record.zero_point
        assert not snapshot.records["other"].zero_point
        values = torch.from_numpy(record.values())
        assert (values[state["weight"] == 0] == 0).all()
        assert (values != 0).any()
    assert sum(map(len, fitted.parts)) <= 2600


def test_post_training_quantization_is_that_of_qat():
    """quantize_state stores what QATQuantizer does, zero point and all."""
    model = seeded(Padded)
    (stored,) = quantize_state(
        model.state_dict(), 4, Settings(rules=Rules(min_size=0))
    ).records.values()
    attached(model, "qat")
    (wanted,) = diffq.quantizer_of(model).snapshot().records.values()
    assert stored.zero_point
    assert stored.values().tobytes() == wanted.values().tobytes()
