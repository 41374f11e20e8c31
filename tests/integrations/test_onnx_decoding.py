"""Records as nodes of an ONNX graph: any record decodes to its own bits in onnxruntime."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffq.format.records import GridRecord, RawRecord, ScaledRecord
from diffq.storage.state import record_tensor
from tests.format.samples import grid, grid_records, product_records, random_levels, scaled_records
from tests.integrations.tiny import library

onnx = library("onnx")
onnxruntime = library("onnxruntime")

from diffq.export.decoding import Decoder, is_coded, onnx_type  # noqa: E402

RECORDS = st.one_of(grid_records(), scaled_records(), product_records())


def decode(record, optimize):
    """What onnxruntime decodes of a record, as bytes."""
    decoder = Decoder(record, "weight", "diffq.0")
    # As float64, whose bits are one to one, since NumPy lacks bfloat16.
    nodes = [*decoder.nodes, onnx.helper.make_node("Cast", ["weight"], ["out"], to=11)]
    output = onnx.helper.make_tensor_value_info("out", 11, record.shape)
    graph = onnx.helper.make_graph(nodes, "decode", [], [output], decoder.constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    (found,) = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {})
    return found


def same(record, optimize=True):
    """Whether onnxruntime decodes a record to its bits."""
    found, wanted = decode(record, optimize), record_tensor(record).double().numpy()
    return found.shape == wanted.shape and found.tobytes() == wanted.tobytes()


@settings(max_examples=150, deadline=None)
@given(RECORDS.filter(is_coded), st.booleans())
def test_any_record(record, optimize):
    """Grids, scaled levels and codebooks of any dtype decode to their bits, folded or not."""
    assert same(record, optimize)


def every_bitwidth():
    """A grid with groups of 1 to 15 bits in random order."""
    bits = np.random.default_rng(0).permutation(np.tile(np.arange(1, 16), 90)).astype(np.uint8)
    levels = random_levels(bits, 3, 3 * bits.size, seed=1)
    return GridRecord((levels.size,), "float32", 3, 1, bits, levels, np.float32([[-1.3, 2.1]]))


LEVELS = {
    "4 bits": grid(1000, bits=(2, 4), shape=(10, 100)),
    "8 bits": grid(1000, bits=(5, 8)),
    "16 bits": grid(1000, bits=(9, 15)),
    "all bitwidths": every_bitwidth(),
    "a short last group": grid(1003, bits=(2, 9), shape=(17, 59)),
    "groups across rows": grid(990, bits=(2, 9), shape=(66, 15)),
    "one group": grid(990, bits=(6, 6), group_size=990, shape=(66, 15)),
    "many groups": grid(800_000, bits=(2, 7)),
}


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("name", LEVELS)
def test_bitwidths_and_groups(name, optimize):
    """Levels of each integer type, and groups of each size, decode to their bits."""
    assert same(LEVELS[name], optimize)


def test_integer_types():
    """Levels up to 4, 8 and 15 bits take 4, 8 and 16 bits, and bitwidths take 4."""
    decoder = Decoder(LEVELS["all bitwidths"], "weight", "diffq.0")
    types = {constant.name: constant.data_type for constant in decoder.constants}
    wanted = {"levels4": "uint4", "levels8": "uint8", "levels16": "uint16", "bits": "uint4"}
    for name, dtype in wanted.items():
        assert types[f"diffq.0.{name}"] == onnx_type(dtype)


def test_negative_zero():
    """A constant of -0.0, and a grid from -0.0, decode to what the record gives."""
    head = (4, 4), "float32", 4, 2
    bits, levels = np.uint8([2, 3, 2, 2]), np.zeros(16, np.uint16)
    for ranges in ([[-0.0, -0.0]], [[-0.0, 1.0]], [[-0.0, 0.0]] * 4, [[-0.0, 1.0]] * 4):
        assert same(GridRecord(*head, bits, levels, np.float32(ranges)))
    assert same(ScaledRecord(*head, bits, levels, np.float32([-0.0])))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_elements_in_half_precision(dtype):
    """Elements that are stored as float16 are decoded to the tensor's dtype."""
    values = np.random.default_rng(0).standard_normal(100).astype(np.float16)
    assert same(RawRecord((4, 25), dtype, "float16", values.view(np.uint8)))


def test_elements_that_stay():
    """Elements in the tensor's own dtype, and empty tensors, stay as they are."""
    assert not is_coded(RawRecord((2,), "float16", "float16", np.zeros(4, np.uint8)))
    empty = np.zeros(0, np.uint8)
    assert not is_coded(ScaledRecord((0, 3), "float32", 1, 2, empty, empty, np.float32([1])))
