"""What a quantizer refuses: models that it does not fit, and training that would go wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffq.attach.attachment import is_attached, strip
from diffq.attach.plan import TensorPlan
from diffq.attach.weight import WeightQuantizer
from diffq.errors import AttachError, WeightError
from diffq.packed.modules import is_packed
from diffq.torch_inside.modules import pruned_names
from diffq.torch_inside.sharding import is_sharded

_PARALLEL = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def check_model(model: nn.Module) -> None:
    """Raises AttachError for a model that is wrapped, sharded, quantized or no Python module."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"A quantizer needs a torch.nn.Module, got {type(model).__name__}.")
    _check_wrappers(model)
    _check_code(model)
    if is_sharded(model):
        raise AttachError(
            "Attach the quantizer to the plain model before fully_shard replaces its parameters:\n"
            "    quantizer = DiffQuantizer(model)\n"
            "    fully_shard(model)"
        )
    if is_attached(model):
        raise AttachError(
            "The model has a quantizer already. Call detach() on that one first; "
            "to quantize parts in different ways, use overrides, include and exclude."
        )
    if is_packed(model):
        raise AttachError(
            "A quantizer needs weights that it can change, but this model has packed ones. Load "
            "the file without packed=True, and attach the quantizer to that model."
        )
    strip(model)
    _check_pruning(model)


def _check_wrappers(model: nn.Module) -> None:
    for path, module in model.named_modules():
        # A compiled part is fine: it is called through the model, which makes the samples.
        names = _PARALLEL if path else (*_PARALLEL, "OptimizedModule")
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in names), None)
        if wrapper:
            part = f"model.{path}" if path else "model"
            raise AttachError(
                f"Attach the quantizer to the plain model before {wrapper} wraps it:\n"
                "    quantizer = DiffQuantizer(model)\n"
                f"    {part} = {wrapper}({part})"
            )


def _check_code(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise AttachError(
            "A quantizer needs a model in Python, got TorchScript, whose code is fixed. Attach it "
            "before torch.jit.script or torch.jit.trace. To compress the weights without "
            "training, save model.state_dict() and run `diffq pack` on it."
        )
    if isinstance(model, torch.fx.GraphModule) and "train" in vars(model):
        raise AttachError(
            "A quantizer needs a model that train() and eval() switch, got one of torch.export. "
            "Attach it to the model that was exported, and export after detach(quantized=True)."
        )


def _check_pruning(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for name in pruned_names(module):
            raise AttachError(
                f"{name} of {path or 'the model'} is pruned by torch.nn.utils.prune, which would "
                "store its mask too. Call diffq.parametrize_pruning(model) first."
            )


def checked(quantizer: WeightQuantizer, model: nn.Module) -> WeightQuantizer:
    """A quantizer that has looked at its weight; raises for one that it cannot take.

    Raises:
        AttachError: the module of the tensor works on the stored weight.
        WeightError: the weight is not finite, or beyond what can be stored.
    """
    check_owners(quantizer.plan, model)
    weight = quantizer.plan.sites[0].read(model)
    check_finite(quantizer.plan.name, weight)
    if not weight.is_meta:
        quantizer.check(weight.detach())
        quantizer.look(weight.detach(), None)
    return quantizer


def check_owners(plan: TensorPlan, model: nn.Module) -> None:
    """Raises AttachError for a tensor of a module that works on the stored weight."""
    for site in plan.sites:
        owner = site.owner(model)
        if isinstance(owner, torch.jit.ScriptModule):
            raise AttachError(
                f"{site.name} belongs to TorchScript, whose code is fixed. Keep that part of the "
                f"model in Python, or pass exclude=[{site.name!r}]."
            )
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
            writes = getattr(owner, "max_norm", None) is not None
            if owner.sparse or writes:
                setting = "sparse=True" if owner.sparse else "max_norm"
                raise AttachError(
                    f"{site.name} belongs to an embedding with {setting}, which works on the "
                    f"stored weight alone. Make it without, or pass exclude=[{site.name!r}]."
                )


def check_finite(name: str, weight: Tensor) -> None:
    """Raises WeightError for a weight that holds NaN or Inf."""
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise WeightError(
            f"Weights to quantize must be finite, but {name} holds NaN or Inf. "
            "Load a sound checkpoint first, or exclude the tensor."
        )


def check_detachable(model: nn.Module) -> None:
    """Raises AttachError for a sharded model."""
    if is_sharded(model):
        raise AttachError(
            "detach() cannot undo fully_shard, which has taken up the places where the "
            "quantizer keeps the parameters. Fill a plain model instead:\n"
            "    state = quantizer.get_quantized_state()  # on every rank\n"
            "    diffq.restore_quantized_state(plain_model, state)"
        )
