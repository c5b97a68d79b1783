"""Programs are compiled anew when the code that they are made from changes, and only then."""

import shutil
from pathlib import Path

import pytest

import dash_runtime
from dash_runtime.files.disk_cache import digest
from dash_runtime.programs.traced_code import traced_code

PACKAGE = Path(dash_runtime.__file__).parent


def digest_after(folder: Path, file: str, old: str, new: str) -> str:
    """Returns the digest of a copy of the package in which `old` is replaced by `new`."""
    copy = folder / "dash_runtime"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "policies"))
    source = (copy / file).read_text()
    assert old in source
    (copy / file).write_text(source.replace(old, new))
    return digest(traced_code(copy))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("linears/quantization.py", "INT4_GROUP_SIZE = 32", "INT4_GROUP_SIZE = 64"),
        ("linears/row_kernels.py", "_NUM_SUMS = 4", "_NUM_SUMS = 2"),
        ("programs/traced_layer.py", "functional.silu(gate)", "functional.relu(gate)"),
        ("programs/traced_policy.py", "functional.silu(known", "functional.relu(known"),
        ("programs/compile_program.py", '"native -mprefer', '"x86-64 -mprefer'),
        ("programs/kv_blocks.py", "BLOCK_TOKENS = 16", "BLOCK_TOKENS = 32"),
    ],
)
def test_other_code_or_another_constant_is_another_program(file: str, old: str, new: str, tmp_path: Path) -> None:
    assert digest_after(tmp_path, file, old, new) != digest(traced_code(PACKAGE))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("linears/quantization.py", '"""', '"""  '),
        ("programs/traced_layer.py", "import torch\n", "import torch  # the library\n\n\n"),
        ("decoder/decoder.py", "class Decoder", "class Coder"),
        ("actions.py", "class CostTable", "class PriceTable"),
    ],
)
def test_another_docstring_comment_or_room_compiles_nothing_anew(file: str, old: str, new: str, tmp_path: Path) -> None:
    assert digest_after(tmp_path, file, old, new) == digest(traced_code(PACKAGE))
