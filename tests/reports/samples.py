"""Files for pages: trained-looking tensors, raw ones, codebooks, ties, and hostile names."""

import numpy as np

from diffq.format.container import encode
from diffq.format.reader import Reader
from tests.format.samples import grid, product, raw

#: What a file may call a tensor to get markup or a script into a page.
HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</td></table><img src=x onerror=\"document.title='taken'\">",
    "\" onmouseover=\"document.title='taken'",
    "' x='&lt;b&gt;&amp;",
    "bidi\u202eabc",
    "escape\x9b31m",
    "long" * 250,
]


def records(small=False):
    """Tensors of a small model, and with fewer bits those of a smaller one."""
    bits = (2, 4) if small else (3, 7)
    return {
        "encoder.layers.0.weight": grid(6400, bits=bits, seed=1, shape=(80, 80)),
        "encoder.layers.1.weight": grid(12800, bits=bits, seed=2, shape=(160, 80)),
        "encoder.codes": product(400, 32),
        "encoder.norm.weight": raw(np.ones(80, "f4")),
        "encoder.norm.bias": raw(np.zeros(80, "f4")),
        "head": raw(np.random.default_rng(0).standard_normal(900, "f4")),
    }


def reader(small=False, **encoded):
    """A reader of a file of them, with a tie and metadata."""
    metadata = {"note": HOSTILE[0], "rate": 16000}
    return Reader(encode(records(small), {"decoder.weight": "head"}, metadata, **encoded))


def hostile():
    """A reader of a file whose names and metadata try to be markup."""
    tensors = {name: grid(4000, seed=i) for i, name in enumerate(HOSTILE)}
    tensors |= {f"raw {name}": raw(np.ones(3, "f4")) for name in HOSTILE}
    metadata = dict.fromkeys(HOSTILE, HOSTILE) | {"lone": "\ud800"}
    return Reader(encode(tensors, {f"tied {HOSTILE[0]}": HOSTILE[1]}, metadata))
