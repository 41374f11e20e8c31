"""Makes golden files of the current version of the format, with the arrays they decode to.

    python -m tests.format.make_golden

A golden file is never made again: readers must read it for ever, whatever writers do. The
script writes those that are missing and leaves the others alone.
"""

import json
from pathlib import Path

import numpy as np

from diffq.format import layout
from diffq.format.container import encode
from diffq.format.dtypes import FLOAT_DTYPES, ITEM_SIZES
from diffq.format.kinds.product import ProductRecord
from diffq.format.records import (
    FIRST_STEP,
    LAST_STEP,
    GridRecord,
    RawRecord,
    ScaledRecord,
    SteppedRecord,
)
from tests.format.craft import File, chunk
from tests.format.samples import (
    expected_array,
    grid,
    matrix,
    product,
    random_levels,
    raw,
    small_model,
    stepped,
    stepped_model,
)

FOLDER = Path(__file__).parent / "golden"


def every_bitwidth():
    """Bitwidths 1 to 15 in one tensor, alone, per group, and around zero."""
    bits = np.tile(np.arange(1, 16), 6).astype(np.uint8)
    levels = random_levels(bits, 7, bits.size * 7 - 3, seed=0)
    head = (levels.size,), "float32", 7, 1, bits, levels
    sides = np.sort(np.random.default_rng(1).standard_normal((bits.size, 2)), axis=1)
    records = {
        "mixed": GridRecord(*head, np.float32([[-0.3, 0.7]])),
        "per_group": GridRecord(*head, sides.astype(np.float32)),
        "scaled": ScaledRecord(*head, np.float32([0.01])),
    }
    for width in range(1, 16):
        one = random_levels(np.uint8([width]), 21, 21, seed=width)
        fields = (3, 7), "float32", 21, width, np.uint8([width]), one
        records[f"all_{width}"] = GridRecord(*fields, np.float32([[-1, width]]))
    return records


def zero_points():
    """Grids with a level at zero: of every bitwidth and dtype, per group, and where none can be."""
    bits = np.tile(np.arange(1, 16), 6).astype(np.uint8)
    numel = bits.size * 7 - 3
    head = (numel,), "float32", 7, 1, bits, random_levels(bits, 7, numel, seed=2)
    sides = np.sort(np.random.default_rng(3).standard_normal((bits.size, 2)), axis=1)
    sides[:3] = (0, 0), (-1, 0), (0, 2)
    records = {
        "mixed": GridRecord(*head, np.float32([[-0.3, 0.7]]), zero_point=True),
        "per_group": GridRecord(*head, sides.astype(np.float32), zero_point=True),
        "above": GridRecord(*head, np.float32([[0.25, 2]]), zero_point=True),
        # Steps of the smallest float32, and steps that are rounded down to 0.
        "tiny": GridRecord(*head, np.float32([[-22 * 2.0**-149, 0]]), zero_point=True),
        "plain": GridRecord(*head, np.float32([[-0.3, 0.7]])),
    }
    for dtype in FLOAT_DTYPES:
        records[dtype] = GridRecord(**{**vars(records["mixed"]), "dtype": dtype})
    return records


def every_dtype():
    """Raw tensors of every dtype, floats as float16, and grids of every dtype."""
    random = np.random.default_rng(0)
    records = {}
    for dtype, size in ITEM_SIZES.items():
        data = random.integers(0, 2 if dtype == "bool" else 200, 6 * size, np.uint8)
        records[f"raw.{dtype}"] = RawRecord((2, 3), dtype, dtype, data)
    for dtype in FLOAT_DTYPES:
        data = random.standard_normal(5).astype(np.float16).view(np.uint8)
        records[f"half.{dtype}"] = RawRecord((5,), dtype, "float16", data)
        records[f"grid.{dtype}"] = GridRecord(**{**vars(grid(30, 4)), "dtype": dtype})
    records["scalar"] = raw(np.float64(np.pi), "float64")
    records["none"] = RawRecord((3, 0, 2), "int64", "int64", np.zeros(0, np.uint8))
    records["specials"] = raw(np.float32([np.nan, np.inf, -np.inf, -0.0, 1e-45]))
    return records


def long_tensors():
    """Tensors cut in several segments, of groups and within groups; levels that compress well."""
    numel = layout.MAX_WEIGHTS + 1000
    levels = np.resize(np.arange(4, dtype=np.uint16), numel)
    records = {}
    for group_size in (1 << 19, numel):
        bits = np.full(-(-numel // group_size), 2, np.uint8)
        fields = (numel,), "float32", group_size, 2, bits, levels
        records[f"groups.{group_size}"] = GridRecord(*fields, np.float32([[-1, 2]]))
    records["raw"] = raw(np.resize(np.arange(7, dtype=np.uint8), layout.MAX_BYTES + 10), "uint8")
    return records


def shared_segments():
    """Short tensors of different statistics that share segments."""
    sizes = {
        f"layers.{i}.weight": grid(300 + 40 * i, 8, (2, 6), i, tail=(None, 3)[i % 2])
        for i in range(10)
    }
    biases = {
        f"layers.{i}.bias": raw(np.random.default_rng(i).standard_normal(8).astype(np.float32))
        for i in range(10)
    }
    return {**sizes, **biases}


def steps():
    """Steps of every number, bitwidth and dtype, in groups that divide the tensor and do not."""
    numbers = np.arange(FIRST_STEP, LAST_STEP + 1).astype(np.int16)
    bits = np.resize(np.arange(1, 16), numbers.size).astype(np.uint8)
    numel = 3 * numbers.size - 2
    head = (numel,), "float32", 3, 1, bits, random_levels(bits, 3, numel, seed=4)
    records = {**stepped_model(), "numbers": SteppedRecord(*head, numbers)}
    for width in range(1, 16):
        records[f"all_{width}"] = stepped((30, 20), 20, width, seed=width)
    for dtype in FLOAT_DTYPES:
        records[dtype] = stepped((7, 9), 8, 5, dtype=dtype)
    return records


def long_steps():
    """Stepped tensors cut in several segments, of groups and within groups."""
    rows, columns = 1050, 1000
    records = {}
    for group_size in (300_007, rows * columns):
        levels = np.full((rows, columns), 8, np.uint16)
        levels[::50, ::7] = np.resize(np.uint16([7, 9, 9, 12]), levels[::50, ::7].shape)
        groups = -(-levels.size // group_size)
        bits = np.full(groups, 4, np.uint8)
        numbers = np.resize(np.int16([-30, -28, -25]), groups)
        head = levels.shape, "float32", group_size, 4, bits, levels.reshape(-1)
        records[f"groups.{group_size}"] = SteppedRecord(*head, numbers)
    return records


def codebooks():
    """Indices of 0 to 12 bits, codewords of every dtype, and blocks of every kind of layer."""
    records = {}
    for width in range(13):
        codewords = (1 << width >> 1) + 1
        stored = ("uint8", "float16", "float32")[width % 3]
        records[f"of_{codewords}"] = product(max(codewords, 50), codewords, 1 + width % 2, stored)
    for dtype in FLOAT_DTYPES:
        one = product(30, 7, 4, "uint8", seed=1)
        records[f"to_{dtype}"] = ProductRecord(**{**vars(one), "dtype": dtype})
    shapes = {"linear": (6, 16, 8), "conv": (4, 3, 3, 3, 9), "kernels": (4, 4, 3, 3, 18)}
    shapes |= {"pointwise": (6, 8, 1, 1, 4), "depthwise": (5, 1, 5, 5, 5)}
    for name, (*shape, block_size) in shapes.items():
        blocks = np.prod(shape) // block_size
        records[name] = product(blocks, min(blocks, 8), block_size, shape=tuple(shape))
    return records


def runs():
    """Levels with classes: of several tensors, in rows and not, of one bitwidth and several."""
    wide = matrix(30, 40, 0.1, seed=3)
    bits = np.resize(np.uint8([4, 5, 4, 7]), 300)
    head = wide.shape, "float32", 4, 4, bits, wide.levels
    return {
        "matrix.a": matrix(40, 30, 0.1),
        "matrix.b": matrix(24, 60, 0.4, seed=1),
        "one.row": matrix(1, 70, 0.2, seed=2),
        "mixed": GridRecord(*head, np.float32([[-2, 1]]), zero_point=True),
        "norm": raw(np.linspace(0.5, 1.5, 9, dtype=np.float32)),
    }


def skewed_bitwidths():
    """Levels of 1 to 15 bits of which few are frequent, and all bitwidths in one tensor."""
    random, records = np.random.default_rng(5), {}
    bits = np.tile(np.arange(1, 16), 20).astype(np.uint8)
    for name, widths in (("mixed", bits), *((f"all_{w}", np.uint8([w])) for w in range(1, 16))):
        size = 8 if name == "mixed" else 400
        top = (1 << np.repeat(widths.astype(np.int64), size)) - 1
        near = np.rint(random.laplace(size=top.size) * 0.3).astype(np.int64)
        levels = (top // 2 + near).clip(0, top).astype(np.uint16)
        head = (levels.size // 20, 20), "float32", size, int(widths.min()), widths, levels
        records[name] = GridRecord(*head, np.float32([[-1, 2]]))
    return records


def skewed_codebooks():
    """Indices of 1 to 12 bits of which few are frequent."""
    random, records = np.random.default_rng(6), {}
    for width in (1, 2, 5, 8, 9, 12):
        codewords = (1 << width - 1) + 1
        blocks = max(codewords, 900)
        indices = (random.random(blocks) ** 40 * codewords).astype(np.uint16)
        words = random.integers(0, 256, (codewords, 1), np.uint8)
        head = (blocks,), "float16", words, indices
        records[f"of_{codewords}"] = ProductRecord(*head, 0.25, 100)
    return records


def long_runs():
    """Nearly empty tensors cut in several segments: within rows, and within one group."""
    records = {}
    for columns, group_size in ((1000, 1 << 19), (700, None)):
        rows = layout.MAX_WEIGHTS // columns + 2
        levels = np.full((rows, columns), 8, np.uint16)
        levels[::50, ::7] = np.resize(np.uint16([7, 9, 9, 12]), levels[::50, ::7].shape)
        group_size = group_size or levels.size
        bits = np.full(-(-levels.size // group_size), 4, np.uint8)
        head = levels.shape, "float32", group_size, 4, bits, levels.reshape(-1)
        records[f"rows.{columns}"] = ScaledRecord(*head, np.float32([0.5]))
    return records


def long_codebooks():
    """Indices of 16 bits, and more indices than a segment holds; both compress well."""
    long = np.arange(33_000).astype(np.uint16)
    words = (long % 256).astype(np.uint8)[:, None]
    indices = np.resize(np.arange(3, dtype=np.uint16), layout.MAX_WEIGHTS + 1000)
    pairs = np.float16([[0.5, -0.5], [1, 2], [-0.0, 3]])
    return {
        "codewords": ProductRecord((33_000,), "float32", words, long, 0.5, 3),
        "blocks": ProductRecord((indices.size, 2), "float32", pairs, indices),
    }


def example():
    """The example of docs/format.md."""
    levels = np.uint16([0, 1, 2, 3, 0, 1, 6, 7, 3, 2, 1, 0])
    bits, ranges = np.uint8([2, 3, 2]), np.float32([[-1.5, 2]])
    return {
        "w": GridRecord((3, 4), "float32", 4, 2, bits, levels, ranges),
        "b": raw(np.float32([1, -2])),
    }


MODELS = {
    "example": (example(), {"tied": "w"}, {"by": "me"}, "packed"),
    "mixed": (
        small_model(),
        {"head.weight": "embed.weight", "ünïcode": "norm.steps"},
        {"epoch": 3, "nested": [{"a": None}, "é", -1.5]},
        "zstd",
    ),
    "mixed_packed": (small_model(), {}, {}, "packed"),
    "every_bitwidth": (every_bitwidth(), {}, {}, "zstd"),
    "every_bitwidth_packed": (every_bitwidth(), {}, {}, "packed"),
    "zero_points": (zero_points(), {}, {}, "zstd"),
    "zero_points_packed": (zero_points(), {}, {}, "packed"),
    "every_dtype": (every_dtype(), {}, {}, "zstd"),
    "long": (long_tensors(), {}, {}, "zstd"),
    "shared": (shared_segments(), {}, {}, "zstd"),
    "no_tensors": ({}, {}, {}, "zstd"),
    "product": (codebooks(), {}, {}, "zstd"),
    "product_packed": (codebooks(), {}, {}, "packed"),
    "product_long": (long_codebooks(), {}, {}, "zstd"),
    "runs": (runs(), {"tied": "matrix.a"}, {"by": "me"}, "rans"),
    "runs_bitwidths": (skewed_bitwidths(), {}, {}, "rans"),
    "runs_product": (skewed_codebooks(), {}, {}, "rans"),
    "runs_long": (long_runs(), {}, {}, "rans"),
    "steps": (steps(), {"tied": "all_3"}, {"by": "me"}, "zstd"),
    "steps_packed": (steps(), {}, {}, "packed"),
    "steps_runs": (steps(), {}, {}, "rans"),
    "steps_long": (long_steps(), {}, {}, "zstd"),
}


def write(name, data, records, aliases, metadata):
    """Writes a golden file and what it decodes to, unless it exists."""
    path = FOLDER / f"{name}.diffq"
    if path.exists():
        return
    arrays = {f"tensor:{key}": expected_array(record) for key, record in records.items()}
    text = json.dumps({"aliases": aliases, "metadata": metadata})
    np.savez_compressed(path.with_suffix(".npz"), text=np.array(text), **arrays)
    path.write_bytes(data)


def main():
    """Writes the golden files that are missing."""
    for name, (records, aliases, metadata, codec) in MODELS.items():
        write(name, encode(records, aliases, metadata, codec), records, aliases, metadata)
    extra = File(extra=(chunk(b"note", b"skip me"),))
    levels = np.uint16([0, 1, 2, 3, 3, 2, 1, 0])
    head = (8,), "float32", 8, 2, np.uint8([2]), levels
    write("unknown_chunk", extra.build(), {"w": GridRecord(*head, np.float32([[0, 3]]))}, {}, {})


if __name__ == "__main__":
    main()
