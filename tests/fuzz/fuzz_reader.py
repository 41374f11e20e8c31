"""Coverage-guided fuzzing of the reader with atheris (pip install atheris).

    python -m tests.fuzz.fuzz_reader -max_total_time=600 CORPUS_FOLDER

An input with the signature is read as it is. Of any other, a file is made: an index and
data with sound checksums around them. Anything but tensors or a FormatError stops the run
and is kept as crash-*. The corpus starts from the golden files, whole and taken apart.
"""

import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["diffq"]):
    import diffq.format.container  # noqa: F401

from tests.format.craft import MAGIC
from tests.fuzz.target import read, repaired_checksums, take_apart, with_checksums

GOLDEN = Path(__file__).parents[1] / "format" / "golden"


def fuzz(data):
    """One input: a file, or two bytes of length, an index and data."""
    if data.startswith(MAGIC):
        read(data)
        return
    size = int.from_bytes(data[:2], "little")
    with repaired_checksums():
        for minor in (0, 1):
            read(with_checksums(data[2 : 2 + size], data[2 + size :], minor=minor))


def plant(folder):
    """Writes the golden files, whole and taken apart, to an empty corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in GOLDEN.glob("*.diffq"):
        data = path.read_bytes()
        index, body, _ = take_apart(data)
        (folder / f"{path.stem}.whole").write_bytes(data)
        (folder / f"{path.stem}.parts").write_bytes(len(index).to_bytes(2, "little") + index + body)


if __name__ == "__main__":
    # A warning of NumPy would reach the user.
    warnings.simplefilter("error")
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if folders:
        plant(Path(folders[0]))
    atheris.Setup(sys.argv, fuzz)
    atheris.Fuzz()
