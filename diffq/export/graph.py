"""A model as an ONNX graph that stores integers in place of float weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from onnx import GraphProto, ModelProto, TensorProto, checker, helper, shape_inference
from onnxscript import optimizer
from torch import nn

from diffq.errors import ConfigError
from diffq.export.decoding import Decoder, is_coded
from diffq.format.records import Record
from diffq.storage.state import Snapshot, record_tensor
from diffq.storage.state_entry import typed_bytes

#: The first version of ONNX's operators with integers of 4 bits.
OPSET = 21

#: Most bytes of a message of protobuf.
MAX_BYTES = 2**31 - 1


def trace(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> ModelProto:
    """Exports a model as it is, each tensor of its state under its own name.

    Args:
        model: a plain model in eval mode.
        inputs: positional arguments of its forward.
        options: further arguments of `torch.onnx.export`.

    Raises:
        torch.onnx.OnnxExporterError: torch cannot export the model.
    """
    # The optimizer would transpose weights, and fuse them with norms.
    options |= {"dynamo": True, "optimize": False, "opset_version": OPSET, "verbose": False}
    program: Any = torch.onnx.export(model, inputs, **options)
    proto: ModelProto = program.model_proto
    return proto


def encode(proto: ModelProto, snapshot: Snapshot) -> bytes:
    """Replaces the float weights of a graph by integers, and optimizes the rest of it.

    Args:
        proto: a graph that `trace` gave; it is changed.
        snapshot: the tensors of the same model.

    Returns:
        The file, checked.

    Raises:
        ConfigError: the graph is too large for one file, or ONNX refuses it.
    """
    coded = _find_coded(proto.graph, snapshot)
    # The optimizer does not touch weights that are inputs.
    _make_inputs(proto.graph, coded)
    proto = optimizer.optimize(proto)
    _remove(proto.graph.input, coded)
    _remove_notes(proto)
    _decode(proto.graph, coded, snapshot.records)
    size = proto.ByteSize()
    if size > MAX_BYTES:
        raise ConfigError(
            f"An ONNX file has at most {MAX_BYTES} bytes, got {size}. Quantize more of the model, "
            "or export its parts one by one."
        )
    try:
        checker.check_model(proto, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise ConfigError(
            f"torch must export a valid graph, but ONNX refuses this one: {error}. Replace the "
            "layers that torch cannot export, such as an LSTM with proj_size."
        ) from error
    data: bytes = proto.SerializeToString()
    return data


def _find_coded(graph: GraphProto, snapshot: Snapshot) -> dict[str, str]:
    """The initializers that are stored as integers, each with the name of its record."""
    found = {}
    for tensor in graph.initializer:
        name = snapshot.aliases.get(tensor.name, tensor.name)
        record = snapshot.records.get(name)
        if record is not None and is_coded(record) and _holds(tensor, record):
            found[tensor.name] = name
    return found


def _holds(tensor: TensorProto, record: Record) -> bool:
    """Whether an initializer has the bits that a record decodes to."""
    decoded = typed_bytes(record_tensor(record))
    return tuple(tensor.dims) == decoded.shape and tensor.raw_data == decoded.data.tobytes()


def _make_inputs(graph: GraphProto, names: Collection[str]) -> None:
    for tensor in graph.initializer:
        if tensor.name in names:
            shape = list(tensor.dims)
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
    _remove(graph.initializer, names)


def _remove(values: Any, names: Collection[str]) -> None:
    """Removes the members of these names from a field of a graph."""
    kept = [value for value in values if value.name not in names]
    del values[:]
    values.extend(kept)


def _remove_notes(proto: ModelProto) -> None:
    """Removes shapes of values in between, and the lines of the user's code, with their paths."""
    del proto.metadata_props[:]
    proto.ClearField("doc_string")
    graphs = [proto.graph]
    for graph in graphs:
        del graph.value_info[:], graph.metadata_props[:]
        for value in [*graph.input, *graph.output, *graph.initializer]:
            del value.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.ClearField("doc_string")
            graphs += [each.g for each in node.attribute if each.HasField("g")]


def _decode(graph: GraphProto, coded: Mapping[str, str], records: Mapping[str, Record]) -> None:
    """Adds what decodes the weights, tied ones once."""
    first: dict[str, str] = {}
    nodes = []
    for value, name in coded.items():
        if name in first:
            nodes.append(helper.make_node("Identity", [first[name]], [value]))
            continue
        decoder = Decoder(records[name], value, prefix=f"diffq.{len(first)}")
        first[name] = value
        nodes += decoder.nodes
        graph.initializer.extend(decoder.constants)
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
