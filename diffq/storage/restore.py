"""Quantized state to plain model: by name, all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffq.attach.attachment import is_attached
from diffq.attach.plan import dtype_name, named_tensors
from diffq.attach.ties import tie_key
from diffq.errors import MismatchError
from diffq.packed.modules import is_packed
from diffq.storage.legacy.layout import is_legacy
from diffq.storage.legacy.load import load_legacy
from diffq.storage.state import Header, Snapshot, from_state, read_header, record_tensor
from diffq.torch_inside.modules import is_lazy
from diffq.torch_inside.sharding import is_managed


def restore_quantized_state(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Fills a plain model with the values of a quantized state.

    The model then computes, bit for bit, what the quantized model computed in
    eval mode. Everything is checked before anything is changed.

    Args:
        model: a model of the same architecture, without a quantizer. Parameters
            may be on any device; each keeps its place and its dtype.
        state: what `get_quantized_state` returned, as `torch.load` gives it back; states
            of the earlier package are recognised, see `load_legacy`.

    Returns:
        The same model.

    Raises:
        StateError: the state is damaged.
        MismatchError: names, shapes or dtypes differ between state and model, or
            the model ties tensors that have different values in the state.
    """
    if is_legacy(state):
        return load_legacy(state, model)
    # Before records are made, which takes longer.
    match(model, read_header(state))
    return fill(model, from_state(state))


def fill(model: nn.Module, snapshot: Snapshot) -> nn.Module:
    """Fills a plain model with the values of a snapshot.

    Raises:
        MismatchError: see `restore_quantized_state`; nothing was changed.
    """
    records = snapshot.records
    shapes = {name: (record.shape, record.dtype) for name, record in records.items()}
    header = Header(shapes, snapshot.aliases)

    def value(name: str) -> Tensor:
        return record_tensor(records[name])

    with torch.no_grad():
        for name, target in unique_targets(match(model, header), header, value):
            target.copy_(value(name))
    return model


def match(
    model: nn.Module, header: Header, strict: bool = True, meta: bool = False
) -> dict[str, Tensor]:
    """Pairs a stored model's names with a plain model's tensors; decodes nothing.

    Args:
        model: the model.
        header: the stored model's header.
        strict: refuse names that only one of the two has; otherwise warn of them.
        meta: allow tensors on the meta device, which will be replaced.

    Returns:
        Every name that both have to its tensor of the model.

    Raises:
        MismatchError: the model has parametrizations, or names, shapes or dtypes differ;
            or no name is in both.
    """
    _check_plain(model)
    targets = {site.name: tensor for site, tensor in named_tensors(model)}
    sources = {**{name: name for name in header.tensors}, **header.aliases}
    shared = {name: target for name, target in targets.items() if name in sources}
    unmatched = _unmatched(targets, sources, set() if strict else shared.keys())
    described = {
        name: _problem(target, *header.tensors[sources[name]], meta)
        for name, target in shared.items()
    }
    problems = [f"{name}: {problem}" for name, problem in described.items() if problem]
    if strict or (unmatched and not shared):
        problems += unmatched
    if problems:
        raise MismatchError(
            "What is stored does not fit the model; nothing was changed.\n  "
            + _first(sorted(problems))
        )
    if unmatched:
        text = f"{len(shared)} names of file and model match. The others stay as they are:\n  "
        warnings.warn(text + _first(sorted(unmatched)), stacklevel=4)
    return shared


def unique_targets(
    targets: Mapping[str, Tensor], header: Header, value: Callable[[str], Tensor]
) -> list[tuple[str, Tensor]]:
    """Each tensor of the model once, with the name under which its value is stored.

    Args:
        targets: every name of the model to its tensor.
        header: the stored model's header.
        value: decodes the tensor that is stored under a name; called only where the
            model ties tensors that are stored apart.

    Raises:
        MismatchError: the model ties tensors that have different values.
    """
    sources = {**{name: name for name in header.tensors}, **header.aliases}
    first: dict[object, str] = {}
    for name, target in targets.items():
        tied = first.setdefault(tie_key(target), name)
        one, other = sources[tied], sources[name]
        if one != other and not _same_bits(value(one), value(other)):
            raise MismatchError(
                f"The model ties {tied!r} and {name!r}, but they are stored with different "
                "values. Untie them in the model, as they were when it was stored."
            )
    return [(sources[name], targets[name]) for name in first.values()]


def _check_plain(model: nn.Module) -> None:
    if is_attached(model):
        raise MismatchError(
            "Stored weights are restored into a plain model, but this one has a quantizer. "
            "Call quantizer.detach() first."
        )
    if is_packed(model):
        raise MismatchError(
            "Stored weights are restored into a plain model, but this one has packed weights. "
            "Make a new model."
        )
    for path, module in model.named_modules():
        if is_managed(module):
            raise MismatchError(
                "Stored weights are restored into a plain model, but this one is sharded. "
                "Restore first, then call fully_shard(model)."
            )
        if parametrize.is_parametrized(module):
            raise MismatchError(
                "Stored weights are restored into a plain model, "
                f"but {path or 'the model'!r} has parametrizations. "
                "Call torch.nn.utils.parametrize.remove_parametrizations() first."
            )


def _unmatched(
    targets: Mapping[str, Tensor], sources: Mapping[str, str], loaded: Iterable[str]
) -> list[str]:
    """Names that are only in the model, or only stored; not further names of what is loaded."""
    filled = {tie_key(targets[name]) for name in loaded}
    used = {sources[name] for name in loaded}
    missing = [n for n, t in targets.items() if n not in sources and tie_key(t) not in filled]
    extra = [n for n, source in sources.items() if n not in targets and source not in used]
    return [f"not stored: {n}" for n in missing] + [f"not in the model: {n}" for n in extra]


def _first(lines: list[str]) -> str:
    """Ten lines at most, to be read by people."""
    more = f"\n  and {len(lines) - 10} more" * (len(lines) > 10)
    return "\n  ".join(lines[:10]) + more


def _problem(target: Tensor, shape: tuple[int, ...], dtype: str, meta: bool) -> str | None:
    """Why a stored tensor cannot be written to one of the model, if so."""
    if is_lazy(target):
        return "no shape in the model yet; run one forward of the lazy module first"
    if tuple(target.shape) != shape:
        return f"shape {list(target.shape)} in the model, {list(shape)} stored"
    if dtype_name(target.dtype) != dtype:
        stored = f"{dtype_name(target.dtype)} in the model, {dtype} stored"
        return f"{stored}; convert the model with .to(dtype)"
    if target.is_meta and not meta:
        return "on the meta device; call model.to_empty(device=...) first"
    expanded = any(
        stride == 0 < size - 1 for stride, size in zip(target.stride(), shape, strict=True)
    )
    if expanded and target.numel():
        return "expanded from fewer elements in the model; make it contiguous"
    if target.is_inference() and not torch.is_inference_mode_enabled():
        return "made in inference mode, where it cannot be written to; make the model outside"
    return None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # Compared as bytes, so that NaN equals itself.
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
