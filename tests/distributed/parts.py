"""What holds for tensors that ranks hold in parts, checked on each of two ranks."""

import math

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from diffq.torch_inside import sharding
from tests.compare import same_bits
from tests.distributed.ranks import main, require_fsdp

#: Device meshes of both ranks, and how a tensor is cut along them.
LAYOUTS = [
    ((2,), [Shard(0)]),
    ((2,), [Replicate()]),
    ((2, 1), [Replicate(), Shard(0)]),
    ((2, 1), [Shard(0), Shard(0)]),
    ((1, 2), [Shard(0), Shard(0)]),
    ((1, 2), [Shard(0), Replicate()]),
]


def _cut():
    """Tensors 0, 1, 2, … of lengths that divide and do not, with their parts."""
    for shape, placements in LAYOUTS:
        mesh = init_device_mesh("cpu", shape)
        for length in (1, 2, 3, 7, 8):
            tensor = torch.arange(length)
            yield tensor, distribute_tensor(tensor, mesh, placements)


def check_distributed():
    """A process of a group is told."""
    assert sharding.is_distributed()


def check_local_start():
    """A rank's part of 0, 1, 2, … starts at the number that it starts with; it may be empty."""
    for tensor, sharded in _cut():
        assert sharding.is_dtensor(sharded)
        start, part = sharding.local_start(sharded), sharding.local_part(sharded)
        assert part.tolist() == tensor[start : start + len(part)].tolist()


def check_columns():
    """Cut into columns, every part starts with the first row."""
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.arange(12).view(3, 4), mesh, [Shard(1)])
    assert sharding.local_part(sharded).shape == (3, 2)
    assert sharding.local_start(sharded) == 0


def check_whole():
    """A tensor is gathered as it was before it was cut."""
    for tensor, sharded in _cut():
        gathered = sharding.whole(sharded)
        assert not sharding.is_dtensor(gathered)
        assert same_bits(gathered, tensor)


def check_gradient_of_whole():
    """The gradient of a gathered tensor reaches the parts."""
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.ones(3), mesh, [Shard(0)]).requires_grad_()
    (sharding.whole(sharded) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(sharding.whole(sharded.grad), torch.tensor([1.0, 2.0, 3.0]))


def check_gather_from():
    """What ranks compute from their parts is stacked; ranks that hold the same count once."""
    for tensor, sharded in _cut():
        mesh, placements = layout = sharding.layout_of(sharded)
        cuts = zip(mesh.shape, placements, strict=True)
        parts = math.prod(size for size, placement in cuts if placement.is_shard())
        sums = sharding.gather_from(layout, sharding.local_part(sharded).sum())
        assert sums.shape == (parts,)
        assert sums.sum().item() == tensor.sum().item()


def check_layout_of():
    """Tensors that are cut alike have equal layouts, others have not."""
    mesh = init_device_mesh("cpu", (2,))
    one, other = (distribute_tensor(torch.ones(n), mesh, [Shard(0)]) for n in (3, 4))
    replicated = distribute_tensor(torch.ones(3), mesh, [Replicate()])
    assert sharding.layout_of(one) == sharding.layout_of(other)
    assert sharding.layout_of(one) != sharding.layout_of(replicated)
    assert sharding.layout_of(one) != sharding.layout_of(torch.ones(3))


def check_managed():
    """Every module below one that FSDP shards is managed, and none of another model."""
    require_fsdp()
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU()))
    assert not sharding.is_sharded(model)
    fully_shard(model)
    assert all(map(sharding.is_managed, model.modules()))
    assert sharding.is_sharded(model)
    assert not sharding.is_managed(nn.Linear(3, 3))


def check_reshard():
    """Parameters that are whole after a forward are sharded again."""
    require_fsdp()
    model = fully_shard(nn.Linear(3, 3))
    model(torch.ones(2, 3))
    assert not any(map(sharding.is_dtensor, model.parameters()))
    sharding.reshard(model)
    assert all(map(sharding.is_dtensor, model.parameters()))


def check_whole_parameters():
    """In the block, gathered tensors are in the places of parameters, tied ones tied."""
    require_fsdp()
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    weight = model[0].weight.detach().clone()
    kept = dict(fully_shard(model).named_parameters())
    with sharding.whole_parameters([model]):
        assert same_bits(model[0].weight, weight)
        assert model[1].weight is model[0].weight
        assert not any(map(sharding.is_dtensor, (layer.bias for layer in model)))
    after = dict(model.named_parameters())
    assert list(after) == list(kept)
    assert all(after[name] is kept[name] for name in kept)


if __name__ == "__main__":
    main(globals())
