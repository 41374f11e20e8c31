"""Models that FSDP2 shards: whole tensors from what the ranks hold in parts.

`torch.distributed.fsdp.fully_shard` makes each parameter a DTensor, of which every rank
holds a part, and puts the whole one in its place while a module runs. Gathering is a
collective: a rank that leaves it out makes the others wait.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

#: A device mesh and a placement for each of its dimensions; a device and none if not sharded.
Layout: TypeAlias = tuple[Any, tuple[Any, ...]]


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of a tensor."""
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP swaps the parameters of a module: whole while it runs, else sharded."""
    # torch's own mark, on every module below one that was given to `fully_shard`.
    return "_is_fsdp_managed_module" in module.__dict__


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of a model's parameters."""
    return any(map(is_managed, model.modules())) or any(map(is_dtensor, model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks, differentiable; any other as it is."""
    if not is_dtensor(tensor):
        return tensor
    sharded: Any = tensor
    # Parameters that are offloaded to the CPU are gathered where the ranks communicate.
    gathered: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()
    return gathered


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds, differentiable; it may be empty."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local()
    return part


def local_start(tensor: Tensor) -> int:
    """The index in its first dimension at which this rank's part of a sharded tensor starts."""
    sharded: Any = tensor
    mesh, start, length = sharded.device_mesh, 0, len(tensor)
    for dimension, placement in enumerate(sharded.placements):
        if placement.is_shard(0):
            # As torch.chunk cuts: parts of one length, then a shorter one, then empty ones.
            chunk = -(-length // mesh.size(dimension))
            skipped = min(chunk * mesh.get_local_rank(dimension), length)
            start, length = start + skipped, min(chunk, length - skipped)
    return start


def gather_from(ranks: Layout, values: Tensor) -> Tensor:
    """Stacks what each rank computed from its parts of tensors, without graph.

    Args:
        ranks: how the tensors are sharded.
        values: this rank's, of a shape that all ranks share.

    Returns:
        [parts, *shape]; ranks that hold the same part count once.
    """
    stacked = _loaded("torch.distributed.tensor", "DTensor").from_local(values[None], *ranks)
    gathered: Tensor = stacked.full_tensor().to(values.device)
    return gathered


def layout_of(tensor: Tensor) -> Layout:
    """Where a tensor is: equal for tensors that are sharded alike, or are on one device."""
    sharded: Any = tensor
    return (sharded.device_mesh, sharded.placements) if is_dtensor(tensor) else (tensor.device, ())


def mesh_device(tensor: Tensor) -> torch.device:
    """The device on which ranks communicate about a tensor, which may be offloaded."""
    sharded: Any = tensor
    return torch.device(sharded.device_mesh.device_type) if is_dtensor(tensor) else tensor.device


def reshard(model: nn.Module) -> None:
    """Takes away the whole parameters that FSDP keeps after a forward, until the next one.

    They may be in the lower precision of a mixed precision policy.
    """
    sharded = _loaded("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules():
        if isinstance(module, sharded):
            module.reshard()


@contextmanager
def whole_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts gathered tensors in place of sharded parameters, for a `with` block.

    Nothing is gathered where nothing is sharded. Tied parameters stay tied.

    Args:
        modules: the parameters of these and their submodules.
    """
    owners = dict.fromkeys(owner for module in modules for owner in module.modules())
    places = [
        (owner, name, parameter)
        for owner in owners
        for name, parameter in owner._parameters.items()
        if parameter is not None and is_dtensor(parameter)
    ]
    gathered = {p: whole(p.detach()) for p in dict.fromkeys(p for _, _, p in places)}
    try:
        for owner, name, parameter in places:
            # A plain tensor, for as long as nobody registers or trains it.
            owner._parameters[name] = gathered[parameter]  # type: ignore[assignment]
        yield
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter


def _loaded(module: str, name: str) -> Any:
    """A class of torch.distributed; `()`, of which nothing is an instance, if not imported.

    Importing it takes as long as torch itself, and does not work in every build.
    """
    return getattr(sys.modules.get(module), name, ())
