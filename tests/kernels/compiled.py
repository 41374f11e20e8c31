"""Compiles the kernels for GPUs that need not be there, and prints a line of JSON for each.

Run in a process without TRITON_INTERPRET: `python -m tests.kernels.compiled`.
"""

import inspect
import json

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from diffq.kernels.device.columns import GAUSSIAN, ROUNDING, UNIFORM
from diffq.kernels.device.noise import backward_kernel, finish_kernel, sample_kernel
from diffq.kernels.device.scale import scaled_backward_kernel, scaled_finish_kernel, scaled_kernel
from diffq.kernels.device.scan import scan_kernel
from diffq.kernels.layout import PARTS, Tile

#: The types of arguments by name; those that are left out are "i32".
TYPES = {
    **dict.fromkeys(("addresses", "table", "seed"), "*i64"),
    **dict.fromkeys(("pieces", "chunks", "places"), "*i32"),
    **dict.fromkeys(("given", "ends", "logit_grads", "totals"), "*fp32"),
    **dict.fromkeys(("scales", "scale_grads", "levels"), "*fp32"),
    **dict.fromkeys(("least", "interval", "scale", "rate"), "fp32"),
}
NAMES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}

#: Compute capability, dtype, alignment, kind of noise, group size.
CASES = [
    (90, "fp32", True, GAUSSIAN, 8),
    (90, "bf16", True, ROUNDING, 8),
    (80, "fp32", True, ROUNDING, None),
    (80, "fp16", False, UNIFORM, 12),
]


def kernels(name, aligned, kind, group_size):
    """Each kernel with its constants and the types of its buffers."""
    tile, whole = Tile.of(group_size), {"WHOLE": group_size is None}
    reading = {"WTYPE": NAMES[name], "ALIGNED": aligned}
    how = {"KIND": kind.value, "LEARNED": True, "PARTS": PARTS, **whole}
    sizes = {"R": tile.rows, "C": tile.columns, "G": tile.weights}
    sampling = {"MASKED": kind is ROUNDING}
    values, both = {"values": f"*{name}"}, {"grads": f"*{name}", "weight_grads": f"*{name}"}
    yield scan_kernel, {**reading, "BLOCK": 4096}, {}
    yield sample_kernel, {**reading, **how, **sizes, **sampling}, values
    yield backward_kernel, {**reading, **how, **sizes}, both
    yield finish_kernel, {**how, "BLOCK": 1024}, both
    if kind is ROUNDING:
        yield scaled_kernel, {**reading, "BLOCK": 4096}, values
        yield scaled_backward_kernel, {**reading, "BLOCK": 4096}, both
        yield scaled_finish_kernel, {"BLOCK": 1024}, {}


def ptx(kernel, constants, buffers, capability):
    """The kernel's PTX."""
    names = list(inspect.signature(kernel.fn).parameters)
    types = {name: {**TYPES, **buffers}.get(name, "i32") for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    # A launch past Triton's Python would reuse what is compiled for a number as a constant.
    assert all(p.do_not_specialize for p in kernel.params if types[p.name] == "i32")
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name].startswith("*") and not kernel.params[place].do_not_specialize_on_alignment
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, values, attributes)
    target = GPUTarget("cuda", capability, 32)
    return compile(source, target=target, options={"num_warps": 4}).asm["ptx"]


def main():
    """Compiles all of them."""
    for capability, *case in CASES:
        for kernel, constants, buffers in kernels(*case):
            row = {"kernel": kernel.fn.__name__, "capability": capability}
            row["constants"] = {name: str(value) for name, value in constants.items()}
            row["ptx"] = ptx(kernel, constants, buffers, capability)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
