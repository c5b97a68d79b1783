"""Native code that a wheel brings: used without a compiler, and refused if it is not what it should be."""

import hashlib
import runpy
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import dash_runtime
from dash_runtime.native.code_files import brought, compile_ahead, library_path, load_native_code
from dash_runtime.native.levels import best_level, levels_here
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.recipe import LEVELS, NATIVE, Level
from dash_runtime.startup.native_check import check_native_code

ROOT = Path(dash_runtime.__file__).parent.parent
pytestmark = pytest.mark.usefixtures("no_compiler")
COMPILER = '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo "code of $0" > "$2"\n'

if best_level() is NATIVE:
    pytest.skip("wheels have no level of this machine", allow_module_level=True)


@pytest.fixture
def package(native_library: NativeLibrary, rows_folder: Path, tmp_path: Path) -> Path:
    """The folder of a package's native code for this machine's best level."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    with zipfile.ZipFile(rows_folder / f"{native_library.name}.zip") as kept:
        add(folder, best_level(), kept.read(kept.namelist()[0]))
    return folder


def add(folder: Path, level: Level, code: bytes) -> None:
    path = brought(folder, level)
    path.write_bytes(code)
    with (folder / "SHA256SUMS").open("a") as sums:
        sums.write(f"{hashlib.sha256(code).hexdigest()}  {path.name}\n")


def load(package: Path, cache: Path, **options: Any) -> tuple[NativeLibrary | None, list[str]]:
    """Returns the library, and what a start says."""
    said: list[str] = []
    return load_native_code(cache, said.append, prebuilt=package, **options), said


def test_it_is_used_without_a_compiler(package: Path, tmp_path: Path) -> None:
    compile_ahead(tmp_path / "cache", package)
    library, said = load(package, tmp_path / "cache", check=check_native_code)
    assert library is not None
    assert library.name == brought(package, best_level()).stem
    assert said == [f"native code for {best_level().name}, from the package"]


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_passed_here_is_not_checked_again_where_that_can_be_kept(
    package: Path, tmp_path: Path, is_kept: bool
) -> None:
    cache, checked = tmp_path / "cache", []
    if not is_kept:
        cache.touch()  # no folder can be made there
    for _ in range(2):
        assert load(package, cache, check=checked.append)[0] is not None
    assert len(checked) == (1 if is_kept else 2)
    another_build = tmp_path / "another"
    another_build.mkdir()
    add(another_build, best_level(), brought(package, best_level()).read_bytes() + bytes(1))
    assert load(another_build, cache, check=checked.append)[0] is not None
    assert len(checked) == (2 if is_kept else 3)


@pytest.mark.parametrize("damage", ["cut", "changed", "unlisted"])
def test_a_damaged_one_is_refused_in_a_line_and_the_next_level_runs(package: Path, tmp_path: Path, damage: str) -> None:
    best, *others = levels_here()
    if not others:
        pytest.skip("this machine has one level")
    path = brought(package, best)
    code = path.read_bytes()
    add(package, others[0], code)
    if damage == "unlisted":
        sums = package / "SHA256SUMS"
        sums.write_text(sums.read_text().splitlines()[-1])
    else:
        path.write_bytes(code[: len(code) // 2] if damage == "cut" else code.replace(b"LANES", b"LINES"))
    library, said = load(package, tmp_path)
    assert library is not None
    assert said == [
        f"the package's native code for {best.name} is not used: {path} is not as it was built",
        f"native code for {others[0].name}, from the package",
    ]


def test_one_that_computes_something_else_is_refused(package: Path, tmp_path: Path) -> None:
    def refuse(library: NativeLibrary) -> None:
        raise ValueError("its products differ")

    library, said = load(package, tmp_path, check=refuse)
    assert library is None
    assert said == [
        f"the package's native code for {best_level().name} is not used: its products differ",
        "compiling native code (kept for later starts)",
        "layers run eagerly: no C++ compiler here",
    ]


def test_where_code_is_to_be_built_here_the_packages_is_not_used(
    package: Path, rows_folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    assert load_native_code(tmp_path, said.append, prebuilt=None) is None
    assert said[-1] == "layers run eagerly: no C++ compiler here"
    kept = load_native_code(rows_folder, said.append, prebuilt=None)
    assert kept is not None
    assert kept.name == library_path(rows_folder, best_level()).stem


def test_this_machines_code_computes_what_torch_does(native_library: NativeLibrary) -> None:
    check_native_code(native_library)


def test_code_that_does_nothing_fails_the_check(native_library: NativeLibrary) -> None:
    idle = SimpleNamespace(**vars(native_library))
    idle.new_workspace = native_library.new_workspace
    idle.run_rows = lambda arguments: None
    with pytest.raises(ValueError, match="its products in INT3 differ from torch's by"):
        check_native_code(idle)  # type: ignore[arg-type]


class Hook:
    """hatchling's base class of hooks."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_build_of_a_wheel_has_every_level_of_the_machine_and_their_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = Hook  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    shutil.copytree(ROOT / "dash_runtime" / "native", tmp_path / "dash_runtime" / "native")
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))["NativeCode"](tmp_path)
    data: dict[str, Any] = {"force_include": {}}
    hook.initialize("standard", data)
    assert data == {"force_include": {}}, "a wheel that nobody asked it for has native code"
    monkeypatch.setenv("DASH_WHEEL_MACHINE", machine)
    monkeypatch.setenv("CXX", str(compiler))
    hook.initialize("standard", data)
    places = {Path(place).name: Path(file) for file, place in data["force_include"].items()}
    sums = dict(line.split()[::-1] for line in places.pop("SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in places.items()}
    assert list(places) == [brought(tmp_path, level).name for level in LEVELS if level.machine == machine]
    assert all(file.is_relative_to(tmp_path) for file in places.values()), "it writes elsewhere than into its sources"
    assert (data["tag"], data["pure_python"]) == (f"py3-none-linux_{machine}", False)
