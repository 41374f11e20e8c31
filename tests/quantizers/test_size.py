"""Sizes: the differentiable one, Equation 12 to the bit, and the bytes of the packed state."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import diffq
from diffq.numerics.grid import BitsLaw
from diffq.numerics.size import MEGABYTE, MEGABYTE_BITS, BitsSize, Grouping, Sized, Sizes
from tests.holder import Holder, set_bits, weight_quantizers
from tests.models import ConvNet, Recurrent, TiedModules, TwoNames, computed_weight, encoder


def equation_12(bits, group_size, numel, min_bits):
    """Bits of one tensor, counted from the paper's formula weight by weight."""
    cost_of_group = max(math.ceil(math.log2(1 + b - min_bits)) for b in bits)
    total = 2 * 32 + 8
    for _ in bits:
        total += cost_of_group
    for weight in range(numel):
        total += int(bits[weight // group_size])
    return total


def _learned(numel, group_size, bits, min_bits=2):
    """A quantizer of one tensor with the given bitwidths, and its weight quantizer."""
    model = Holder({"weight": torch.arange(float(numel))})
    quantizer = diffq.DiffQuantizer(
        model, min_size=0, group_size=group_size, min_bits=min_bits, init_bits=15
    )
    quantizer.no_optimizer()
    weight = weight_quantizers(model)["weight"]
    set_bits(weight, bits)
    return quantizer, weight


def _read(quantizer):
    """Reads the weight as a training forward does: only then do bits get a gradient."""
    computed_weight(quantizer.model, "weight")


@st.composite
def hand_made_bits(draw):
    """(numel, group_size, min_bits, bitwidths) of one tensor, with short last groups."""
    group_size = draw(st.integers(1, 9))
    min_bits = draw(st.integers(1, 14))
    bits = draw(st.lists(st.integers(min_bits, 15), min_size=1, max_size=20))
    numel = len(bits) * group_size - draw(st.integers(0, group_size - 1))
    # A tensor of one weight is constant, and no group is larger than its tensor.
    assume(numel >= max(2, group_size))
    return numel, group_size, min_bits, bits


@pytest.mark.parametrize(
    ("bits", "group_size", "numel", "min_bits", "wanted"),
    [
        # Equal bits at b_min: C = 0, and nothing is spent on the map.
        ([2, 2, 2], 4, 12, 2, 72 + 0 + 24),
        # C = log2(1 + 1) = 1 bit for each of 3 groups.
        ([2, 3, 2], 4, 12, 2, 72 + 3 + 28),
        # C = log2(1 + 3) = 2 bits; the last group has one weight.
        ([2, 5, 4], 4, 9, 2, 72 + 6 + 8 + 20 + 4),
        # C = log2(1 + 4) = 2.3 bits: rounded up to 3.
        ([2, 6], 5, 10, 2, 72 + 6 + 40),
        # C = log2(1 + 13) = 3.8 bits: 4.
        ([15, 2], 8, 16, 2, 72 + 8 + 136),
        # Counted from b_min, whatever the smallest bitwidth in use.
        ([9, 9], 8, 16, 1, 72 + 8 + 144),
    ],
)
def test_true_size_of_hand_made_bits(bits, group_size, numel, min_bits, wanted):
    """true_model_size is Equation 12 on bitwidths that were counted by hand."""
    quantizer, _ = _learned(numel, group_size, bits, min_bits)
    assert equation_12(bits, group_size, numel, min_bits) == wanted
    assert quantizer.true_model_size() == wanted / 8 / 2**20


@given(hand_made_bits())
def test_true_size_is_equation_12(case):
    """true_model_size is, to the bit, an independent count of Equation 12."""
    numel, group_size, min_bits, bits = case
    quantizer, _ = _learned(numel, group_size, bits, min_bits)
    assert quantizer.bits()["weight"].tolist() == bits
    count = equation_12(bits, group_size, numel, min_bits)
    assert quantizer.true_model_size() * MEGABYTE_BITS == count


@given(hand_made_bits())
def test_sizes_agree_at_whole_bitwidths(case):
    """model_size equals true_model_size where the real bitwidths are whole."""
    numel, group_size, min_bits, bits = case
    quantizer, _ = _learned(numel, group_size, bits, min_bits)
    assert quantizer.model_size().item() == pytest.approx(quantizer.true_model_size(), rel=1e-5)


@pytest.mark.parametrize("make", [diffq.QATQuantizer, diffq.LSQQuantizer])
def test_fixed_sizes_agree(make):
    """Where no bitwidth is learned, model_size is true_model_size, without gradient."""
    model = nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7, affine=False))
    quantizer = make(model, min_size=0, bits=3)
    size = quantizer.model_size()
    assert not size.requires_grad
    assert size.item() == pytest.approx(quantizer.true_model_size(), rel=1e-6)


def test_model_size_is_a_scalar():
    """model_size is a 0-dim float32 tensor that carries a gradient to the logits."""
    quantizer, weight = _learned(20, 4, [3, 4, 5, 6, 7])
    _read(quantizer)
    size = quantizer.model_size()
    assert (size.shape, size.dtype) == (torch.Size([]), torch.float32)
    assert weight.gradient_of(size).all()


def test_gradient_of_the_size_is_that_of_equation_11():
    """d size / d logit is the group's weights times Equation 11's derivative, in MB."""
    quantizer, weight = _learned(22, 4, [2] * 6)
    with torch.no_grad():
        weight.logits.copy_(torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0, 4.0]))
    _read(quantizer)
    found = weight.gradient_of(quantizer.model_size())
    for logit, gradient, weights in zip(
        weight.logits.tolist(), found.tolist(), [4, 4, 4, 4, 4, 2], strict=True
    ):
        share = 1 / (1 + math.exp(-logit))
        wanted = weights * share * (1 - share) * (15 - 2) / 8 / 2**20
        assert gradient == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "rounding"])
def test_gradient_of_the_size_against_finite_differences(kind):
    """model_size moves with a logit as its gradient says, for each kind of noise."""
    model = Holder({"weight": torch.randn(22)})
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=4, noise=kind)
    quantizer.no_optimizer()
    weight = weight_quantizers(model)["weight"]
    set_bits(weight, [3, 4, 5, 6, 7, 8])
    _read(quantizer)
    found = weight.gradient_of(quantizer.model_size())

    def real_size(group, change):
        # Of the real bitwidths: rounding is straight through, and so has this gradient.
        logits = weight.logits.double()
        logits[group] += change
        bits = 2 + 13 * torch.sigmoid(logits)
        counts = torch.tensor([4, 4, 4, 4, 4, 2]).double()
        return float((bits * counts).sum()) / MEGABYTE_BITS

    for group in range(6):
        slope = (real_size(group, 1e-4) - real_size(group, -1e-4)) / 2e-4
        assert found[group].item() == pytest.approx(slope, rel=1e-4)


@given(st.lists(hand_made_bits(), min_size=1, max_size=4), st.booleans())
def test_gradient_of_equation_8_counts_weights(cases, last_unused):
    """d size / d logit is db/dl times the weights of the group; the bit map adds nothing.

    Together with other tensors it is the same, and one without noise gets zeros.
    """
    law = BitsLaw(1, 15)
    groupings = [Grouping(law, group_size, numel) for numel, group_size, _, _ in cases]
    logits = [torch.linspace(-2, 2, g.groups, dtype=torch.float64) for g in groupings]
    flat, tensors, start = torch.cat(logits).requires_grad_(), [], 0
    for grouping in groupings:
        tensors.append(Sized(grouping, start))
        start += grouping.groups
    active = [True] * len(tensors)
    active[-1] = not last_unused
    (found,) = torch.autograd.grad(BitsSize(Sizes(tensors), active).bits(flat), flat)
    assert found.shape == flat.shape
    for part, grouping, on, gradient in zip(
        logits, groupings, active, found.split([len(part) for part in logits]), strict=True
    ):
        starts = range(0, grouping.numel, grouping.group_size)
        counts = [min(grouping.group_size, grouping.numel - start) for start in starts]
        slope = torch.func.grad(lambda part: law.bits(part).sum())(part)
        torch.testing.assert_close(gradient, torch.tensor(counts) * slope * on)


@pytest.mark.parametrize(
    ("largest", "width"), [(2.0, 0), (2.4, 0), (2.6, 1), (3.4, 1), (3.6, 2), (5.6, 3), (15.0, 4)]
)
def test_bit_map_is_that_of_rounded_bits(largest, width):
    """The map in the differentiable size is as wide as evaluation's, at real bitwidths too."""
    _, weight = _learned(12, 4, [2.0, largest, 2.0])
    size = BitsSize(Sizes([Sized(weight.grouping, 0)]), [True]).bits(weight.logits)
    assert size.item() == pytest.approx(4 * (4 + largest) + 3 * width + 72)


def test_rounding_pays_for_whole_bits():
    """With noise="rounding", the size in training is that of the rounded bitwidths."""
    model = Holder({"weight": torch.randn(12)})
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=4, noise="rounding")
    with torch.no_grad():
        weight_quantizers(model)["weight"].logits.copy_(torch.tensor([-1.3, 0.2, 0.9]))
    assert quantizer.model_size().item() == pytest.approx(quantizer.true_model_size(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, -3.25])
def test_constant_tensors_cost_their_range(value):
    """A constant tensor has neither levels nor a bit map: 72 bits, in size and in state."""
    model = Holder({"weight": torch.full((100,), value)})
    quantizer = diffq.DiffQuantizer(model, min_size=0)
    assert quantizer.true_model_size() * MEGABYTE_BITS == 72
    assert _tensor_bytes(quantizer.get_quantized_state()) == 8


def test_other_tensors_count_at_their_stored_width():
    """Raw parameters count at their dtype, persistent buffers too, other buffers not at all."""
    model = Holder(
        {"weight": torch.randn(64), "bias": torch.zeros(5), "wide": torch.zeros(3).double()},
        {
            "count": torch.tensor(7),
            "mask": torch.ones(11, dtype=torch.bool),
            "empty": torch.empty(0, 4),
            "wave": torch.zeros(2, dtype=torch.complex64),
        },
    )
    model.register_buffer("scratch", torch.zeros(1000), persistent=False)
    quantizer = diffq.QATQuantizer(model, min_size=0, bits=3, include=["weight"])
    raw = 5 * 32 + 3 * 64 + 64 + 11 * 8 + 2 * 64
    assert quantizer.true_model_size() * MEGABYTE_BITS == 72 + 64 * 3 + raw


def test_float16_halves_the_other_parameters():
    """With float16, parameters that stay raw count 16 bits a weight, buffers as they are."""
    model = Holder(
        {
            "weight": torch.randn(64),
            "bias": torch.zeros(5),
            "wide": torch.zeros(3).double(),
            "brain": torch.zeros(7).bfloat16(),
        },
        {"mean": torch.zeros(4)},
    )
    quantizer = diffq.QATQuantizer(model, min_size=0, bits=3, include=["weight"], float16=True)
    raw = 5 * 16 + 3 * 16 + 7 * 16 + 4 * 32
    assert quantizer.true_model_size() * MEGABYTE_BITS == 72 + 64 * 3 + raw
    assert quantizer.model_size().item() == pytest.approx(quantizer.true_model_size())


@pytest.mark.parametrize(("make", "name"), [(TiedModules, "embed.weight"), (TwoNames, "one")])
def test_tied_tensors_count_once(make, name):
    """A tensor under several names is paid for once."""
    model = make()
    quantizer = diffq.QATQuantizer(model, min_size=0, bits=4)
    unique = {id(p): p.numel() for p in model.parameters()}
    assert len(unique) == len(quantizer.bits())
    count = sum(72 + 4 * numel for numel in unique.values())
    assert quantizer.true_model_size() * MEGABYTE_BITS == count
    assert name in quantizer.bits()


def test_channel_ranges_are_paid_for():
    """With per_channel, each channel has a range of 64 bits; vectors keep one."""
    model = Holder({"weight": torch.randn(6, 5), "bias": torch.randn(6)})
    quantizer = diffq.QATQuantizer(model, min_size=0, bits=4, per_channel=True)
    wanted = (6 * 64 + 8 + 30 * 4) + (64 + 8 + 6 * 4)
    assert quantizer.true_model_size() * MEGABYTE_BITS == wanted
    assert quantizer.model_size().item() == pytest.approx(quantizer.true_model_size())


def test_lsq_stores_a_scale():
    """LSQ has 32 bits of scale instead of a range."""
    model = Holder({"weight": torch.randn(6, 5)})
    quantizer = diffq.LSQQuantizer(model, min_size=0, bits=4)
    assert quantizer.true_model_size() * MEGABYTE_BITS == 32 + 8 + 30 * 4


def _tensor_bytes(state):
    entries = state["tensors"].values()
    tensors = [value for entry in entries for value in entry.values()]
    return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def _convolutional():
    layers = []
    for inputs, outputs in ((3, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))


def _language_model():
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    return nn.Sequential(
        nn.Embedding(256, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 256, bias=False)
    )


def _recurrent():
    return nn.LSTM(64, 96, num_layers=2, bidirectional=True)


def _realistic(make):
    model = make()
    if make is _convolutional:
        model(torch.randn(1, 3, 16, 16))
    return model


@pytest.mark.parametrize("make", [_convolutional, _language_model, _recurrent])
@pytest.mark.parametrize("group_size", [1, 3, 8, None])
@pytest.mark.parametrize("min_size", [0, 0.01])
def test_packed_state_has_the_true_size(make, group_size, min_size):
    """The packed state's tensors take true_model_size, up to 1% and 1 kB of byte padding."""
    model = _realistic(make)
    quantizer = diffq.DiffQuantizer(model, group_size=group_size, min_size=min_size, min_bits=1)
    with torch.no_grad():
        for weight in weight_quantizers(model).values():
            weight.logits.normal_(std=3)
    counted = quantizer.true_model_size() * MEGABYTE
    stored = _tensor_bytes(quantizer.get_quantized_state())
    # The 8 bits that say how wide the bit map is are no tensor of the state.
    stored += len(weight_quantizers(model))
    assert counted - 1 <= stored <= counted + min(0.01 * counted, 1024)


@pytest.mark.parametrize(
    "make", [diffq.QATQuantizer, diffq.LSQQuantizer, diffq.DiffQuantizer], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("float16", [False, True])
def test_packed_state_of_fixed_bits_has_the_true_size(make, float16):
    """So do states of one bitwidth, with float16 for the rest and without."""
    model = _realistic(_convolutional)
    quantizer = make(model, bits=3, float16=float16)
    counted = quantizer.true_model_size() * MEGABYTE
    stored = _tensor_bytes(quantizer.get_quantized_state())
    assert abs(stored - counted) <= min(0.01 * counted, 1024)


@pytest.mark.parametrize(
    "make", [ConvNet, Recurrent, TiedModules, TwoNames, encoder], ids=lambda m: m.__name__
)
def test_true_size_of_whole_models(make):
    """true_model_size of a model is Equation 12 of each tensor plus its buffers."""
    model = make()
    plain = {id(p): p.numel() for p in model.parameters()}
    buffers = sum(8 * buffer.nbytes for buffer in model.buffers())
    # Biases and norms that start constant would store no levels.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    quantizer = diffq.DiffQuantizer(model, min_size=0, group_size=5)
    with torch.no_grad():
        for weight in weight_quantizers(model).values():
            weight.logits.normal_(std=2)
    count = buffers
    for name, bits in quantizer.bits().items():
        numel = weight_quantizers(model)[name].plan.numel
        count += equation_12(bits.tolist(), min(5, numel), numel, 2)
    assert len(plain) == len(quantizer.bits())
    assert quantizer.true_model_size() * MEGABYTE_BITS == count


def test_mean_bits_counts_weights():
    """mean_bits is the average over weights, not over groups or tensors."""
    quantizer, _ = _learned(9, 4, [3, 8, 15])
    assert quantizer.mean_bits() == pytest.approx((4 * 3 + 4 * 8 + 15) / 9)


def test_mean_bits_of_nothing():
    """Without a quantized tensor, the average bitwidth is NaN, and the size still adds up."""
    quantizer = diffq.QATQuantizer(Holder({"weight": torch.zeros(6)}), min_size=1)
    assert math.isnan(quantizer.mean_bits())
    assert quantizer.true_model_size() == 24 / MEGABYTE
    assert quantizer.model_size().item() == pytest.approx(24 / MEGABYTE)


@pytest.mark.parametrize("group_size", [1, 4])
def test_size_of_a_large_tensor_keeps_its_digits(group_size):
    """Millions of groups are summed to float32's precision, not worse."""
    model = Holder({"weight": torch.randn(3_000_001)})
    quantizer = diffq.DiffQuantizer(model, group_size=group_size)
    weight = weight_quantizers(model)["weight"]
    with torch.no_grad():
        weight.logits.normal_(std=3)
    bits = weight.bits(weight.weight, weight.logits).double()
    last = 3_000_001 - (weight.groups - 1) * group_size
    levels = float(bits[:-1].sum()) * group_size + float(bits[-1]) * last
    wanted = levels + 4 * weight.groups + 72
    assert quantizer.model_size().item() * MEGABYTE_BITS == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("missing", [0, 3])
def test_second_derivatives(missing):
    """With create_graph=True, the size's gradient has the gradient that autograd finds."""
    law, logits = BitsLaw(2, 15), torch.randn(5, dtype=torch.float64, requires_grad=True)
    grouping = Grouping(law, 4, 20 - missing)

    def _bits(logits):
        return (law.bits(logits) * torch.tensor([4, 4, 4, 4, 4 - missing])).sum()

    size = BitsSize(Sizes([Sized(grouping, 0)]), [True]).bits(logits)
    (found,) = torch.autograd.grad(size, logits, create_graph=True)
    (second,) = torch.autograd.grad(found.sum(), logits)
    wanted = torch.autograd.functional.hessian(_bits, logits).sum(0)
    torch.testing.assert_close(second, wanted)
