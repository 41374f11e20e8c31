"""Quantized state to plain model: by name, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffq.errors import MismatchError
from diffq.state import Snapshot, dtype_name, from_state, record_tensor


def restore_quantized_state(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Fills a plain model with the values of a quantized state.

    The model then computes, bit for bit, what the quantized model computed in
    eval mode. Everything is checked before anything is changed.

    Args:
        model: a model of the same architecture, without a quantizer. Parameters
            may be on any device; each keeps its place and its dtype.
        state: what `get_quantized_state` returned, as `torch.load` gives it back.

    Returns:
        The same model.

    Raises:
        StateError: the state is damaged.
        MismatchError: names, shapes or dtypes differ between state and model, or
            the model ties tensors that have different values in the state.
    """
    return fill(model, from_state(state))


def fill(model: nn.Module, snapshot: Snapshot) -> nn.Module:
    """Copies the values of a snapshot into a plain model; see `restore_quantized_state`."""
    targets = _targets(model)
    sources = {name: name for name in snapshot.records} | dict(snapshot.aliases)
    _check(targets, sources, snapshot)
    decoded = {name: record_tensor(record) for name, record in snapshot.records.items()}
    values: dict[int, tuple[Tensor, Tensor, str]] = {}
    for name, target in targets.items():
        value = decoded[sources[name]]
        _, known, tied = values.setdefault(id(target), (target, value, name))
        if known is not value and not _same_bits(known, value):
            raise MismatchError(
                f"The model ties {tied!r} and {name!r}, but the state has different values "
                "for them. Untie them in the model, as they were when the state was made."
            )
    with torch.no_grad():
        for target, value, _ in values.values():
            target.copy_(value)
    return model


def _targets(model: nn.Module) -> dict[str, Tensor]:
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise MismatchError(
                "A quantized state is restored into a plain model, "
                f"but {path or 'the model'!r} has parametrizations. "
                "Call quantizer.detach(), or remove_parametrizations(), first."
            )
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }


def _check(targets: Mapping[str, Tensor], sources: Mapping[str, str], snapshot: Snapshot) -> None:
    problems = [f"missing in the state: {name}" for name in targets if name not in sources]
    problems += [f"not in the model: {name}" for name in sources if name not in targets]
    for name in targets.keys() & sources.keys():
        record, target = snapshot.records[sources[name]], targets[name]
        if tuple(target.shape) != record.shape:
            problems.append(
                f"{name}: shape {list(target.shape)} in the model, "
                f"{list(record.shape)} in the state"
            )
        elif dtype_name(target.dtype) != record.dtype:
            problems.append(
                f"{name}: {dtype_name(target.dtype)} in the model, {record.dtype} in the state; "
                f"convert the model with .to(torch.{record.dtype})"
            )
    if problems:
        more = f"\n  and {len(problems) - 10} more" * (len(problems) > 10)
        raise MismatchError(
            "The quantized state belongs to another model; nothing was changed.\n  "
            + "\n  ".join(sorted(problems)[:10])
            + more
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # Compared as bytes, so that NaN equals itself.
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
