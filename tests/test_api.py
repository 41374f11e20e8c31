"""The public surface, the direction of imports, and what works without torch."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import types
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import diffq
from diffq import errors

PACKAGE = Path(diffq.__file__).parent

#: Every public name, and every public package.
PUBLIC = set(diffq._LAZY)
PACKAGES = set(diffq._PACKAGES)

#: The pipeline: each package imports only from earlier ones.
STAGES = [
    "errors",
    "checks",
    "format",
    "reports",
    "torch_inside",
    "numerics",
    "kernels",
    "packed",
    "attach",
    "storage",
    "quantizers",
    "nn",
    "plot",
    "ptq",
    "export",
    "integrations",
    "cli",
    "__main__",
]


def _modules():
    """Name to parsed source of every module of the package, `diffq` itself left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name != "diffq":
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = _modules()


def _imports(tree):
    """The names that a module imports, wherever it does; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _inner_imports(name):
    """The modules of diffq that a module of diffq imports."""
    return {found for found in _imports(MODULES[name]) if found in MODULES and found != name}


# The surface


def test_all_is_what_can_be_imported():
    """`__all__` lists every public name but `open`, the errors included, and each is there."""
    loaded = {c.__name__ for c in vars(errors).values() if inspect.isclass(c)}
    assert loaded <= set(diffq.__all__)
    assert set(diffq.__all__) == (PUBLIC | PACKAGES) - {"open"}
    for name in PUBLIC:
        assert getattr(diffq, name).__name__ == ("open_file" if name == "open" else name)
    for name in PACKAGES:
        assert getattr(diffq, name).__name__ == f"diffq.{name}"


def test_type_checkers_see_what_is_there():
    """The imports for type checkers have the names of the table, from the same modules."""
    tree = ast.parse(Path(diffq.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("diffq.")
        for alias in node.names
    }
    packages = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "diffq"
        for alias in node.names
    ]
    assert set(packages) == PACKAGES
    seen["open"] = seen.pop("open_file")
    assert seen == diffq._LAZY


def test_all_is_sorted():
    """`__all__` is sorted and lists each name once."""
    assert diffq.__all__ == sorted(set(diffq.__all__))


def test_dir_shows_the_surface():
    """`dir(diffq)` shows the public names, loaded or not, and none of the helpers."""
    code = "import diffq; diffq.DiffQuantizer; print(dir(diffq))"
    for names in (dir(diffq), ast.literal_eval(_run(code))):
        assert {name for name in names if not name.startswith("__")} == PUBLIC | PACKAGES


def test_star_import():
    """`from diffq import *` gives the public names and no others, and keeps Python's `open`."""
    code = "from diffq import *; import diffq; print(sorted(set(dir()) - {'diffq'}))"
    names = _run(code)
    given = {name for name in ast.literal_eval(names) if not name.startswith("__")}
    assert given == set(diffq.__all__)
    assert "open" not in given
    assert diffq.open is not open


def test_unknown_name():
    """A name that does not exist is an AttributeError with both names."""
    with pytest.raises(AttributeError, match=r"'diffq'.*'DiffQuantiser'"):
        diffq.DiffQuantiser  # noqa: B018


def test_version():
    """The version is above those of the earlier package, 0.2.4 and below."""
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", diffq.__version__)
    assert int(diffq.__version__.split(".")[0]) >= 1


def _public_members(owner):
    """The public functions, methods and properties that a class or module defines itself."""
    for name, value in vars(owner).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property | classmethod | staticmethod):
            yield name, value.fget if isinstance(value, property) else value.__func__
        elif inspect.isfunction(value) or inspect.isclass(value):
            if value.__module__.startswith("diffq"):
                yield name, value


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_have_docstrings(name):
    """Every public name, and every public method and property of it, has a docstring."""
    value = getattr(diffq, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for owner in value.__mro__:
            if owner.__module__.startswith("diffq"):
                missing = [key for key, member in _public_members(owner) if not member.__doc__]
                assert missing == []


@pytest.mark.parametrize(
    "name",
    [
        "DiffQuantizer",
        "QATQuantizer",
        "LSQQuantizer",
        "QuantNoiseQuantizer",
        "ProductQuantizer",
    ],
)
def test_every_argument_is_documented(name):
    """A quantizer's docstring has a line for each of its arguments, and for its errors."""
    value = getattr(diffq, name)
    arguments = [p for p in inspect.signature(value.__init__).parameters if p != "self"]
    documented = re.findall(r"^    (\w+): ", inspect.getdoc(value), re.MULTILINE)
    assert documented[: len(arguments)] == arguments
    assert {"AttachError", "ConfigError", "WeightError"} <= set(documented)


def test_functions_document_arguments_and_errors():
    """Public functions and methods with arguments document each of them."""
    functions = [
        value for name in sorted(PUBLIC) if inspect.isfunction(value := getattr(diffq, name))
    ]
    methods = [
        member
        for owner in diffq.DiffQuantizer.__mro__
        if owner.__module__.startswith("diffq")
        for _, member in _public_members(owner)
        if inspect.isfunction(member)
    ]
    for function in functions + methods:
        doc = inspect.getdoc(function)
        for argument in inspect.signature(function).parameters:
            # A function with one argument may say what it does with it in its first line.
            if argument != "self" and "Args:" in doc:
                assert re.search(rf"\*{{0,2}}{argument}: ", doc), (function, argument)


def test_package_is_typed():
    """The package carries its type marker, and every function of it is annotated."""
    assert (PACKAGE / "py.typed").is_file()
    missing = [
        f"{name}.{node.name}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.returns is None and node.name != "__init__"
        if not name.startswith("diffq.kernels.device.")  # Triton gives them their types
    ]
    assert missing == []


# Imports


def _run(code):
    """The output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


_NO_TORCH = "import sys; sys.modules['torch'] = None; "


def test_diffq_imports_without_torch():
    """`import diffq` loads neither torch nor a module of diffq that needs it."""
    loaded = _run("import sys, diffq; print([m for m in sys.modules if m.startswith('torch')])")
    assert loaded.strip() == "[]"
    assert "DiffqError" in _run(_NO_TORCH + "import diffq; print(diffq.DiffqError)")


def test_format_imports_without_torch():
    """Every module of diffq.format is imported, and used, where torch cannot be."""
    import diffq.format

    names = [
        f"diffq.format.{module.name}" for module in pkgutil.iter_modules(diffq.format.__path__)
    ]
    assert "diffq.format.records" in names
    assert len(names) > 2
    code = _NO_TORCH + "".join(f"import {name}; " for name in names)
    code += "import numpy; from diffq.format.bitpack import pack, unpack; "
    code += "print(unpack(pack(numpy.arange(8, dtype=numpy.uint16), 3), 8, 3).tolist())"
    assert _run(code).strip() == str(list(range(8)))


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name.startswith(("diffq.format", "diffq.reports"))]
)
def test_files_need_no_torch(name):
    """No module of diffq.format or diffq.reports imports torch, not even within a function."""
    assert not any(found.split(".")[0] == "torch" for found in _imports(MODULES[name]))


def test_every_module_has_a_stage():
    """Every module belongs to a stage of the pipeline."""
    assert {name.split(".")[1] for name in MODULES} <= set(STAGES)


@pytest.mark.parametrize("name", MODULES)
def test_import_direction(name):
    """A module imports only modules of earlier stages, or of its own."""
    stage = name.split(".")[1]
    later = STAGES[STAGES.index(stage) + 1 :]
    assert not any(found.split(".")[1] in later for found in _inner_imports(name))


def test_no_import_cycles():
    """No modules of diffq import each other in a circle, within a stage either."""
    order = list(TopologicalSorter({name: _inner_imports(name) for name in MODULES}).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_package_imports_nothing_around_it(name):
    """The package never imports from tests, examples or benchmarks, nor relatively."""
    tops = {found.split(".")[0] for found in _imports(MODULES[name])}
    assert tops.isdisjoint({"tests", "examples", "benchmarks"})
    relative = [
        node
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert relative == []


def _dotted(tree):
    """The names that a module imports, and what it reads attributes of, as text."""
    yield from _imports(tree)
    yield from (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))


@pytest.mark.parametrize("name", MODULES)
def test_private_names_of_torch(name):
    """Private functions and classes of torch are named in `torch_inside` only."""
    private = [n for n in _dotted(MODULES[name]) if re.fullmatch(r"torch(\.\w+)*\._[\w.]+", n)]
    assert private == [] or name.split(".")[1] == "torch_inside"


def _private_members():
    optimizer = torch.optim.SGD([torch.zeros(1)])
    names = {*dir(torch.nn.Module), *vars(torch.nn.Module()), *dir(torch.Tensor)}
    names |= {*dir(torch.optim.Optimizer), *vars(optimizer)}
    return {name for name in names if re.fullmatch(r"_[a-z]\w*", name)}


# Names of members are not looked for in `diffq.format`, which knows no torch.
@pytest.mark.parametrize(
    "name", [n for n in MODULES if n.split(".")[1:2] not in (["torch_inside"], ["format"])]
)
def test_private_members_of_torch(name):
    """Private members of modules, tensors and optimizers are used in `torch_inside` only."""
    nodes = list(ast.walk(MODULES[name]))
    found = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    found |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    found |= {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    assert found & _private_members() == set()


@pytest.mark.parametrize("name", MODULES)
def test_no_assert_statements(name):
    """The package has no assert statement, which `python -O` would remove."""
    lines = [node.lineno for node in ast.walk(MODULES[name]) if isinstance(node, ast.Assert)]
    assert lines == []


def test_nothing_unpickles():
    """No module of the package uses pickle, marshal, eval or exec."""
    for name, tree in MODULES.items():
        tops = {found.split(".")[0] for found in _imports(tree)}
        assert tops.isdisjoint({"pickle", "marshal", "shelve", "dill"}), name
        calls = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert calls.isdisjoint({"eval", "exec", "compile", "__import__"}), name


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_they_do(name):
    """Every module has a docstring, and can be imported unless it is there to be run."""
    assert ast.get_docstring(MODULES[name])
    if not name.endswith("__main__"):
        if name.startswith("diffq.kernels."):
            pytest.importorskip("triton", reason="triton is missing: run `make test-kernels`")
        if name in ("diffq.export.graph", "diffq.export.decoding"):
            pytest.importorskip("onnx", reason="onnx is missing: run `make test-integrations`")
        library = name.removeprefix("diffq.integrations.")
        if library in ("lightning", "safetensors", "transformers"):
            pytest.importorskip(library, reason="it is missing: run `make test-integrations`")
        assert isinstance(importlib.import_module(name), types.ModuleType)


def test_quantizers_share_one_face():
    """The quantizers differ in their arguments only: each has the same public methods."""
    classes = [
        diffq.DiffQuantizer,
        diffq.QATQuantizer,
        diffq.LSQQuantizer,
        diffq.QuantNoiseQuantizer,
        diffq.ProductQuantizer,
    ]
    faces = [{name for name in dir(c) if not name.startswith("_")} for c in classes]
    own = {"freeze_bits", "refresh", "quantize_stage", "stages"}
    assert all(face - own == faces[1] for face in faces)
    assert faces[0] & own == {"freeze_bits"}
    assert faces[-1] & own == own - {"freeze_bits"}
    rules = ["min_size", "include", "exclude", "overrides", "float16", "small_bits"]
    for one in classes:
        parameters = inspect.signature(one).parameters
        assert [name for name in parameters if name in rules] == rules
        assert all(p.kind is p.KEYWORD_ONLY for n, p in parameters.items() if n != "model")
