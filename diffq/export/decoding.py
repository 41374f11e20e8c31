"""Records as nodes of an ONNX graph: integers, and the operations that decode them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from diffq.format.dtypes import little_endian
from diffq.format.kinds.affine import Affine
from diffq.format.kinds.base import Bytes, Floats, Levels, Record
from diffq.format.kinds.levels import LevelRecord
from diffq.format.kinds.product import ProductRecord, index_bits
from diffq.format.kinds.raw import RawRecord

#: Bitwidths of the integer types of a graph.
_STORED_BITS = (4, 8, 16)

# Where dtypes have other names in ONNX.
_NAMES = {"float32": "FLOAT", "float64": "DOUBLE"}


def is_coded(record: Record) -> bool:
    """Whether a graph stores a tensor as something else than its elements."""
    if isinstance(record, RawRecord):
        return record.stored_dtype != record.dtype
    return record.numel > 0 and isinstance(record, LevelRecord | ProductRecord)


class Decoder:
    """Nodes and constants that decode a tensor to the bits of its record.

    Each operation on floats is a node of its own, which a runtime rounds to float32 as NumPy does.

    Args:
        record: a tensor that `is_coded`.
        name: the name of the decoded tensor in the graph.
        prefix: what all other names begin with.

    Attributes:
        nodes: the nodes, in the order of their execution.
        constants: the initializers that they read.
    """

    def __init__(self, record: Record, name: str, prefix: str) -> None:
        self._prefix = prefix
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        value, dtype = self._stored(record)
        if dtype != record.dtype:
            self._cast(value, record.dtype)
        self.nodes[-1].output[0] = name

    def _stored(self, record: Record) -> tuple[str, str]:
        """The value of a record and its dtype, before it is converted to the tensor's."""
        if isinstance(record, LevelRecord):
            return self._levels(record), "float32"
        if isinstance(record, ProductRecord):
            return self._blocks(record), "float32"
        stored = record.decoded()
        return self._constant("elements", stored.dtype, stored.shape, stored.data), stored.dtype

    def _levels(self, record: LevelRecord) -> str:
        mixed = not record.constant and bool((record.bits != record.bits[0]).any())
        if not (mixed or record.per_group):
            levels = self._unsorted(record, record.levels.reshape(record.shape))
            return self._affine(record.affine(record.bits[:1]), levels)
        rows = np.zeros((record.bits.size, record.group_size), np.uint16)
        rows.reshape(-1)[: record.numel] = record.levels
        if mixed:
            levels, bits = self._sorted(rows, record.bits)
        else:
            levels, bits = self._unsorted(record, rows), ""
        if record.per_group:
            value = self._affine(record.affine(record.bits), levels)
        else:
            # A table by bitwidth. No group has 0 bits, which would divide by 0.
            widths = np.arange(int(record.bits.max()) + 1, dtype=np.uint8).clip(1)
            value = self._affine(record.affine(widths), levels, bits)
        return self._flat(value, rows.size, record)

    def _unsorted(self, record: LevelRecord, levels: Levels) -> str:
        """Levels of one bitwidth, as float32 of their shape."""
        if record.constant:
            return self._node("ConstantOfShape", self._sizes("levels", levels.shape))
        return self._cast(self._integers("levels", levels, int(record.bits[0])), "float32")

    def _sorted(self, rows: Levels, bits: Bytes) -> tuple[str, str]:
        """Levels of several bitwidths, as float32 [groups, group_size], and int32 bits [groups, 1].

        Groups are stored by rising bitwidth, those of an integer type together. Sorting the
        bitwidths, where equal ones keep their order, tells at which place each belongs.
        """
        places = np.argsort(bits, kind="stable")
        rows, rising = rows[places], bits[places]
        parts, below = [], 0
        for most in _STORED_BITS:
            part = rows[(below < rising) & (rising <= most)]
            below = most
            if part.size:
                parts.append(self._cast(self._integers(f"levels{most}", part, most), "float32"))
        joined = self._node("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]
        widths = self._cast(self._integers("bits", bits[:, None], 4), "int32")
        order = self._second("TopK", widths, self._sizes("groups", bits.shape), axis=0, largest=0)
        return self._node("ScatterND", joined, order, joined), widths

    def _affine(self, affine: Affine, levels: str, bits: str = "") -> str:
        """Levels to values; parameters that are no scalars are of bitwidths, or of groups."""
        value = levels
        if affine.zero is not None:
            value = self._node("Sub", value, self._parameter("zero", affine.zero, bits))
        value = self._node("Mul", value, self._parameter("step", affine.step, bits))
        if affine.added is not None:
            value = self._node("Add", value, self._parameter("low", affine.added, bits))
        return value

    def _parameter(self, name: str, values: Floats, bits: str) -> str:
        if values.size == 1:
            return self._array(name, values.reshape(()))
        if bits:
            return self._node("Gather", self._array(name, values), bits)
        return self._array(name, values[:, None])

    def _flat(self, rows: str, size: int, record: LevelRecord) -> str:
        """Rows of groups in the shape of the tensor, without the padding of the last group."""
        if size > record.numel:
            flat = self._node("Reshape", rows, self._sizes("flat", (-1,)))
            start, end = self._sizes("start", (0,)), self._sizes("end", (record.numel,))
            rows = self._node("Slice", flat, start, end)
        return self._node("Reshape", rows, self._sizes("shape", record.shape))

    def _blocks(self, record: ProductRecord) -> str:
        words = self._array("codebook", record.codebook)
        if record.stored_dtype != "float32":
            words = self._cast(words, "float32")
        if record.stored_dtype == "uint8":
            scale, zero = np.array([record.scale], np.float32), np.array([record.zero], np.float32)
            words = self._affine(Affine(scale, zero), words)
        bits = index_bits(len(record.codebook))
        indices = self._cast(self._integers("indices", record.indices, bits), "int32")
        blocks = self._node("Gather", words, indices)
        return self._node("Reshape", blocks, self._sizes("shape", record.shape))

    def _integers(self, name: str, values: NDArray[Any], bits: int) -> str:
        """Integers below 2**bits, in the smallest type for them."""
        stored = next(each for each in _STORED_BITS if bits <= each)
        if stored > 4:
            return self._array(name, values.astype(f"uint{stored}"))
        flat = np.zeros(values.size + values.size % 2, np.uint8)
        flat[: values.size] = values.reshape(-1)
        low, high = flat[::2], flat[1::2]
        return self._constant(name, "uint4", values.shape, low | high << np.uint8(4))

    def _sizes(self, name: str, sizes: tuple[int, ...]) -> str:
        return self._array(name, np.array(sizes, np.int64))

    def _array(self, name: str, array: NDArray[Any]) -> str:
        return self._constant(name, array.dtype.name, array.shape, little_endian(array))

    def _constant(self, name: str, dtype: str, shape: tuple[int, ...], data: Bytes) -> str:
        full = f"{self._prefix}.{name}"
        tensor = helper.make_tensor(full, onnx_type(dtype), shape, data.tobytes(), raw=True)
        self.constants.append(tensor)
        return full

    def _cast(self, value: str, dtype: str) -> str:
        return self._node("Cast", value, to=onnx_type(dtype))

    def _second(self, operation: str, *inputs: str, **attributes: Any) -> str:
        """The second of the two outputs of a node."""
        return self._nodes(operation, inputs, 2, attributes)[1]

    def _node(self, operation: str, *inputs: str, **attributes: Any) -> str:
        """The only output of a node."""
        return self._nodes(operation, inputs, 1, attributes)[0]

    def _nodes(
        self, operation: str, inputs: Sequence[str], count: int, attributes: Mapping[str, Any]
    ) -> list[str]:
        outputs = [f"{self._prefix}.{len(self.nodes)}.{index}" for index in range(count)]
        self.nodes.append(helper.make_node(operation, inputs, outputs, **attributes))
        return outputs


def onnx_type(dtype: str) -> int:
    """The number of a dtype in ONNX, by its torch name."""
    number: int = getattr(TensorProto, _NAMES.get(dtype, dtype.upper()))
    return number
