"""diffq.format stands alone: NumPy, zstandard and the standard library."""

import re
import subprocess
import sys
from pathlib import Path

import diffq.format
from diffq.format.container import encode
from tests.format.samples import small_model

FOLDER = Path(diffq.format.__file__).parent

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


def test_modules_import_only_from_those_above():
    """The order of modules in the package's docstring is the order of its imports."""
    order = re.findall(r"^    ([a-z.]+) ", diffq.format.__doc__, re.MULTILINE)
    paths = {
        ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
        for path in FOLDER.rglob("[a-z]*.py")
    }
    assert sorted(order) == sorted(paths)
    for place, module in enumerate(order):
        source = paths[module].read_text(encoding="utf-8")
        imported = set(re.findall(r"^from diffq\.format\.([a-z.]+) import", source, re.MULTILINE))
        for line in re.findall(r"^from diffq\.format import (.*)$", source, re.MULTILINE):
            imported |= {name.split(" as ")[0].strip() for name in line.split(",")}
        assert imported <= set(order[:place]), module
