"""Compiles all kernels for GPUs that need not be there: prints a JSON line for each.

Run in a process of its own, without TRITON_INTERPRET: `python -m tests.kernels.compiled 80 90`.
"""

import inspect
import json
import re
import sys

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from diffq.kernels.device.columns import GAUSSIAN, ROUNDING, UNIFORM
from diffq.kernels.device.noise import backward_kernel, finish_kernel, sample_kernel
from diffq.kernels.device.scan import scan_kernel
from diffq.kernels.layout import GROUP_PARTS, PARTS, Tile

_NAMES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}

#: The types of arguments by name; those that are left out are "i32".
_TYPES = {
    **dict.fromkeys(("addresses", "table", "seed"), "*i64"),
    **dict.fromkeys(("pieces", "chunks", "places"), "*i32"),
    **dict.fromkeys(("given", "ends", "sums", "size", "logit_grads", "totals"), "*fp32"),
    **dict.fromkeys(("size_grad", "scales", "scale_grads", "levels"), "*fp32"),
    **dict.fromkeys(("constant", "least", "interval", "scale", "rate"), "fp32"),
}
# Pointers that may be anywhere, as the kernels declare it.
_ANYWHERE = {"given", "size_grad", "scales"}


def _cases():
    """Each kernel with its constants and the types of its buffers."""
    for wide, aligned in (("fp32", True), ("bf16", True), ("fp16", False)):
        reading = {"WTYPE": _NAMES[wide], "ALIGNED": aligned}
        yield scan_kernel, {**reading, "WHOLE_BITS": True, "BLOCK": 4096}, {}
        for kind in (GAUSSIAN, UNIFORM, ROUNDING):
            for group_size in (8, 12, None) if wide == "fp32" else (8,):
                tile = Tile.of(group_size)
                of = {"R": tile.rows, "C": tile.columns, "G": tile.weights, "PARTS": PARTS}
                of |= {**reading, "KIND": kind.value, "WHOLE": group_size is None, "LEARNED": True}
                masked = kind is ROUNDING
                more = {"MASKED": masked, "GROUP_PARTS": GROUP_PARTS}
                yield sample_kernel, {**of, **more}, {"values": f"*{wide}"}
                grads = {"grads": f"*{wide}", "weight_grads": f"*{wide}"}
                yield backward_kernel, {**of, "COPIES": False}, grads
                more = {"PARTS": PARTS, "BLOCK": 1024, "LEARNED": True}
                more |= {"KIND": kind.value, "WHOLE": group_size is None}
                yield finish_kernel, more, grads


def _compile(kernel, constants, buffers, capability):
    names = list(inspect.signature(kernel.fn).parameters)
    types = {n: "constexpr" if n in constants else {**_TYPES, **buffers}.get(n, "i32") for n in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name].startswith("*") and name not in _ANYWHERE
    }
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, attributes)
    target = GPUTarget("cuda", capability, 32)
    return compile(source, target=target, options={"num_warps": 4}).asm["ptx"]


def main(capabilities):
    """Compiles all for each compute capability."""
    for kernel, constants, buffers in _cases():
        for capability in capabilities:
            ptx = _compile(kernel, constants, buffers, capability)
            row = {"kernel": kernel.fn.__name__, "capability": capability}
            row |= {name: str(value) for name, value in constants.items()}
            row["ftz"] = len(re.findall(r"\.ftz", ptx))
            row["wide"] = len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx))
            row["fused"] = ptx.count("fma.rn.f32")
            row["ptx"] = ptx
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
