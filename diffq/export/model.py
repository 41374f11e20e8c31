"""Models to files of other libraries."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from diffq.attach.guards import check_detachable
from diffq.errors import ConfigError
from diffq.quantizers.base import BaseQuantizer, quantizer_of
from diffq.storage.open import Readable, StoredModel
from diffq.storage.restore import fill
from diffq.storage.state import Snapshot, from_state
from diffq.storage.writing import Target, check_target, write_file


def onnx(
    source: BaseQuantizer[Any] | StoredModel | Mapping[str, Any] | Readable,
    path: Target,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    model: nn.Module | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
) -> int:
    """Writes an ONNX file that stores integers in place of float weights.

    The file has levels of 4, 8 or 16 bits, and nodes that decode them to the weights of eval, bit
    for bit. onnxruntime folds these nodes when it loads the file. The rest of the graph comes from
    `torch.onnx.export`. Needs the extra `onnx`.

    Args:
        source: a quantizer whose model is in eval mode; or, together with `model`, a file that
            `diffq.save` wrote, an open `StoredModel`, or a state of `get_quantized_state`.
        path: where to; an old file stays intact until the new one is whole. A binary file
            that is open for writing gets the bytes where it stands.
        inputs: positional arguments of one call of the model.
        kwargs: keyword arguments of this call.
        model: a plain model of the same architecture as `source`, in eval mode; it stays as it is.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs.
        dynamic_shapes: axes of the inputs that may have other sizes, see `torch.export.export`.

    Returns:
        Bytes of the file.

    Raises:
        ConfigError: onnx or onnxscript is missing; the model is in training mode or does not run
            on the inputs; `model` is missing, or given beside a quantizer; or the graph is
            invalid, or exceeds the 2 GiB of an ONNX file.
        AttachError: the quantizer was detached, or its model is sharded.
        WeightError: a weight to quantize or a bitwidth is not finite.
        StateError: a state is damaged, or file or state do not fit the model.
        FormatError: the file is damaged.
        OSError: a file cannot be read or written.
        torch.onnx.OnnxExporterError: torch cannot export the model.
    """
    check_target(path)
    graph = _graph_module()
    if not isinstance(inputs, tuple):
        raise ConfigError(
            f"inputs must be a tuple of one call's arguments, got {type(inputs).__name__}. "
            "Write inputs=(x,)."
        )
    plain, snapshot = _plain(source, model)
    _check_eval(plain)
    names = {"input_names": input_names, "output_names": output_names}
    call = dict(kwargs or {})
    try:
        proto = graph.trace(plain, inputs, kwargs=call, dynamic_shapes=dynamic_shapes, **names)
    except Exception:
        _check_call(plain, inputs, call)
        raise
    return write_file(path, [graph.encode(proto, snapshot)])


def _graph_module() -> ModuleType:
    """The module that imports onnx."""
    try:
        import diffq.export.graph as graph
    except ImportError as error:
        raise ConfigError(
            "Export to ONNX needs the packages onnx and onnxscript. Install them with "
            "pip install 'diffq[onnx]', or from a checkout with pip install '.[onnx]'."
        ) from error
    return graph


def _plain(source: Any, model: nn.Module | None) -> tuple[nn.Module, Snapshot]:
    """A plain copy of a model with its quantized values, and what these are stored as."""
    if isinstance(source, BaseQuantizer):
        if model is not None:
            raise ConfigError("A quantizer has its model, but got model=... too. Leave it out.")
        check_detachable(source.model)
        copied = copy.deepcopy(source.model)
        return quantizer_of(copied).detach(quantized=True), source.snapshot()
    if model is None:
        raise ConfigError(
            "A file or state has no architecture. Pass a plain model of it too: model=..."
        )
    snapshot = _snapshot(source)
    return fill(copy.deepcopy(model), snapshot), snapshot


def _snapshot(source: StoredModel | Mapping[str, Any] | Readable) -> Snapshot:
    if isinstance(source, StoredModel):
        records = {name: source.reader.record(name) for name in source.entries}
        return Snapshot(records, source.aliases)
    if isinstance(source, Mapping):
        return from_state(source)
    with StoredModel(source) as stored:
        return _snapshot(stored)


def _check_eval(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module.training:
            raise ConfigError(
                f"An export needs a model in eval mode, but {path or 'the model'!r} is in "
                "training mode. Call model.eval() first."
            )


def _check_call(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises ConfigError for inputs that the model itself does not run on."""
    try:
        with torch.no_grad():
            model(*inputs, **kwargs)
    except Exception as error:
        raise ConfigError(
            f"The model must run on the inputs of an export, but raised {type(error).__name__}: "
            f"{error}. Pass the arguments of one call."
        ) from error
