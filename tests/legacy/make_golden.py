"""Makes the golden files with the earlier diffq package, as a black box.

It was run once, with diffq 0.2.4 from PyPI, torch 2.13.0 and NumPy 2.4.6 on Python 3.11, in an
environment of its own (`benchmarks/earlier_package.sh` makes one), from a folder without a
`diffq` in it:

    cd tests/legacy && ../../.venv-earlier/bin/python make_golden.py

For each case it writes `CASE.th`, what torch.save makes of the quantized state, and
`expected.npz`, which holds under `CASE/NAME` what the earlier package restores from
that file for each parameter. Only public calls of that package are used.

`test_legacy.py` imports this file for `CASES` and `build`, which need no earlier package.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parent / "golden"

#: Above 64 weights; so that the biases and the norm stay raw.
MIN_SIZE = 64 * 4 / 2**20


class Net(nn.Module):
    """Ties across modules, a module under two names, a bias, a norm with buffers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.shared = nn.Linear(8, 24)
        self.again = self.shared
        self.norm = nn.BatchNorm1d(24)
        self.conv = nn.Conv1d(4, 6, 3, bias=False)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embed.weight


def long():
    """One layer of more than one line of 2048 packed elements."""
    return nn.Linear(139, 15, bias=False)


def build(case):
    """The plain model of a case, with fixed weights."""
    torch.manual_seed(0)
    options = CASES[case]
    model = long() if options.get("long") else Net()
    model.to(options.get("dtype", torch.float32))
    if options.get("dtype") is torch.float64:
        with torch.no_grad():
            for parameter in model.parameters():
                # Numbers that float32 does not hold.
                parameter.mul_(1.1)
    return model


#: Case to the class, its arguments, and how the state was made.
CASES = {
    "diffq-g8": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 8},
        "logits": [-9.0, -1.5],
    },
    "diffq-g8-unpacked": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 8},
        "state": {"packed": False},
    },
    "diffq-g8-torch-pack": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 8},
        "state": {"torch_pack": True},
    },
    "diffq-g1-torch-pack": {"klass": "DiffQuantizer", "args": {}, "state": {"torch_pack": True}},
    "diffq-g1-unpacked": {"klass": "DiffQuantizer", "args": {}, "state": {"packed": False}},
    "diffq-g0": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 0},
        "logits": [-2.0],
        # It fails on its own packed state here; unpacked, it restores the same levels.
        "restored": {"packed": False},
    },
    "diffq-g0-unpacked": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 0},
        "state": {"packed": False},
    },
    "diffq-bits-4-to-10": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 4, "min_bits": 4, "max_bits": 10},
        "state": {"torch_pack": True},
    },
    "diffq-extra-bits": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 4, "extra_bits": 2, "max_bits": 12},
        "state": {"torch_pack": True},
    },
    "diffq-15-unpacked": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 8},
        "state": {"packed": False},
        # Packed, it leaves the levels of 15 bits out.
        "logits": [-9.0, 40.0],
    },
    "diffq-float16": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 2, "float16": True, "exclude": ["conv.*"]},
        "state": {"torch_pack": True},
    },
    "diffq-not-bound": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 8, "detect_bound": False},
        "state": {"packed": False},
    },
    "diffq-half-model": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 8},
        "state": {"torch_pack": True},
        "dtype": torch.float16,
    },
    "diffq-double-model": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 8},
        "state": {"packed": False},
        "dtype": torch.float64,
    },
    "diffq-two-lines": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 15},
        "logits": [-9.0, -9.0, -1.5],
        "long": True,
    },
    "diffq-old-zip": {
        "klass": "DiffQuantizer",
        "args": {"group_size": 8},
        "state": {"torch_pack": True},
        "save": {"_use_new_zipfile_serialization": False},
    },
    "uniform-8": {"klass": "UniformQuantizer", "args": {}},
    "uniform-3": {"klass": "UniformQuantizer", "args": {"bits": 3, "qat": True}, "long": True},
    "uniform-3-unpacked": {
        "klass": "UniformQuantizer",
        "args": {"bits": 3, "float16": True},
        "state": {"packed": False},
    },
    "uniform-15-unpacked": {
        "klass": "UniformQuantizer",
        "args": {"bits": 15},
        "state": {"packed": False},
    },
    "uniform-1": {"klass": "UniformQuantizer", "args": {"bits": 1}},
    "lsq-4": {"klass": "LSQ", "args": {"bits": 4}},
    "lsq-4-unpacked": {"klass": "LSQ", "args": {"bits": 4}, "state": {"packed": False}},
    "lsq-8-torch-pack": {
        "klass": "LSQ",
        "args": {"exclude": ["embed.weight"]},
        "state": {"torch_pack": True},
    },
    "lsq-15-torch-pack": {"klass": "LSQ", "args": {"bits": 15}, "state": {"torch_pack": True}},
    "lsq-negative": {"klass": "LSQ", "args": {"bits": 5}, "negative": True},
}


def make(case, diffq, **how):
    """The state that the earlier package makes."""
    options = CASES[case]
    model = build(case)
    quantizer = getattr(diffq, options["klass"])(model, min_size=MIN_SIZE, **options["args"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_diffq"):
                # By default bitwidths of 2, 9, 4 and 13.
                logits = torch.tensor(options.get("logits", [-9.0, 0.3, -1.5, 2.0]))
                parameter.copy_(logits.repeat(parameter.numel())[: parameter.numel()])
            elif name.endswith("_lsq") and options.get("negative"):
                parameter.neg_()
    return quantizer.get_quantized_state(**{**options.get("state", {}), **how})


def restore(case, state, diffq):
    """Name to what the earlier package restores into a model of other values."""
    options = CASES[case]
    fresh = build(case)
    names = [name for name, _ in fresh.named_parameters()]
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(7)
    if isinstance(fresh, Net) and options["klass"] != "UniformQuantizer":
        # Its function for plain models fails for models with ties.
        quantizer = getattr(diffq, options["klass"])(fresh, min_size=MIN_SIZE, **options["args"])
        quantizer.restore_quantized_state(state)
    else:
        diffq.restore_quantized_state(fresh, state)
    parameters = dict(fresh.named_parameters())
    return {name: parameters[name].detach().numpy() for name in names}


def main():
    """Writes every golden file and `expected.npz`."""
    # Not this checkout's diffq: the one of the environment.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != FOLDER.parent]
    import diffq

    expected = {}
    for case, options in CASES.items():
        path = FOLDER / f"{case}.th"
        torch.save(make(case, diffq), path, **options.get("save", {}))
        state = torch.load(path, weights_only=False)
        if "restored" in options:
            state = make(case, diffq, **options["restored"])
        values = restore(case, state, diffq)
        expected.update({f"{case}/{name}": value for name, value in values.items()})
        print(case, path.stat().st_size)
    np.savez_compressed(FOLDER / "expected.npz", **expected)


if __name__ == "__main__":
    main()
