"""What holds under DistributedDataParallel, checked on each of two ranks."""

from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import diffq
from tests.compare import close, same_bits
from tests.distributed.ranks import batches, file_of, main, same_on_ranks
from tests.models import QUANTIZERS, computed, mlp, restored, seeded


class PartlyUsed(nn.Module):
    """Uses its second layer when it is told to."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x, both=True):
        return self.always(x) + (self.sometimes(x) if both else 0)


class Checkpointed(nn.Module):
    """Computes its middle layer again in backward."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return self.last(checkpoint(self.middle, self.first(x), use_reentrant=False))


def inputs(generator):
    """Four rows for the models here."""
    return torch.randn(4, 16, generator=generator)


def train(make=PartlyUsed, attach=QUANTIZERS["diffq"], calls=lambda step: {}, **options):
    """Trains for four steps on other data and other noise on each rank."""
    rank = dist.get_rank()
    model = seeded(make)
    quantizer = attach(model)
    wrapped = DistributedDataParallel(model, **options)
    optimizer = torch.optim.Adam(wrapped.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer, lr=0.3)
    torch.manual_seed(rank)
    for step, x in enumerate(batches(inputs, rank, 4)):
        optimizer.zero_grad()
        loss = wrapped(x, **calls(step)).square().mean()
        (loss + quantizer.model_size()).backward()
        optimizer.step()
    return wrapped, quantizer


def assert_trained_alike(wrapped, quantizer):
    """Both ranks have the same weights and bitwidths, which are no longer those of the start."""
    bits = quantizer.bits()
    assert same_on_ranks(*wrapped.parameters(), *bits.values())
    assert len({width for widths in bits.values() for width in widths.tolist()}) > 1


def check_all_layers_used():
    """With every layer in use, ranks end with the same weights and learned bits."""
    assert_trained_alike(*train())


def bits_after_a_step(wrap, make, make_input, in_the_loss):
    """What a step with a price of size, in the loss or in the step, makes of the bitwidths."""
    model = seeded(make)
    quantizer = QUANTIZERS["diffq"](model)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.0)
    quantizer.setup_optimizer(optimizer, lr=1.0, lam=None if in_the_loss else 50.0)
    torch.manual_seed(dist.get_rank())
    (batch,) = batches(make_input, dist.get_rank(), 1)
    loss = wrapped(batch).square().mean()
    (loss + 50 * quantizer.model_size() if in_the_loss else loss).backward()
    optimizer.step()
    return next(iter(quantizer.learned_parameters())).detach()


def check_price_in_the_step():
    """A price in the step is not multiplied by the number of ranks: as one in the loss."""
    learned, expected = (
        bits_after_a_step(DistributedDataParallel, mlp, inputs, place) for place in (False, True)
    )
    assert close(learned, expected)
    assert same_on_ranks(learned)


class Normed(nn.Module):
    """Two layers around a norm, whose buffers differ between ranks."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 96), nn.BatchNorm1d(96), nn.Linear(96, 64)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def trained_to(wrap, make, make_input, target, steps=20, kind="diffq"):
    """A model trained by a plan, on other data and other noise on each rank."""
    model = seeded(make)
    quantizer = QUANTIZERS[kind](model)
    wrapped = wrap(model)
    optimizer = torch.optim.Adam(wrapped.parameters(), 0.01)
    quantizer.setup_optimizer(optimizer, target_mb=target, steps=steps)
    torch.manual_seed(dist.get_rank())
    for batch in batches(make_input, dist.get_rank(), steps):
        optimizer.zero_grad()
        wrapped(batch).square().mean().backward()
        optimizer.step()
    return wrapped, quantizer


def check_target():
    """Training by a plan ends on all ranks with the same bitwidths, and with the target's size."""
    target = 0.006
    wrapped, quantizer = trained_to(DistributedDataParallel, Normed, inputs, target)
    assert quantizer.target.phase == "done"
    assert same_on_ranks(*wrapped.parameters(), *quantizer.bits().values())
    assert 0.985 * target <= quantizer.compressed_model_size() <= target
    wrapped, quantizer = trained_to(DistributedDataParallel, Normed, inputs, target, kind="entropy")
    assert same_on_ranks(*wrapped.parameters())
    assert 0.985 * target <= quantizer.compressed_model_size() <= target


def check_find_unused_parameters():
    """`find_unused_parameters` is fine where everything is used."""
    assert_trained_alike(*train(find_unused_parameters=True))


def check_layer_left_out_of_steps():
    """A layer may be left out of some steps on all ranks."""
    calls = [{"both": True}, {"both": False}] * 2
    assert_trained_alike(*train(calls=calls.__getitem__, find_unused_parameters=True))


def check_layer_left_out_on_one_rank():
    """A layer may be left out on one rank only."""
    calls = {"both": dist.get_rank() == 0}
    assert_trained_alike(*train(calls=lambda step: calls, find_unused_parameters=True))


def check_static_graph():
    """`static_graph` works, with checkpointing too."""
    assert_trained_alike(*train(static_graph=True))
    assert_trained_alike(*train(Checkpointed, static_graph=True))


def check_checkpointing():
    """A checkpointed layer is trained alike on both ranks."""
    assert_trained_alike(*train(Checkpointed))


def check_gradients_as_views():
    """Gradients may be views of DDP's buckets."""
    assert_trained_alike(*train(gradient_as_bucket_view=True))


def check_frozen_bits():
    """Bits may be frozen while DDP waits for the gradients of what it knows."""
    wrapped, quantizer = train()
    quantizer.freeze_bits(rounding=True)
    frozen = quantizer.bits()
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for _ in range(3):
        wrapped(torch.ones(2, 16)).sum().backward()
        optimizer.step()
    assert_trained_alike(wrapped, quantizer)
    assert all(same_bits(frozen[name], bits) for name, bits in quantizer.bits().items())


def check_every_quantizer():
    """Every quantizer trains to the same weights and the same file on both ranks."""
    for attach in QUANTIZERS.values():
        wrapped, quantizer = train(mlp, attach)
        assert same_on_ranks(*wrapped.parameters(), file_of(quantizer))


def check_codebooks():
    """Codebooks are learned and centroids trained alike on both ranks, without asking for more."""
    wrapped, quantizer = train(mlp, partial(QUANTIZERS["product"], stages=["0.*"]))
    quantizer.refresh()
    assert quantizer.quantize_stage() == ("0.weight",)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer, lr=0.3)
    codebook = wrapped.module._diffq.learned
    before = codebook.detach().clone()
    for x in batches(inputs, dist.get_rank(), 3):
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    assert same_on_ranks(*wrapped.parameters(), *wrapped.buffers(), file_of(quantizer))
    assert not same_bits(codebook, before)


def check_eval():
    """In eval mode ranks compute with the same weights, and report the same sizes."""
    wrapped, quantizer = train(mlp)
    wrapped.eval()
    sizes = quantizer.true_model_size(), quantizer.compressed_model_size(), quantizer.mean_bits()
    wrapped(torch.ones(2, 16))
    weights = computed(wrapped.module).values()
    assert same_on_ranks(*weights, quantizer.model_size(), *sizes)


def check_small_tensors():
    """Small tensors train, and evaluate with the same values on all ranks, those of the file."""
    wrapped, quantizer = train(
        mlp, attach=partial(QUANTIZERS["diffq"], min_size=1e-3, small_bits=8)
    )
    assert [plan.name for plan in quantizer.plan if plan.small] == ["0.bias", "2.weight", "2.bias"]
    evaluated = computed(wrapped.eval().module)
    state = restored(mlp, quantizer).state_dict()
    assert all(same_bits(evaluated[name], state[name]) for name in state)
    assert same_on_ranks(*evaluated.values(), quantizer.true_model_size())


def check_outputs_changed_in_place():
    """Outputs may be changed in place, wrapped in DDP and not."""
    model = mlp()
    diffq.DiffQuantizer(model, min_size=0).no_optimizer()
    for called in (model, DistributedDataParallel(model)):
        outputs = called(torch.ones(2, 16))
        outputs += 1
        outputs.mul_(2).sum().backward()


def _without_noise(model):
    return diffq.DiffQuantizer(model, min_size=0, group_size=4, noise_scale=0)


def _descend(model, quantizer, steps, no_sync=nullcontext):
    """Trains one step on the mean loss of each list of batches, synchronized at its last."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantizer.setup_optimizer(optimizer)
    for step in steps:
        optimizer.zero_grad()
        for index, x in enumerate(step):
            with no_sync() if index < len(step) - 1 else nullcontext():
                loss = model(x).square().mean() + 1e5 * quantizer.model_size()
                (loss / len(step)).backward()
        optimizer.step()


def _compare_with_one_process(accumulated):
    """Trains under DDP, and without it on the batches of both ranks joined."""
    batches_of = [[x.double() for x in batches(inputs, rank, 6)] for rank in range(2)]
    steps = [[x[i : i + accumulated] for i in range(0, 6, accumulated)] for x in batches_of]
    joined = [[torch.cat([*one, *other])] for one, other in zip(*steps, strict=True)]
    start, alone, model = (seeded(mlp).double() for _ in range(3))
    quantizers = [_without_noise(each) for each in (start, alone, model)]
    wrapped = DistributedDataParallel(model)
    _descend(alone, quantizers[1], joined)
    _descend(wrapped, quantizers[2], steps[dist.get_rank()], wrapped.no_sync)
    for name, expected in alone.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), expected)
        assert not same_bits(expected, start.get_parameter(name))


def check_same_as_one_process():
    """Without noise, DDP trains as one process does on the ranks' batches joined."""
    _compare_with_one_process(accumulated=1)


def check_no_sync():
    """Gradients accumulated under `no_sync()` are those of one joined batch."""
    _compare_with_one_process(accumulated=2)


if __name__ == "__main__":
    main(globals())
