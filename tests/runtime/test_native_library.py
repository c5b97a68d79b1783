"""Native code is compiled once for a machine and kept. Where that cannot be, one line says why."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import dash_runtime
from dash_runtime.checkpoints import load_model_config
from dash_runtime.decoder.backends.native import why_eager
from dash_runtime.model_config import BlockConfig, MixtureConfig, NormPlacement, QkNorm, RopeConfig, RopeKind
from dash_runtime.native.code_files import compile_ahead, load_native_code, others_may_write
from dash_runtime.native.levels import best_level
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.recipe import LEVELS, Level, code_digest

SOURCES = Path(dash_runtime.__file__).parent / "native"
FAILING = "#!/bin/sh\necho 'native.cpp:1:2: error: no such header\ncompilation terminated.' >&2\nexit 1\n"


def load(folder: Path) -> tuple[NativeLibrary | None, list[str]]:
    """Returns the library, and the progress messages."""
    said: list[str] = []
    return load_native_code(folder, said.append), said


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code, compiled in it; the compiler's temporary files were beside it."""
    folder = tmp_path_factory.mktemp("kept") / "native"
    temporary = folder.with_name("temporary")
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)  # it is looked up once
        library, said = load(folder)
    assert library is not None, said
    assert said == ["compiling native code (kept for later starts)"]
    return folder


@pytest.fixture
def failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "g++").write_text(FAILING)
    (folder / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def quick_compiler(kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A compiler that makes what the real one has made before."""
    folder = tmp_path_factory.mktemp("bin")
    (package,) = kept.iterdir()
    with zipfile.ZipFile(package) as compiled:
        library = compiled.extract(compiled.namelist()[0], folder)
    script = 'while [ "$1" != -o ]; do shift; done; exec cp "{}" "$2"'
    (folder / "g++").write_text(f"#!/bin/sh\n{script.format(library)}\n")
    (folder / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(("folder_mode", "file_mode", "is_open"), [
    (0o755, 0o644, False), (0o1777, 0o644, False), (0o777, 0o644, True), (0o755, 0o646, True),
])  # fmt: skip
def test_code_that_others_may_write_is_known(tmp_path: Path, folder_mode: int, file_mode: int, is_open: bool) -> None:
    path = tmp_path / "folder" / "code.zip"
    path.parent.mkdir()
    path.write_bytes(b"code")
    path.chmod(file_mode)
    path.parent.chmod(folder_mode)
    assert others_may_write(path) == is_open


def test_code_that_others_may_have_written_is_not_run(kept: Path, tmp_path: Path, no_compiler: None) -> None:
    folder = Path(shutil.copytree(kept, tmp_path / "open"))
    folder.chmod(0o777)
    library, said = load(folder)
    assert library is None
    assert "others may write to" in said[0]


def test_nothing_but_the_package_is_left_behind_by_compiling(kept: Path) -> None:
    (path,) = kept.iterdir()
    assert path.suffix == ".zip"
    assert not path.name.startswith(".")
    assert list(kept.with_name("temporary").iterdir()) == []


@pytest.mark.usefixtures("no_compiler")
def test_kept_code_is_loaded_without_a_word_or_a_compiler_and_needs_no_file(kept: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(kept, tmp_path / "native"))
    library, said = load(copy)
    assert said == []
    assert library is not None
    shutil.rmtree(copy)
    assert library.new_workspace(library)


def test_loaded_code_keeps_nothing_in_the_temporary_folder(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library, _ = load(kept)  # its end would delete the file, but a process may end without
    assert library is not None
    assert list(tmp_path.iterdir()) == []


def test_code_loads_where_none_may_be_run_from_the_temporary_folder(kept: Path, tmp_path: Path) -> None:
    """As on hardened machines, and in a container whose temporary folder is in memory."""
    (path,) = kept.iterdir()
    script = "import pathlib, sys; from dash_runtime.native.library import *; NativeLibrary(pathlib.Path(sys.argv[1]))"
    in_there = f"mount -t tmpfs -o noexec tmpfs {tmp_path} && exec env TMPDIR={tmp_path}"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--mount", "sh", "-c", f"{in_there} true"]).returncode:
        pytest.skip("needs the right to mount")
    command = [unshare, "--mount", "sh", "-c", f'{in_there} "$@"', "sh", sys.executable, "-c", script, str(path)]
    subprocess.run(command, check=True, timeout=120)


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("kept_bytes", [0, 100, -100])
def test_a_damaged_package_is_compiled_again(kept: Path, tmp_path: Path, kept_bytes: int) -> None:
    (path,) = kept.iterdir()
    damaged = tmp_path / path.name
    damaged.write_bytes(path.read_bytes()[:kept_bytes])
    library, said = load(tmp_path)
    assert library is not None
    assert said == ["compiling native code (kept for later starts)"]
    assert load(tmp_path)[1] == []


@pytest.mark.usefixtures("no_compiler")
def test_a_damaged_package_is_no_error_where_it_cannot_be_compiled_again(kept: Path, tmp_path: Path) -> None:
    (path,) = kept.iterdir()
    with zipfile.ZipFile(tmp_path / path.name, "w") as package:
        package.writestr("native.so", b"no code")
    library, said = load(tmp_path)
    assert library is None
    assert said[-1] == "layers run eagerly: no C++ compiler here"


@pytest.mark.usefixtures("no_compiler")
def test_a_machine_without_a_compiler_says_so_and_leaves_no_file(tmp_path: Path) -> None:
    library, said = load(tmp_path)
    assert library is None
    assert said[-1] == "layers run eagerly: no C++ compiler here"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("failing_compiler")
def test_a_compiler_that_fails_is_a_reason_in_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "native"
    library, said = load(folder)
    assert library is None
    assert said[-1] == "layers run eagerly: native.cpp:1:2: error: no such header"
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_reason_and_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    for folder in (blocked, blocked / "native"):
        library, said = load(folder)
        assert library is None
        start, _, reason = said[-1].partition(": ")
        assert start == "layers run eagerly"
        assert reason
        assert "\n" not in reason


def digest_after(folder: Path, file: str, old: str, new: str) -> str:
    """Returns the digest of a copy of the sources in which `old` is replaced by `new`."""
    copy = Path(shutil.copytree(SOURCES, folder / "native", ignore=shutil.ignore_patterns("__pycache__")))
    source = (copy / file).read_text()
    assert old in source
    (copy / file).write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("copied_recipe", copy / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    digest: str = module.code_digest(best_level())
    return digest


@pytest.mark.parametrize(
    ("file", "old", "new", "is_same"),
    [
        ("recipe.py", "-O3", "-O2", False),
        ("recipe.py", "-ffp-contract=fast", "-ffp-contract=off", False),
        ("recipe.py", "Python's own", "Python's", True),
        ("structs.py", "eight bytes", "8 bytes", True),
        *((path.name, "\n", "\n\n", False) for path in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")))),
    ],
)
def test_other_code_or_other_flags_are_another_package(
    tmp_path: Path, file: str, old: str, new: str, is_same: bool
) -> None:
    unchanged = digest_after(tmp_path / "unchanged", "recipe.py", "\n", "\n")
    assert (digest_after(tmp_path / "changed", file, old, new) == unchanged) is is_same


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        (
            {"block": BlockConfig(has_qkv_bias=True, qk_norm=QkNorm.HEAD), "sliding_window": (None, 1, 7, *[None] * 3)},
            None,
        ),
        ({"block": BlockConfig(has_output_bias=True)}, "biases of outputs"),
        ({"block": BlockConfig(has_mlp_bias=True)}, "biases of outputs"),
        ({"block": BlockConfig(NormPlacement.AFTER, qk_norm=QkNorm.WIDTH)}, None),
        ({"block": BlockConfig(NormPlacement.BOTH)}, None),
        ({"ropes": (None, RopeConfig(1e4, RopeKind.YARN, original_context_length=64, query_growth=0.1))}, None),
        (
            {"ropes": (None, RopeConfig(1e4, RopeKind.YARN, original_context_length=63, query_growth=0.1))},
            "queries that grow with their position",
        ),
        ({"mixture": MixtureConfig(frozenset((1,)), 8, 2, 32, True)}, None),
        ({"mixture": MixtureConfig(frozenset((1,)), 8, 2, 48, True)}, "matrices of these sizes"),
        ({"head_dim": 24}, "heads of this size"),
        ({"head_dim": 528}, "heads of this size"),
        ({"intermediate_size": 168}, "matrices of these sizes"),
        ({"hidden_size": 80}, "matrices of these sizes"),
        ({"vocab_size": 260}, "matrices of these sizes"),
    ],
)
def test_only_models_that_the_native_code_can_compute_are_given_to_it(
    tiny_folder: Path, changes: dict[str, object], expected: str | None
) -> None:
    model = replace(load_model_config(tiny_folder), vocab_size=272, head_dim=32)
    assert why_eager(replace(model, **changes), 64) == expected  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick_compiler")
def test_what_was_compiled_ahead_is_loaded_and_a_failure_ahead_is_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ahead(tmp_path / "native")
    library, said = load(tmp_path / "native")
    assert library is not None
    assert set(said) <= {"compiling native code (kept for later starts)"}
    monkeypatch.setenv("PATH", "")
    compile_ahead(tmp_path / "other")
    library, said = load(tmp_path / "other")
    assert library is None
    assert said[-1] == "layers run eagerly: no C++ compiler here"


def test_each_level_is_a_package_of_its_own_whose_flags_give_what_it_is_named_for() -> None:
    expected = {
        "amx": {"AVX2", "AVX512F", "AVX512VNNI", "AVX512BF16", "AMX_BF16", "AMX_INT8"},
        "avx512-bf16": {"AVX2", "AVX512F", "AVX512VNNI", "AVX512BF16"},
        "avx512-vnni": {"AVX2", "AVX512F", "AVX512VNNI"},
        "x86-64-v4": {"AVX2", "AVX512F"},
        "x86-64-v3": {"AVX2"},
        "armv8.2-dotprod": {"ARM_FEATURE_DOTPROD"},
        "armv8": set(),
    }
    assert [level.name for level in LEVELS] == list(expected)
    assert len({code_digest(level) for level in LEVELS}) == len(LEVELS)
    for level in LEVELS:
        if (compiler := cross_compiler(level)) is not None:
            assert macros(compiler, level.flags) & set().union(*expected.values()) == expected[level.name], level.name


def test_the_best_level_has_all_that_the_sources_look_for_and_this_machine_has() -> None:
    compiler = cross_compiler(best_level())
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    sources = "".join(path.read_text() for path in (*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")))
    asked = set(re.findall(r"__((?:AVX|AMX|ARM)\w*?)__", sources))
    assert "AVX512F" in asked
    assert macros(compiler, best_level().flags) & asked == macros(compiler, ("-march=native",)) & asked


def cross_compiler(level: Level) -> str | None:
    """Returns a compiler for the level's kind of machine."""
    return shutil.which("g++" if level.machine == platform.machine() else f"{level.machine}-linux-gnu-g++")


def macros(compiler: str, flags: Sequence[str]) -> set[str]:
    """Returns what the compiler defines for a processor."""
    command = [compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    defined = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return {name.strip("_") for name in re.findall(r"#define (\w+)", defined)}


@pytest.mark.usefixtures("quick_compiler")
def test_a_compiler_that_is_older_than_the_level_compiles_for_the_machine_at_hand(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = shutil.which("g++")
    folder = tmp_path / "bin"
    folder.mkdir()
    script = f'case "$*" in *-march=native*) exec {quick} "$@";; esac; echo "error: unrecognized option" >&2; exit 1'
    (folder / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    library, said = load(tmp_path / "native")
    assert library is not None, said
    assert [path.name.startswith("rows-native-") for path in (tmp_path / "native").iterdir()] == [True]


def test_a_machine_of_no_level_gets_what_the_compiler_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, features in (("riscv64", ""), ("x86_64", "sse2 avx"), ("arm64", "")):
        monkeypatch.setattr(platform, "machine", lambda kind=kind: kind)
        monkeypatch.setattr("dash_runtime.native.levels.processor_features", lambda features=features: features)
        assert best_level().flags == ("-march=native",)
