"""No shipped source reads or writes pickle, which runs any code that its file names."""

import ast
from collections.abc import Iterator

import pytest

from tests.test_architecture import PACKAGES, python_files

MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "pickletools",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "copyreg",
}
MODULES |= {"multiprocessing"}
"""Its queues and pipes pickle their contents."""
FUNCTIONS = {
    "torch": {"load", "save", "hub", "package", "jit"},
    "torch.serialization": {"load", "save"},
    "numpy": {"load", "save", "savez", "fromfile"},
    "pandas": {"read_pickle"},
}
ALIASES = {"np": "numpy", "pd": "pandas"}
KEYWORDS = {"allow_pickle", "pickle_module", "weights_only"}
METHODS = {"to_pickle", "read_pickle", "import_module", "__import__"}


def uses_of_pickle(source: str) -> Iterator[str]:
    """Yields each expression that could read or write pickle, with its line."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Import(names=names):
                yield from (f"{line}: import {name.name}" for name in names if name.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in MODULES:
                    yield f"{line}: from {module}"
                wrong = FUNCTIONS.get(module, set())
                yield from (f"{line}: from {module} import {name.name}" for name in names if name.name in wrong)
            case ast.Attribute(value=value, attr=attribute):
                owner = ast.unparse(value)
                if attribute in FUNCTIONS.get(ALIASES.get(owner, owner), set()) or attribute == "read_pickle":
                    yield f"{line}: {owner}.{attribute}"
            case ast.Call(func=function, args=arguments, keywords=keywords):
                yield from (f"{line}: {keyword.arg}=" for keyword in keywords if keyword.arg in KEYWORDS)
                name = ast.unparse(function).rsplit(".", 1)[-1]
                constants = {argument.value for argument in arguments if isinstance(argument, ast.Constant)}
                if name in METHODS and (name == "to_pickle" or constants & MODULES):
                    yield f"{line}: {name}"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_no_package_uses_pickle(package: str) -> None:
    files = python_files(PACKAGES[package])
    assert files
    found = {path.name: list(uses_of_pickle(path.read_text("utf-8"))) for path in files}
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, joblib as j",
        "from multiprocessing import Queue",
        "def f():\n    from torch import load",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=True)",
        "torch.jit.load('x')",
        "np.load('x')",
        "numpy.load(file, allow_pickle=True)",
        "load(file, allow_pickle=False)",
        "pd.read_pickle('x')",
        "frame.to_pickle('x')",
        "importlib.import_module('pickle')",
        "__import__('dill')",
    ],
)
def test_a_use_of_pickle_would_be_found(source: str) -> None:
    assert list(uses_of_pickle(source))


@pytest.mark.parametrize(
    "source",
    [
        "json.loads(text)",
        "from safetensors.torch import load_file",
        "ChatTemplate.load(folder)",
        "import torch\ntorch.add",
    ],
)
def test_other_readers_are_no_pickle(source: str) -> None:
    assert not list(uses_of_pickle(source))
