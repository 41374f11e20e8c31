"""diffq.format stands alone: NumPy, zstandard and the standard library."""

import subprocess
import sys

from diffq.format.container import encode
from tests.format.samples import small_model

CODE = """
import sys
from diffq.format.container import decode
from diffq.format.reader import Reader
reader = Reader(open(sys.argv[1], "rb").read())
assert list(reader.entries)
heavy = {name.split(".")[0] for name in sys.modules} & {"torch", "rich", "safetensors", "scipy"}
assert not heavy, heavy
assert "concurrent.futures" not in sys.modules
reader.verify()
assert "torch" not in sys.modules
"""


def test_files_are_read_without_torch(tmp_path):
    """Importing the format, opening a file and reading its tensors never imports torch."""
    path = tmp_path / "model.diffq"
    path.write_bytes(encode(small_model()))
    subprocess.run([sys.executable, "-c", CODE, str(path)], check=True)
