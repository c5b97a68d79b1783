"""Native code whose structures differ from structs.py is refused, and the message names the field."""

import ctypes
from pathlib import Path

import pytest

from dash_runtime.native import structs
from dash_runtime.native.code_files import library_path, load_native_code
from dash_runtime.native.layout import LayoutDiffers, check_layout
from dash_runtime.native.levels import best_level
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.structs import MatrixStruct


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("words 0 further 8", "further 0 words 8", "Matrix.words is 0 in structs.py and 8 in native code"),
        (" top_k 32", "", "Draw.top_k is 32 in structs.py and None in native code"),
        ("filled 64", "filled 64 more 72", "Span.more is None in structs.py and 72 in native code"),
        ("Rotary 16", "Rotary 24", "Rotary has 16 bytes in structs.py and 24 in native code"),
        ("Rotary 16", "Rotation 16", "native code has no Rotary"),
        ("LANES 16", "LANES 8", "constants.LANES is 16 in structs.py and 8 in native code"),
        ("constants", "Other 8 one 0\nconstants", "structs.py has no Other"),
    ],
)
def test_any_difference_is_refused_by_the_name_of_what_differs(
    native_library: NativeLibrary, old: str, new: str, message: str
) -> None:
    check_layout(native_library.layout)
    assert old in native_library.layout
    with pytest.raises(LayoutDiffers) as refused:
        check_layout(native_library.layout.replace(old, new))
    assert str(refused.value) == message


def test_code_with_other_structures_is_compiled_again_and_then_runs_nothing(
    native_library: NativeLibrary, rows_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Swapped(ctypes.Structure):
        _fields_ = MatrixStruct._fields_[1::-1] + MatrixStruct._fields_[2:]  # type: ignore[operator]

    kept = library_path(tmp_path, best_level())
    kept.write_bytes((rows_folder / f"{native_library.name}.zip").read_bytes())
    compiled: list[Path] = []
    monkeypatch.setattr(structs, "MatrixStruct", Swapped)
    monkeypatch.setattr("dash_runtime.native.code_files._compile", lambda path, level: compiled.append(path))
    said: list[str] = []
    assert load_native_code(tmp_path, said.append) is None
    assert compiled == [kept]
    assert said[-1] == "layers run eagerly: Matrix.further is 0 in structs.py and 8 in native code"
