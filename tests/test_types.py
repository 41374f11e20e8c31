"""Type checkers: they take the public names of `diffq`, and no others."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import diffq

PACKAGE = Path(diffq.__file__).parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed"
)


def _complaints(folder, code):
    """The lines of `mypy --strict` about a user's module.

    Only the module and `diffq/__init__.py` are read: to follow their imports would check
    torch, which takes minutes.
    """
    snippet = folder / "snippet.py"
    snippet.write_text(code, encoding="utf-8")
    options = ["--strict", "--follow-imports=skip", "--no-error-summary", "--config-file="]
    cache = f"--cache-dir={folder / 'cache'}"
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options, cache, snippet, PACKAGE / "__init__.py"],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert result.returncode in (0, 1), result.stderr
    return [line for line in result.stdout.splitlines() if "snippet.py" in line]


def test_public_names_are_known(tmp_path):
    """Every public name passes, as an attribute and imported by name."""
    names = sorted([*diffq.__all__, "open", "plot", "__version__"])
    code = "import diffq\n"
    code += "".join(f"from diffq import {name} as {name}_\n" for name in names)
    code += "".join(f"diffq.{name}\n" for name in names)
    assert _complaints(tmp_path, code) == []


@pytest.mark.parametrize("name", ["DiffQuantiser", "open_file", "import_module", "TYPE_CHECKING"])
def test_other_names_are_errors(name, tmp_path):
    """A misspelt name, or one of the package's own helpers, fails as attribute and as import."""
    code = f"import diffq\nfrom diffq import {name}\ndiffq.{name}\n"
    lines = [line for line in _complaints(tmp_path, code) if "[attr-defined]" in line]
    assert [line.split(":")[1] for line in lines] == ["2", "3"]
