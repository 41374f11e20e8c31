"""Time and memory of reading a file: PYTHONPATH=CHECKOUT python benchmarks/reading.py FILE.

FILE holds `make_model(50)` of codec_worker.py, as `attach(50)` there quantizes it; it is made
if it is missing. To compare two checkouts, run them in turns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffq
from codec_worker import Meter, attach, make_model


def open_file(path: Path) -> None:
    diffq.open(path).close()


def read_one(path: Path) -> None:
    with diffq.open(path) as stored:
        stored["5.weight"]


def main() -> None:
    path, meter = Path(sys.argv[1]), Meter()
    if not path.exists():
        _, quantizer = attach(50)
        diffq.save(quantizer, path)
        del quantizer
    model = make_model(50)
    meter.measure("load into a model", lambda: diffq.load(path, model))
    meter.measure("load a dict", lambda: diffq.load(path) and None)
    meter.measure("verify", lambda: diffq.verify(path))
    meter.measure("open", lambda: open_file(path))
    meter.measure("open, one tensor", lambda: read_one(path))
    print(json.dumps(meter.results))


if __name__ == "__main__":
    main()
