"""Matrix products whose last digits differ from call to call, as they do between processors.

A processor's kernels round as its vector width, the memory layout, the alignment and the number
of threads make them, so two ways through the same mathematics agree only to some digits, on another
machine if not on this one. No setting turns one processor into another. With `PERTURB=1` in the
environment, torch's CPU kernels are therefore replaced: each call computes what it did, and moves
the last digits of the result. A test that passes so compares nothing bit for bit that a
matrix product computed.

Equal runs of the same code on one machine do give equal bits, as a resumed training must. Under
`@repeatable()`, the last digits depend on memory layouts and threads alone.
"""

import itertools
import math
import os
import threading
import warnings
import zlib
from contextlib import contextmanager
from functools import partial

import torch

#: The operators that multiply and sum, with those that fuse several of them.
PRODUCTS = [
    *("mm", "mm.out", "addmm", "addmm.out", "addmm_", "_addmm_activation", "_addmm_activation.out"),
    *("bmm", "bmm.out", "baddbmm", "baddbmm.out", "baddbmm_", "addbmm", "addbmm.out", "addbmm_"),
    *("addmv", "addmv.out", "addmv_", "dot", "vdot", "_trilinear", "_cdist_forward"),
    *("convolution", "convolution_backward", "conv_tbc"),
    *("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"),
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_calls = itertools.count()
_repeating = False


def wanted():
    """Whether the environment asks for perturbed kernels."""
    return os.environ.get("PERTURB", "") not in ("", "0")


@contextmanager
def perturbed():
    """Replaces the kernels of all `PRODUCTS`, in every thread of this process."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():
        # torch warns of each kernel that is replaced.
        warnings.simplefilter("ignore")
        for name in PRODUCTS:
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, partial(_call, name, kernel), with_keyset=True)
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def repeatable():
    """Lets equal calls give equal bits: for what one machine does twice, such as resuming."""
    global _repeating
    before, _repeating = _repeating, True
    try:
        yield
    finally:
        _repeating = before


def _call(name, kernel, keys, *args, **options):
    if torch.jit.is_tracing():
        return kernel.call_boxed(keys, *args, **options)  # or the noise would be traced
    # Before the call, which may write to its arguments.
    seed = _seed(name, [*args, *options.values()])
    outputs = kernel.call_boxed(keys, *args, **options)
    generator = torch.Generator().manual_seed(seed)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            _move_last_digits(output, generator)
    return outputs


def _seed(name, arguments):
    """A number for all that a kernel's rounding may depend on."""
    facts = [
        name,
        torch.get_num_threads(),
        threading.current_thread() is threading.main_thread(),
        *(_layout(a) for a in arguments if isinstance(a, torch.Tensor)),
    ]
    if not _repeating:
        facts.append(next(_calls))
    return zlib.crc32(repr(facts).encode())


def _layout(tensor):
    return tuple(tensor.shape), tensor.stride(), tensor.data_ptr() % 64


def _move_last_digits(output, generator):
    """Adds some units in the last place, as sums in another order do."""
    # What cancels out is as wrong as what it was the sum of.
    typical = (output.norm(dtype=torch.double) / max(output.numel(), 1) ** 0.5).nan_to_num(0, 0)
    share = torch.rand(output.shape, generator=generator, dtype=output.dtype).sub_(0.5)
    units = share.mul_(output.abs().add_(typical)).mul_(4 * torch.finfo(output.dtype).eps)
    output.add_(torch.where(_rounded(output), units, 0))


def _rounded(values):
    """Where the last half of the digits is not zero, unlike in exact values such as 0 or 1.5."""
    digits = round(-math.log2(torch.finfo(values.dtype).eps))
    integers = values.contiguous().view(_INTEGERS[values.element_size()])
    return integers & (2 ** (digits // 2) - 1) != 0
