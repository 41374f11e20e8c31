"""What holds for models that FSDP2 shards, checked on each of two ranks."""

import weakref
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import diffq
from diffq.attach import attachment
from diffq.attach import learned as learned_module
from diffq.attach.attachment import attachment_of
from diffq.quantizers import steps
from diffq.torch_inside import sharding
from tests.compare import close, same_bits
from tests.distributed.ddp import bits_after_a_step, trained_to
from tests.distributed.ranks import batches, file_of, main, require_fsdp, same_on_ranks
from tests.holder import quantizers_in
from tests.models import QUANTIZERS, SUMS, Recurrent, seeded


class Residual(nn.Module):
    """A tied embedding around two blocks, which may be checkpointed; shapes divide unevenly."""

    def __init__(self, checkpointed=False, reentrant=False):
        super().__init__()
        self.checkpointed, self.reentrant, self.used = checkpointed, reentrant, 2
        self.embed = nn.Embedding(24, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 16)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks[: self.used]:
            if self.checkpointed:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = x + block(x)
        return self.head(self.norm(x))


def tokens(generator):
    """Three sequences."""
    return torch.randint(24, (3, 7), generator=generator)


DIFFQ = QUANTIZERS["diffq"]
SILENT = partial(diffq.DiffQuantizer, min_size=0, group_size=4, noise_scale=0)


def shard(model, **options):
    """Shards the blocks of a model, if it has some, and the model."""
    require_fsdp()
    for block in getattr(model, "blocks", []):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def train(make=Residual, attach=DIFFQ, steps=2, **options):
    """A sharded model, trained with other data and other noise on each rank."""
    model = seeded(make)
    quantizer = attach(model)
    shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer, lr=0.3)
    torch.manual_seed(dist.get_rank())
    for batch in batches(tokens, dist.get_rank(), steps):
        optimizer.zero_grad()
        (model(batch).float().square().mean() + quantizer.model_size()).backward()
        optimizer.step()
    return model, quantizer


def gathered(model, make=Residual, attach=DIFFQ):
    """A model of one process with the weights and extras of a sharded one."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    alone = seeded(make)
    quantizer = attach(alone)
    quantizer.no_optimizer()
    alone.load_state_dict(state)
    return alone, quantizer


def evaluate_alike(one, other, inputs):
    """Whether the layers of two models read the same weights in eval, and give close outputs."""
    weights = [read_in_eval(model, inputs) for model in (one, other)]
    with torch.no_grad():
        return same_bits(*weights) and close(one(inputs), other(inputs))


def read_in_eval(model, inputs):
    """The weights that the layers of a model read in eval, by name."""
    weights, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            keep = partial(_keep_weight, weights, name)
            handles.append(layer.register_forward_pre_hook(keep))
    with torch.no_grad():
        model.eval()(inputs)
    for handle in handles:
        handle.remove()
    return weights


def _keep_weight(weights, name, layer, _):
    weights[name] = layer.weight.clone()


def parameters_of(model):
    """The objects and values of a model's parameters, sharded ones by their local parts."""
    sharding.reshard(model)
    return [(id(p), p.to_local().clone()) for p in model.parameters()]


def assert_exported_alike(quantizer, alone):
    """A quantizer gives what another of a single process gives, bit for bit, on all ranks."""
    sizes = [q.true_model_size() for q in (quantizer, alone)]
    assert sizes[0] == sizes[1]
    assert quantizer.compressed_model_size() == alone.compressed_model_size()
    assert quantizer.metrics() == alone.metrics()
    assert str(quantizer.mean_bits()) == str(alone.mean_bits())
    ours, theirs = quantizer.bits(), alone.bits()
    assert all(same_bits(ours[name], bits) for name, bits in theirs.items())
    assert file_of(quantizer.get_quantized_state()) == file_of(alone)
    assert file_of(quantizer.get_quantized_state(packed=False)) == file_of(alone)
    torch.testing.assert_close(quantizer.model_size(), alone.model_size())
    assert same_on_ranks(quantizer.model_size(), sizes[0], file_of(quantizer))


PRODUCT = partial(
    diffq.ProductQuantizer,
    min_size=0,
    codebook_size=4,
    block_size=2,
    overrides={"blocks.*.2.weight": {"block_size": 3}},
)


def check_target():
    """Training by a plan ends on all ranks with the same bitwidths, and with the target's size."""
    target = 0.0019
    _, quantizer = trained_to(shard, Residual, tokens, target)
    assert quantizer.target.phase == "done"
    assert same_on_ranks(*quantizer.bits().values())
    assert 0.99 * target <= quantizer.compressed_model_size() <= target
    model, quantizer = trained_to(shard, Residual, tokens, target, kind="entropy")
    assert 0.98 * target <= quantizer.compressed_model_size() <= target
    assert same_on_ranks(*(sharding.whole(p).detach() for p in model.parameters()))


def check_price_in_the_step():
    """Each rank adds the price of the numbers that it holds: as a price in the loss."""
    learned, expected = (
        sharding.whole(bits_after_a_step(shard, Residual, tokens, place)) for place in (False, True)
    )
    assert close(learned, expected)


def check_every_quantizer():
    """What is exported while sharded is what one process exports of the gathered weights."""
    kinds = {**QUANTIZERS, "product": PRODUCT}
    halves = partial(DIFFQ, float16=True, exclude=["*.bias"])
    for attach in (*kinds.values(), halves, partial(DIFFQ, min_size=1e-3, small_bits=8)):
        model, quantizer = train(attach=attach)
        before = parameters_of(model)
        assert_exported_alike(quantizer, gathered(model, attach=attach)[1])
        for (one, value), (other, after) in zip(before, parameters_of(model), strict=True):
            assert one == other
            assert same_bits(value, after)


def check_codebooks():
    """Codebooks are learned from whole weights, and centroids trained, alike on all ranks."""
    attach = partial(PRODUCT, stages=["blocks.*"], centroids="int8")
    model, quantizer = train(attach=attach)
    alone, expected = gathered(model, attach=attach)
    quantizer.refresh()
    expected.refresh()
    assert same_bits(alone._diffq.kept, model._diffq.kept)
    assert len(quantizer.quantize_stage()) == 4
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer, lr=0.3)
    codebook = model._diffq.learned
    before = codebook.full_tensor().clone()
    for batch in batches(tokens, dist.get_rank(), 2):
        model(batch).square().mean().backward()
        optimizer.step()
    sharding.reshard(model)
    codebook = model._diffq.learned
    assert not same_bits(codebook.full_tensor(), before)
    assert_exported_alike(quantizer, gathered(model, attach=attach)[1])


def check_whole_tensor_groups():
    """One bitwidth for each tensor, which one rank has and the other has not, is fine."""
    attach = partial(diffq.DiffQuantizer, min_size=0, group_size=None)
    model, quantizer = train(attach=attach)
    assert_exported_alike(quantizer, gathered(model, attach=attach)[1])


def check_other_modules():
    """Recurrent layers and other parametrizations are exported alike."""

    def normalized():
        model = Residual()
        weight_norm(model.blocks[0][0])
        return model

    for make in (Recurrent, normalized):
        model, quantizer = train(make)
        assert_exported_alike(quantizer, gathered(model, make)[1])


def check_replicated_shards():
    """Shards may be replicated on a second dimension of the device mesh."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model, quantizer = train(mesh=mesh)
    assert_exported_alike(quantizer, gathered(model)[1])


def check_mixed_precision():
    """Under a mixed precision policy, the full precision weights are exported."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    attach = partial(DIFFQ, exclude=["*.bias"])
    model, quantizer = train(attach=attach, mp_policy=policy)
    alone = gathered(model, attach=attach)[1]
    size = quantizer.model_size()
    with torch.no_grad():
        model(tokens(None))
    # FSDP has left the whole embedding in place, in the lower precision.
    assert model.head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(quantizer.model_size(), size, rtol=1e-3, atol=0)
    assert_exported_alike(quantizer, alone)


def check_checkpointing():
    """Blocks computed again in backward see the same noise: gradients are those of it."""
    gradients = []
    for make in (
        Residual,
        partial(Residual, True, reentrant=False),
        partial(Residual, True, reentrant=True),
    ):
        model, quantizer = train(make, steps=0)
        torch.manual_seed(dist.get_rank())
        model(batches(tokens, dist.get_rank(), 1)[0]).square().mean().backward()
        gradients.append([p.grad.to_local() for p in model.parameters()])
        assert_exported_alike(quantizer, gathered(model)[1])
    for other in gradients[1:]:
        assert close(gradients[0], other, SUMS)


def check_gradients():
    """Gradients are those of one process on the joined batch, with the size counted once."""
    model, quantizer = train(attach=SILENT)
    alone, expected = gathered(model, attach=SILENT)
    joined = torch.cat([batches(tokens, rank, 1)[0] for rank in range(2)])
    (alone(joined).square().mean() + 1e4 * expected.model_size()).backward()
    for early in (True, False):
        model.zero_grad()
        sharding.reshard(model)
        size = quantizer.model_size() if early else 0
        loss = model(batches(tokens, dist.get_rank(), 1)[0]).square().mean()
        (loss + 1e4 * (size if early else quantizer.model_size())).backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.full_tensor()
            torch.testing.assert_close(gradient, alone.get_parameter(name).grad)


def check_size_gradient():
    """The gradient of the size alone is that of one process, and no weight has one."""
    model, quantizer = train()
    alone, expected = gathered(model)
    alone(tokens(None))
    model.zero_grad()
    expected.model_size().backward()
    quantizer.model_size().backward()
    for name, parameter in model.named_parameters():
        single = alone.get_parameter(name).grad
        assert (parameter.grad is None) == (single is None)
        if single is not None:
            torch.testing.assert_close(parameter.grad.full_tensor(), single)


def check_unused_blocks():
    """A block that no forward since the last step ran gets no gradient from the size."""
    model, quantizer = train()
    model.zero_grad()
    model.used = 1
    model(tokens(None))
    quantizer.model_size().backward()
    learned = model._diffq
    parts = learned.parts(sharding.whole(learned.learned.grad))
    for tensor, gradient in zip(learned.quantizers, parts, strict=True):
        assert bool(gradient.any()) == ("blocks.1" not in tensor.plan.name)
    grads = [p.grad for p in model.parameters() if p is not learned.learned]
    assert not any(grad is not None and bool(sharding.whole(grad).any()) for grad in grads)


def check_export_between_forward_and_backward():
    """A state taken between forward and backward leaves the gradients as they are."""
    gradients = []
    for look in (False, True):
        model, quantizer = train(steps=0)
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(tokens(None)).square().mean() + quantizer.model_size()
        if look:
            quantizer.get_quantized_state()
        loss.backward()
        gradients.append([p.grad.to_local() for p in model.parameters()])
    assert close(*gradients, SUMS)


def check_eval():
    """Eval computes with the quantized weights, the same on all ranks."""
    model, _ = train()
    inputs = tokens(torch.Generator().manual_seed(0))
    assert evaluate_alike(model, gathered(model)[0], inputs)
    assert same_on_ranks(*read_in_eval(model, inputs).values())


def check_eval_keeps_nothing():
    """Eval keeps no whole weights, which could be stale: FSDP gathers others to their memory."""
    model, _ = train()
    with torch.no_grad():
        model.eval()(tokens(None))
    tensors, cache = quantizers_in(model), attachment_of(model).forwards.cache
    kept = cache.values(None, [q.index for q in tensors], [q.weight for q in tensors])
    assert kept == [None] * len(tensors)


def check_one_tensor_at_a_time():
    """What is gathered of one tensor is let go before the next one is gathered."""
    model, quantizer = train()
    alive = weakref.WeakSet()
    most = 0

    def whole(tensor):
        nonlocal most
        alive.add(result := original(tensor))
        most = max(most, sum(each.numel() for each in alive))
        return result

    original = sharding.whole
    learned = model._diffq.learned
    largest = max(p.numel() for p in model.parameters() if p is not learned)
    with ExitStack() as stack:
        for module in (sharding, attachment, learned_module):
            stack.enter_context(mock.patch.object(module, "whole", whole))
        for call in (quantizer.get_quantized_state, quantizer.true_model_size, quantizer.bits):
            call()
            assert not alive
    assert 0 < most <= largest + learned.numel()


def check_frozen_bits():
    """Frozen bits stay as they are while the weights are trained on."""
    model, quantizer = train()
    quantizer.freeze_bits(rounding=True)
    frozen = quantizer.bits()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in batches(tokens, dist.get_rank(), 2):
        (model(batch).square().mean() + quantizer.model_size()).backward()
        optimizer.step()
    alone = gathered(model)[1]
    assert_exported_alike(quantizer, alone)
    assert all(same_bits(bits, quantizer.bits()[name]) for name, bits in frozen.items())


def check_optimizer_made_after():
    """An optimizer made after `fully_shard` holds the extras in a group of their own."""
    model = seeded(Residual)
    quantizer = DIFFQ(model)
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    with torch.no_grad():
        model.eval()(tokens(None))
    quantizer.setup_optimizer(optimizer, lr=0.3)
    sharding.reshard(model)
    weights, extras = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in extras["params"]} == {"_diffq.learned"}
    assert len(weights["params"]) + len(extras["params"]) == len(names)
    assert (extras["lr"], extras["weight_decay"]) == (0.3, 0.0)


def check_optimizer_made_before():
    """An optimizer that holds what `fully_shard` replaced is refused."""
    model = seeded(Residual)
    quantizer = DIFFQ(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer)
    shard(model)
    (model(tokens(None)).square().mean() + quantizer.model_size()).backward()
    with pytest.raises(diffq.OptimizerError, match="fully_shard does that"):
        optimizer.step()
    with pytest.raises(diffq.OptimizerError, match="after fully_shard"):
        quantizer.setup_optimizer(optimizer)


def check_optimizer_made_anew():
    """A new optimizer without the extras is noticed; set up, it is fine."""
    model, quantizer = train(steps=1)
    weights = [p for name, p in model.named_parameters() if name != "_diffq.learned"]
    optimizer = torch.optim.SGD(weights, 0.1)
    for _ in range(steps.PATIENCE - 1):
        optimizer.step()
    with pytest.warns(diffq.DiffqWarning, match="Each time you make an optimizer"):
        optimizer.step()
    quantizer.setup_optimizer(optimizer)


def check_optimizer_given_new_parameters():
    """An optimizer made before, which was then given the sharded parameters, is fine."""
    model = seeded(Residual)
    quantizer = DIFFQ(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    quantizer.setup_optimizer(optimizer)
    old = {id(p): name for name, p in model.named_parameters()}
    shard(model)
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(old[id(p)]) for p in group["params"]]
    before = parameters_of(model)
    for _ in range(2):
        (model(tokens(None)).square().mean() + quantizer.model_size()).backward()
        optimizer.step()
    pairs = zip(before, parameters_of(model), strict=True)
    assert any(not same_bits(old, new) for (_, old), (_, new) in pairs)


def check_attaching_after():
    """Attaching to a sharded model is refused, and leaves it as it is."""
    model = shard(seeded(Residual))
    before = parameters_of(model)
    with pytest.raises(diffq.AttachError, match="before fully_shard"):
        DIFFQ(model)
    assert [one for one, _ in before] == [one for one, _ in parameters_of(model)]
    model(tokens(None)).sum().backward()


def check_detaching():
    """Detaching from a sharded model is refused, and training goes on."""
    model, quantizer = train(steps=1)
    for quantized in (False, True):
        with pytest.raises(diffq.AttachError, match="restore_quantized_state"):
            quantizer.detach(quantized)
    model(tokens(None)).sum().backward()


def check_restoring():
    """A state is restored into a plain model, which may be sharded then; not the other way."""
    model, quantizer = train()
    state = quantizer.get_quantized_state()
    plain = diffq.restore_quantized_state(Residual(), state)
    inputs = tokens(torch.Generator().manual_seed(0))
    assert evaluate_alike(plain, model, inputs)
    assert evaluate_alike(shard(plain), model, inputs)
    with pytest.raises(diffq.MismatchError, match="Restore first"):
        diffq.restore_quantized_state(plain, state)


@contextmanager
def _spoiled_weight(model):
    """NaN in the last element of a weight, which one rank holds."""
    local = model.blocks[1][0].weight.to_local()
    kept = local.detach().clone()
    with torch.no_grad():
        if local.numel() and dist.get_rank() == 1:
            local.view(-1)[-1] = torch.nan
    yield
    with torch.no_grad():
        local.copy_(kept)


@contextmanager
def _spoiled_logits(model):
    """NaN in the logits of a weight."""
    learned = model._diffq
    kept = [None if part is None else part.detach().clone() for part in learned.parts()]
    (tensor,) = (q for q in learned.quantizers if q.plan.name == "blocks.1.0.weight")
    spoiled = [None] * len(kept)
    spoiled[tensor.index] = torch.full_like(kept[tensor.index], torch.nan)
    learned.write(spoiled)
    yield
    learned.write(kept)


def check_looking_at_it():
    """A single rank prints the quantizer without waiting for the others; it tells what it knows."""
    _, quantizer = train()
    if dist.get_rank() == 0:
        for shown in (repr(quantizer), quantizer._repr_html_()):
            assert "sharded: bits and MB take all ranks" in shown
            assert "embed.weight = head.weight" in shown
            assert "24x16" in shown
    dist.barrier()


def check_report():
    """The page is that of one process with the whole model, on every rank."""
    model, quantizer = train()
    alone = gathered(model)[1]
    assert quantizer.report() == alone.report().replace("of Residual", "of FSDPResidual")


def check_not_finite():
    """A NaN that one rank holds is an error that names the tensor, on every rank."""
    model, quantizer = train()
    sharding.reshard(model)
    for spoiled in (_spoiled_weight, _spoiled_logits):
        with spoiled(model):
            for call in (
                quantizer.true_model_size,
                quantizer.get_quantized_state,
                quantizer.metrics,
            ):
                with pytest.raises(diffq.WeightError, match=r"blocks\.1\.0\.weight"):
                    call()
            # Nothing that was gathered for the call is left in the model.
            assert all(isinstance(p, DTensor) for p in model.parameters())
    quantizer.true_model_size()


if __name__ == "__main__":
    main(globals())
